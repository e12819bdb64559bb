import pickle
from collections import Counter, defaultdict
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from datamodules.io.hashing import hash_key, permutation
from datamodules.packing.pack import TOO_LONG, TOO_MANY_IMAGES, pack
from datamodules.packing.row_plan import Blocks, RowLayout
from kosmos_lit.errors import UserError
from tests.datamodules.packing.offsets import Case, Offsets, cases

properties = settings(deadline=None, max_examples=100)


def texts(n, packing="whole"):
    return Offsets(["t" * (1 + k * 7919 % 13) for k in range(n)], packing)


LAYOUT = RowLayout(seq_len=23, n_latents=3, seed=5)
BLOCKS = replace(LAYOUT, block_documents=101, run_documents=7)
"""Ten blocks of 1009 documents."""


@pytest.fixture
def several(tmp_path):
    corpus = texts(1009)
    corpus.folder = tmp_path
    return Case(corpus, BLOCKS)


# ---- every document once


@properties
@given(cases())
def test_every_target_of_a_document_occurs_exactly_once_or_the_document_is_counted_as_dropped(case):
    segments = defaultdict(list)
    for document, start, end in case.segments():
        segments[document].append((start, end))
    n_dropped = sum(sum(plan.totals.dropped.values()) for plan in case.plans.values())
    planned = {d for part in case.plans for d in case.split.documents(0, case.corpus.n_documents, part).tolist()}
    for document in planned:
        bounds = [b for segment in sorted(segments[document]) for b in segment]
        if case.fits(document):
            assert bounds[0] == 0
            assert bounds[-1] == len(case.corpus.documents[document]) + 1
            assert all(start < end for start, end in segments[document])
            assert bounds[1:-1:2] == bounds[2::2]
        else:
            assert bounds == []
            n_dropped -= 1
    assert set(segments) <= planned
    assert n_dropped == 0


@properties
@given(cases())
def test_dropped_documents_are_counted_by_reason_with_a_first_example(case):
    for part, plan in case.plans.items():
        dropped = [d for d in case.split.documents(0, case.corpus.n_documents, part).tolist() if not case.fits(d)]
        reason = TOO_LONG if case.corpus.packing == "intact" else TOO_MANY_IMAGES
        assert plan.totals.dropped == ({reason: len(dropped)} if dropped else {})
        assert plan.totals.first_dropped == ({reason: dropped[0]} if dropped else {})


@properties
@given(cases())
def test_every_row_of_an_epoch_is_read_once(case):
    for plan in case.plans.values():
        for epoch in (0, 3):
            assert sorted(plan.row(epoch, number) for number in range(plan.n_rows)) == list(range(plan.n_rows))


@properties
@given(cases())
def test_training_and_validation_share_no_document(case):
    owners = defaultdict(set)
    for part, plan in case.plans.items():
        for row in range(plan.n_rows):
            for document, _, _ in plan.segments(row):
                owners[document].add(part)
    assert all(len(parts) == 1 for parts in owners.values())


# ---- rows


@properties
@given(cases())
def test_no_row_is_over_its_capacity(case):
    for plan in case.plans.values():
        for row in range(plan.n_rows):
            assert 0 < sum(case.positions(*segment) for segment in plan.segments(row)) <= case.layout.seq_len


@properties
@given(cases())
def test_no_segment_ends_right_behind_an_images_marker(case):
    assert not any(case.corpus.documents[d][end - 1 : end] == "i" for d, _, end in case.segments())


@properties
@given(cases())
def test_totals_are_those_of_the_rows_counted_one_by_one(case):
    for part, plan in case.plans.items():
        segments = [segment for row in range(plan.n_rows) for segment in plan.segments(row)]
        images = sum(case.corpus.documents[d][start:end].count("i") for d, start, end in segments)
        totals = plan.totals
        assert totals.rows == plan.n_rows
        assert totals.documents == len(case.split.documents(0, case.corpus.n_documents, part))
        assert totals.begun == len({d for d, _, _ in segments}) == totals.documents - sum(totals.dropped.values())
        assert totals.images == images
        assert totals.positions == sum(case.positions(*segment) for segment in segments)
        assert totals.targets == sum(end - start for _, start, end in segments) - images
        assert totals.targets == plan.n_targets(0, plan.n_rows)


@properties
@given(cases(), st.integers(0, 40), st.integers(0, 60))
def test_targets_of_a_range_of_rows_are_those_of_its_rows_also_across_blocks_and_epochs(case, first, n_rows):
    for plan in case.plans.values():
        rows = (plan.row(*divmod(number, plan.n_rows)) for number in range(first, first + n_rows))
        segments = [segment for row in rows for segment in plan.segments(row)]
        n_targets = [end - start - case.corpus.documents[d][start:end].count("i") for d, start, end in segments]

        assert plan.n_targets(first, first + n_rows) == sum(n_targets)


@properties
@given(cases())
def test_a_document_that_fits_a_row_is_one_segment(case):
    assume(case.corpus.packing != "split")  # there, text is cut where a row ends
    for document, start, end in case.segments():
        if not case.runs_over(document):
            assert (start, end) == (0, len(case.corpus.documents[document]) + 1)


# ---- random access


