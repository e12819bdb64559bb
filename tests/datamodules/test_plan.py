from collections import defaultdict
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datamodules.plan import Plan, best_fit, make_plan, split_documents
from kosmos_lit.errors import UserError


@dataclass
class Offsets:
    """What planning reads of a corpus; documents are written as strings of t (text) and i (picture)."""

    documents: list[str]
    packing: str = "whole"
    folder: Path = Path("offsets")

    def __post_init__(self) -> None:
        self.token_offsets = np.cumsum([0, *map(len, self.documents)]).astype("<u8")
        self.image_offsets = np.cumsum([0, *(d.count("i") for d in self.documents)]).astype("<u8")
        self.image_positions = np.array([p for d in self.documents for p, c in enumerate(d) if c == "i"], dtype="<u4")

    def plan(self, seq_len: int, n_latents: int, seed: int = 0) -> Plan:
        return make_plan(self, np.arange(len(self.documents)), seq_len, n_latents, seed)  # type: ignore[arg-type]


@dataclass
class Case:
    corpus: Offsets
    seq_len: int
    n_latents: int
    plan: Plan

    def positions(self, document: int, start: int, end: int) -> int:
        """Positions of a piece, counted one by one: <s>, then each token up to the one before the last target."""
        read = self.corpus.documents[document][start : end - 1]
        return 1 + sum(self.n_latents + 2 if c == "i" else 1 for c in read)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    packing = draw(st.sampled_from(["whole", "split"]))
    document = st.text(draw(st.sampled_from(["t", "ti", "ttttti"])), min_size=1, max_size=41)
    documents = draw(st.lists(document, min_size=1, max_size=23))
    n_latents = draw(st.sampled_from([1, 2, 3, 7]))
    longest_run = max(len(run) for d in documents for run in d.split("t"))
    needed = max(n_latents + 4, 1 + longest_run * (n_latents + 2))
    seq_len = needed + draw(st.integers(0, 61))
    corpus = Offsets(documents, packing)
    return Case(corpus, seq_len, n_latents, corpus.plan(seq_len, n_latents, draw(st.integers(0, 5))))


def every_piece(case: Case) -> list[tuple[int, int, int]]:
    return [piece for row in range(case.plan.n_rows) for piece in case.plan.pieces(row)]


properties = settings(deadline=None, max_examples=100)


@properties
@given(cases())
def test_every_target_of_every_document_occurs_exactly_once(case):
    pieces = defaultdict(list)
    for document, start, end in every_piece(case):
        pieces[document].append((start, end))
    assert sorted(pieces) == list(range(len(case.corpus.documents)))
    for document, found in pieces.items():
        bounds = [b for piece in sorted(found) for b in piece]
        assert bounds[0] == 0
        assert bounds[-1] == len(case.corpus.documents[document]) + 1
        assert all(start < end for start, end in found)
        assert bounds[1:-1:2] == bounds[2::2]


@properties
@given(cases())
def test_no_row_is_over_its_capacity(case):
    for row in range(case.plan.n_rows):
        assert 0 < sum(case.positions(*piece) for piece in case.plan.pieces(row)) <= case.seq_len


@properties
@given(cases())
def test_no_piece_ends_right_behind_a_pictures_marker(case):
    assert not any(case.corpus.documents[d][end - 1 : end] == "i" for d, _, end in every_piece(case))


@properties
@given(cases())
def test_positions_and_targets_of_rows_are_counted_right(case):
    positions = [sum(case.positions(*piece) for piece in case.plan.pieces(row)) for row in range(case.plan.n_rows)]
    targets = [
        sum(end - start - case.corpus.documents[d][start:end].count("i") for d, start, end in case.plan.pieces(row))
        for row in range(case.plan.n_rows)
    ]
    assert case.plan.row_positions.tolist() == positions
    assert case.plan.row_targets.tolist() == targets


@properties
@given(cases())
def test_pictures_of_pieces_are_counted_right(case):
    counted = [case.corpus.documents[d][start:end].count("i") for d, start, end in every_piece(case)]
    assert case.plan.n_images.tolist() == counted


