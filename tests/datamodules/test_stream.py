import pickle
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datamodules.stream import SequentialSchedule, inputs_and_targets, render
from kosmos_lit.batch import CORPORA
from kosmos_lit.tokenizer import BOS, EOS, IGNORE, PAD, SpecialTokens
from tests.datamodules import sample_data

SPECIAL = SpecialTokens.for_pieces(101)
IMAGE, END = SPECIAL.image, SPECIAL.image_end


@pytest.fixture(scope="module")
def stream(corpora, tokenizer):
    return sample_data.stream(corpora, tokenizer.special)


def rendered(stored, start, end, n_latents, answers=None):
    """Input ids, targets and slots of a segment by itself."""
    return render(*inputs_and_targets(stored, start, end, SPECIAL, answers), SPECIAL, n_latents)[:3]


def rows_of(stream, name, epoch):
    """The rows that a stream of one corpus only has in an epoch."""
    n = stream.by_name[name].plan.n_rows
    return [stream.row(i) for i in range(epoch * n, (epoch + 1) * n)]


def only(corpora, tokenizer, name, **options):
    ratio = [int(name == n) for n in CORPORA]
    return sample_data.stream(corpora, tokenizer.special, ratio=ratio, **options)


def test_an_image_is_read_as_marker_slots_and_end_and_is_never_a_target():
    tokens, targets, slots = rendered(np.array([10, IMAGE, 11, 12]), 0, 5, 3)
    assert tokens.tolist() == [BOS, 10, IMAGE, IMAGE, IMAGE, IMAGE, END, 11, 12]
    assert targets.tolist() == [10, IGNORE, IGNORE, IGNORE, IGNORE, IGNORE, 11, 12, EOS]
    assert slots.tolist() == [3]


def test_a_segment_from_the_middle_begins_with_bos_and_ends_on_its_last_target():
    tokens, targets, slots = rendered(np.array([10, IMAGE, 11, 12, 13]), 2, 4, 3)
    assert tokens.tolist() == [BOS, 11]
    assert targets.tolist() == [11, 12]
    assert slots.tolist() == []


@given(st.lists(st.sampled_from([10, 11, 12, IMAGE]), min_size=1, max_size=23), st.sampled_from([1, 2, 3, 7]))
def test_targets_are_the_documents_text_and_eos_in_order(stored, n_latents):
    _, targets, _ = rendered(np.array(stored), 0, len(stored) + 1, n_latents)
    assert targets[targets != IGNORE].tolist() == [*(t for t in stored if t != IMAGE), EOS]


@given(st.lists(st.sampled_from([10, 11, 12, IMAGE]), min_size=1, max_size=23), st.sampled_from([1, 2, 3, 7]))
def test_a_target_is_the_input_that_follows(stored, n_latents):
    tokens, targets, _ = rendered(np.array(stored), 0, len(stored) + 1, n_latents)
    follows = np.append(tokens[1:], EOS)
    assert (targets == follows)[targets != IGNORE].all()


def test_only_answers_are_targets_and_each_ends_with_eos():
    stored, answers = np.array([10, IMAGE, 11, 12, 13, 14, 15, 16]), np.array([0, 0, 0, 1, 1, 0, 0, 1], dtype=bool)
    tokens, targets, _ = rendered(stored, 0, 9, 1, answers)
    assert tokens.tolist() == [BOS, 10, IMAGE, IMAGE, END, 11, 12, 13, 14, 15, 16]
    assert targets.tolist() == [*[IGNORE] * 5, 12, 13, EOS, IGNORE, 16, EOS]


def test_an_image_right_behind_an_answer_leaves_its_eos():
    tokens, targets, _ = rendered(np.array([10, IMAGE, 11, 12]), 0, 5, 1, np.array([1, 0, 0, 1], dtype=bool))
    assert tokens.tolist() == [BOS, 10, IMAGE, IMAGE, END, 11, 12]
    assert targets.tolist() == [10, EOS, IGNORE, IGNORE, IGNORE, 12, EOS]


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 97), min_size=1, max_size=7))
def test_a_row_is_the_same_however_it_is_reached(corpora, tokenizer, stream, numbers):
    fresh = sample_data.stream(corpora, tokenizer.special)
    assert [sample_data.plain(fresh.row(n)) for n in numbers] == [sample_data.plain(stream.row(n)) for n in numbers]


def test_a_stream_reads_the_same_rows_in_a_process_that_is_spawned(stream):
    other = pickle.loads(pickle.dumps(stream))
    assert [sample_data.plain(other.row(n)) for n in range(23)] == [sample_data.plain(stream.row(n)) for n in range(23)]