@properties
@given(cases(splits=False), st.randoms(use_true_random=False))
def test_a_row_is_the_same_read_first_or_last(case, random):
    assume("train" in case.plans)
    plan = case.plans["train"]
    places = [(epoch, number) for epoch in (0, 1, 7) for number in range(plan.n_rows)]
    in_order = {place: plan.segments(plan.row(*place)) for place in places}
    random.shuffle(places)
    again = case.plan()
    assert {place: again.segments(again.row(*place)) for place in places} == in_order


def test_a_row_far_into_an_epoch_is_located_without_packing_other_blocks(several, monkeypatch):
    several.plan()
    packed = []
    original = Blocks.packed
    monkeypatch.setattr(Blocks, "packed", lambda self, block: packed.append(block) or original(self, block))
    plan = several.plan()
    plan.segments(plan.row(10**9, plan.n_rows * 2 // 3))
    assert len(packed) == 1


# ---- order


@given(st.integers(1, 211), st.integers(0, 3))
@properties
def test_a_corpus_of_one_block_is_one_permutation_packed_in_one_go(n, seed):
    corpus = texts(n)
    plan = Case(corpus, replace(LAYOUT, seed=seed)).plan()
    order = permutation(n, hash_key("documents", seed))
    packed = pack(corpus, order, np.diff(corpus.token_offsets).astype(np.int64)[order] + 1, np.zeros(n, int), 23, 3)
    assert [plan.segments(row) for row in range(plan.n_rows)] == [packed.segments(row) for row in range(packed.n_rows)]
    rows = permutation(packed.n_rows, hash_key("rows", seed, "drawn", 5))
    assert [plan.row(5, number) for number in range(plan.n_rows)] == rows.tolist()


def test_blocks_hold_about_the_configured_documents(several):
    sizes = [several.plan().blocks.count(block)[1] for block in range(10)]
    assert sum(sizes) == 1009
    assert all(abs(size - 101) <= 7 for size in sizes)


def test_a_block_consists_of_whole_runs(several):
    runs = [run for block in range(10) for run in several.plan().blocks.runs(block)]
    assert sorted(runs) == [(first, min(first + 7, 1009)) for first in range(0, 1009, 7)]


def test_a_block_is_drawn_from_all_over_the_corpus(several):
    shards = [d * 3 // 1009 for first, stop in several.plan().blocks.runs(3) for d in range(first, stop)]
    assert min(Counter(shards)[shard] for shard in range(3)) > 101 / 3 / 3


def test_neighbouring_rows_come_from_one_block(several):
    plan = several.plan()
    firsts = np.searchsorted(plan._first_ids, [plan.row(2, number) for number in range(plan.n_rows)], side="right")
    assert np.count_nonzero(np.diff(firsts)) == 9


def test_blocks_and_rows_are_in_another_order_in_another_epoch(several):
    plan = several.plan()
    orders = [[plan.row(epoch, number) for number in range(plan.n_rows)] for epoch in (0, 1)]
    assert orders[0] != orders[1]
    assert [row for row in orders[0] if row < 10] != [row for row in orders[1] if row < 10]


def test_the_window_is_a_block_on_average(several):
    window = several.plan().window()
    assert (window.blocks, window.documents, window.shards) == (10, 100, 3)
    assert window.runs in (14, 15)
    assert window.rows == several.plan().n_rows // 10


def test_blocks_of_a_thin_split_test_few_documents(several):
    several.val_share = 0.001
    blocks = several.plan("val").blocks
    assert sum(stop - first for first, stop in blocks.runs(0)) <= 101 * 32


def test_the_same_seed_gives_the_same_plan(several):
    first, second = several.plan(), several.plan()
    assert [first.segments(r) for r in range(first.n_rows)] == [second.segments(r) for r in range(second.n_rows)]


def test_another_seed_gives_another_order(several):
    plans = [Case(several.corpus, replace(BLOCKS, seed=seed)).plan() for seed in (5, 7)]
    assert plans[0].blocks.runs(0) != plans[1].blocks.runs(0)
    assert plans[0].segments(0) != plans[1].segments(0)


def test_blocks_are_the_same_in_another_process(several):
    blocks = several.plan().blocks
    again = pickle.loads(pickle.dumps(blocks))
    assert again.key == blocks.key
    assert again.count(3)[0] == blocks.count(3)[0]


# ---- impossible plans


def test_a_row_without_room_for_an_image_is_refused():
    with pytest.raises(UserError, match="seq_len 8 has no room for an image of 5 latents; it needs 9"):
        Case(Offsets(["it"]), RowLayout(seq_len=8, n_latents=5, seed=0)).plan()


def test_the_smallest_row_with_room_for_an_image_is_enough():
    plan = Case(Offsets(["it", "ttitt", "ititi"]), RowLayout(seq_len=9, n_latents=5, seed=0)).plan()
    assert plan.totals.images == 1 + 1 + 3


def test_a_corpus_of_which_nothing_fits_is_refused_and_a_document_named():
    with pytest.raises(UserError, match="none of 1 documents fits rows of 11 positions; document 0, for one: more images"):
        Case(Offsets(["tiiit"]), RowLayout(seq_len=11, n_latents=5, seed=0)).plan()


def test_a_corpus_without_documents_is_refused():
    with pytest.raises(UserError, match="no document to plan"):
        Case(Offsets([]), LAYOUT).plan()


@pytest.mark.parametrize("name", ["seq_len", "block_documents", "run_documents"])
def test_a_layout_of_nothing_is_refused(name):
    with pytest.raises(UserError, match=f"{name} must be positive, got 0"):
        replace(LAYOUT, **{name: 0})
