from collections import Counter
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from datamodules.packing.pack import CROWDED, PackedRows, _WidthIndex, best_fit, exact_fill, pack
from tests.datamodules.packing.offsets import Offsets


def pack_documents(documents, seq_len, n_latents, packing="whole") -> PackedRows:
    """Documents packed in the order in which they are given."""
    corpus = Offsets(documents, packing)
    n_targets, n_images = (np.diff(o.astype(np.int64)) for o in (corpus.token_offsets, corpus.image_offsets))
    return pack(corpus, np.arange(len(documents)), n_targets + 1, n_images, seq_len, n_latents)  # type: ignore[arg-type]


def test_text_fills_every_row_but_the_last():
    packed = pack_documents(["t" * n for n in (3, 5, 7, 11, 13, 41)], 17, 3, "split")
    assert packed.row_positions.tolist() == [17] * 5 + [86 - 5 * 17]


def test_packing_never_splits_an_image():
    packed = pack_documents(["ttt" + "itt" * 11], 17, 5)
    assert packed.n_images.sum() == 11
    assert packed.row_positions.max() <= 17


def test_images_of_segments_are_counted_right():
    documents = ["ttt" + "itt" * 11, "itititiiit", "t" * 41]
    packed = pack_documents(documents, 23, 5)
    segments = [segment for row in range(packed.n_rows) for segment in packed.segments(row)]
    assert packed.n_images.tolist() == [documents[d][start:end].count("i") for d, start, end in segments]


def test_a_document_whose_images_no_row_holds_is_dropped_and_the_others_are_not():
    packed = pack_documents(["tit", "tiiit", "tiiti"], 16, 5)
    assert {reason: documents.tolist() for reason, documents in packed.dropped.items()} == {
        "more images in succession than a row holds": [1]
    }
    assert set(packed.document.tolist()) == {0, 2}


def test_nothing_is_packed_into_no_row():
    packed = pack_documents([], 17, 5)
    assert packed.n_rows == len(packed.row_targets) == len(packed.row_positions) == 0


@pytest.mark.parametrize("fill", [best_fit, exact_fill])
@given(st.lists(st.integers(1, 17), min_size=1, max_size=101), st.integers(1, 13))
def test_no_row_is_filled_beyond_its_capacity_and_none_is_empty(fill, widths, window):
    rows = fill(np.array(widths), 17, window)
    assert len(rows) == len(widths)
    assert np.bincount(rows, widths).max() <= 17
    assert set(rows.tolist()) == set(range(rows.max() + 1))


@pytest.mark.parametrize("fill", [best_fit, exact_fill])
def test_segments_of_one_width_fill_rows_as_far_as_they_can(fill):
    assert np.bincount(fill(np.full(101, 78), 2048)).tolist() == [26] * 3 + [23]


@pytest.mark.parametrize("fill", [best_fit, exact_fill])
def test_segments_as_wide_as_a_row_have_one_each(fill):
    assert sorted(np.bincount(fill(np.array([17, 1, 17, 1, 1, 17]), 17)).tolist()) == [1, 1, 1, 3]


@given(st.lists(st.integers(1, 17), min_size=1, max_size=101), st.integers(2, 51))
def test_two_and_three_segments_of_a_sum_are_found_where_there_are_some(widths, total):
    ahead = _WidthIndex(51)
    for segment, width in enumerate(widths):
        ahead.put(segment, width)
    for k, of_sum in ((2, ahead.two(total)), (3, ahead.three(total))):
        assert bool(of_sum) == any(sum(some) == total for some in combinations(sorted(widths), k))
        assert not of_sum or (len(of_sum), sum(of_sum)) == (k, total)
        assert not Counter(of_sum) - Counter(widths)


@pytest.mark.parametrize("sigma", [0.4, 0.6, 0.8])
def test_less_than_a_thousandth_of_the_rows_of_caption_pairs_is_padding(sigma):
    text = np.clip(np.rint(17 * np.exp(np.random.default_rng(3).normal(0, sigma, 50_021))), 1, 512).astype(np.int64)
    rows = exact_fill(text + 67, 2048)
    assert 1 - (text + 67).sum() / 2048 / (rows.max() + 1) < 1e-3  # a last row that holds one pair would be 5e-4


def test_rows_of_few_segments_are_packed_by_best_fit_and_rows_of_many_to_the_last_position():
    lengths = 8 + np.arange(3001) * 7919 % 53  # captions of 8 to 60 tokens
    documents = ["i" + "t" * n for n in lengths.tolist()]
    wide, narrow = pack_documents(documents, 1000, 64), pack_documents(documents, 2048, 64)
    assert wide.n_rows * CROWDED > 3001 > narrow.n_rows * CROWDED
    assert wide.n_rows == best_fit(lengths + 67, 1000).max() + 1
    assert np.sort(2048 - narrow.row_positions)[:-1].max() <= 70
    assert (narrow.row_positions >= 2045).mean() > 0.97