@pytest.mark.parametrize("name", sample_data.INPUTS)
@pytest.mark.parametrize("epoch", [0, 1, 3])
def test_an_epoch_reads_every_document_exactly_once(corpora, tokenizer, name, epoch):
    rows = rows_of(only(corpora, tokenizer, name), name, epoch)
    read = Counter()
    for row in rows:
        for segment in row.segments:
            read.update((segment.document, target) for target in range(segment.start, segment.end))
    n_tokens = np.diff(corpora[name].token_offsets).tolist()
    assert read == Counter((d, target) for d, n in enumerate(n_tokens) for target in range(n + 1))
    assert {row.epoch for row in rows} == {epoch}


@pytest.mark.parametrize("name", sample_data.INPUTS)
def test_an_epoch_is_a_permutation_of_the_one_before(corpora, tokenizer, name):
    stream = only(corpora, tokenizer, name)
    first, second = ([sample_data.plain(row)[4:] for row in rows_of(stream, name, epoch)] for epoch in (0, 1))
    assert sorted(map(repr, first)) == sorted(map(repr, second))
    assert first != second


@pytest.mark.parametrize("name", ["caption", "interleaved"])
def test_an_epoch_reads_every_image_exactly_once(corpora, tokenizer, name):
    read = Counter(i for row in rows_of(only(corpora, tokenizer, name), name, 0) for i in row.images)
    stored = (i for d in range(corpora[name].n_documents) for i in corpora[name].document_images(d))
    assert read == Counter(stored)


def test_supervised_tokens_are_known_without_reading(stream):
    supervised = [int((stream.row(i).targets != IGNORE).sum()) for i in range(37)]
    assert [stream.n_targets(i, i + 1) for i in range(37)] == supervised
    assert stream.n_targets(5, 31) == sum(supervised[5:31])


def test_rows_of_the_corpora_follow_the_ratio(stream):
    assert Counter(stream.row(i).corpus for i in range(24)) == {0: 10, 1: 10, 2: 4}


def test_no_row_has_an_image_for_a_target(stream):
    targets = {int(t) for i in range(61) for t in stream.row(i).targets}
    assert not targets & {stream.special.image, stream.special.image_end, PAD, BOS}


def test_every_image_of_a_row_has_its_slots_between_marker_and_end(stream):
    for row in map(stream.row, range(61)):
        for slot in row.slots.tolist():
            assert row.tokens[slot - 1 : slot + 3].tolist() == [stream.special.image] * 4
            assert row.tokens[slot + 3] == stream.special.image_end
        assert int((row.tokens == stream.special.image).sum()) == 4 * len(row.images)
        assert len(row.slots) == len(row.images) == len(row.image_segments)


def test_an_image_lies_in_its_own_segment(stream):
    for row in map(stream.row, range(61)):
        for image, n, slot in zip(row.images, row.image_segments, row.slots.tolist(), strict=True):
            segment = row.segments[n]
            assert segment.position < slot < segment.position + segment.length
            assert image in stream.by_name[row.source].corpus.document_images(segment.document)


def test_segment_ids_count_the_segments_and_leave_padding_zero(stream):
    for row in map(stream.row, range(61)):
        ids = row.segment_ids()
        assert [int((ids == n).sum()) for n in range(1, 1 + len(row.segments))] == [s.length for s in row.segments]
        assert ((ids == 0) == (row.tokens == PAD)).all()
        assert (np.diff(ids[: row.n_real]) >= 0).all()


def test_lengths_of_a_row_sum_to_its_positions(stream):
    for row in map(stream.row, range(61)):
        assert sum(row.lengths) == 101
        assert all(length > 0 for length in row.lengths)


def test_every_segment_of_a_row_begins_with_bos(stream):
    for row in map(stream.row, range(61)):
        assert np.flatnonzero(row.tokens == BOS).tolist() == [segment.position for segment in row.segments]


def test_another_seed_gives_another_stream(corpora, tokenizer, stream):
    other = sample_data.stream(corpora, tokenizer.special, seed=11)
    assert [other.row(i).tokens.tolist() for i in range(13)] != [stream.row(i).tokens.tolist() for i in range(13)]


def test_a_sequential_schedule_reads_one_source_after_another():
    schedule = SequentialSchedule([3, 0, 2])
    assert [schedule.locate(row) for row in range(5)] == [(0, 0), (0, 1), (0, 2), (2, 0), (2, 1)]
    assert schedule.n_rows == 5