@properties
@given(cases())
def test_a_document_that_fits_a_row_stays_whole(case):
    if case.corpus.packing == "split" and not any("i" in d for d in case.corpus.documents):
        return  # text is cut where a row ends
    for document, start, end in every_piece(case):
        n_targets = len(case.corpus.documents[document]) + 1
        if case.positions(document, 0, n_targets) <= case.seq_len:
            assert (start, end) == (0, n_targets)


def test_text_fills_every_row_but_the_last():
    plan = Offsets(["t" * n for n in (3, 5, 7, 11, 13, 41)], "split").plan(17, 3)
    assert plan.row_positions.tolist() == [17] * 5 + [86 - 5 * 17]


def test_packing_never_splits_an_image():
    plan = Offsets(["ttt" + "itt" * 11]).plan(17, 5)
    assert plan.n_images.sum() == 11
    assert plan.row_positions.max() <= 17


@given(st.lists(st.integers(1, 17), min_size=1, max_size=101), st.integers(1, 13))
def test_best_fit_fills_no_row_beyond_its_capacity(widths, window):
    rows = best_fit(np.array(widths), 17, window)
    assert np.bincount(rows, widths).max() <= 17
    assert set(rows.tolist()) == set(range(rows.max() + 1))


def test_padding_of_caption_pairs_is_small():
    lengths = 8 + np.arange(20_011) * 7919 % 53  # captions of 8 to 60 tokens
    corpus = Offsets(["i" + "t" * n for n in lengths.tolist()])
    padding = 2048 - corpus.plan(2048, 64).row_positions
    assert np.median(padding) <= 0.03 * 2048


def test_the_same_seed_gives_the_same_plan():
    corpus = Offsets(["t" * n for n in (3, 5, 7, 11, 13)] + ["tit" * 3])
    first, second = corpus.plan(23, 3, seed=5), corpus.plan(23, 3, seed=5)
    assert [first.pieces(r) for r in range(first.n_rows)] == [second.pieces(r) for r in range(second.n_rows)]


def test_another_seed_gives_another_order():
    corpus = Offsets(["t" * (1 + n % 7) for n in range(101)])
    assert corpus.plan(23, 3, seed=5).document.tolist() != corpus.plan(23, 3, seed=7).document.tolist()


def test_a_row_without_room_for_a_picture_is_refused():
    with pytest.raises(UserError, match="seq_len 8 has no room for a picture of 5 latents; it needs 9"):
        Offsets(["it"]).plan(8, 5)


def test_the_smallest_row_with_room_for_a_picture_is_enough():
    plan = Offsets(["it", "ttitt", "ititi"]).plan(9, 5)
    assert plan.n_images.sum() == 1 + 1 + 3


def test_pictures_in_a_row_that_no_row_can_hold_are_refused_and_not_asserted_about():
    with pytest.raises(UserError, match="document 0"):
        Offsets(["tiiit"]).plan(11, 5)


def test_a_corpus_without_documents_is_refused():
    with pytest.raises(UserError, match="no document to plan"):
        Offsets([]).plan(17, 3)


@given(st.integers(0, 997), st.floats(0, 1, exclude_max=True))
def test_training_and_validation_share_no_document(n_documents, val_share):
    train, val = split_documents(n_documents, val_share)
    assert sorted([*train.tolist(), *val.tolist()]) == list(range(n_documents))


def test_a_longer_corpus_moves_no_document_across():
    splits = [set(split_documents(n, 0.11)[1].tolist()) for n in (101, 307, 997)]
    for shorter, longer in pairwise(splits):
        assert shorter < longer
    assert splits[0] == {d for d in splits[1] if d < 101}


def test_a_share_of_zero_keeps_no_document_for_validation():
    assert len(split_documents(997, 0.0)[1]) == 0


def test_the_validation_share_is_about_what_was_asked():
    n = len(split_documents(10_007, 0.05)[1])
    assert abs(n - 500) < 5 * (10_007 * 0.05 * 0.95) ** 0.5  # five standard deviations of a fair draw
