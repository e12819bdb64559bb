import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from datamodules.packing import Packed, answer_targets, best_fit, pack
from tests.datamodules.offsets import Offsets


def packed(documents, seq_len, n_latents, packing="whole") -> Packed:
    """Documents packed in the order in which they are given."""
    corpus = Offsets(documents, packing)
    n_targets, n_images = (np.diff(o.astype(np.int64)) for o in (corpus.token_offsets, corpus.image_offsets))
    return pack(corpus, np.arange(len(documents)), n_targets + 1, n_images, seq_len, n_latents)  # type: ignore[arg-type]


def test_text_fills_every_row_but_the_last():
    plan = packed(["t" * n for n in (3, 5, 7, 11, 13, 41)], 17, 3, "split")
    assert plan.row_positions.tolist() == [17] * 5 + [86 - 5 * 17]


def test_packing_never_splits_an_image():
    plan = packed(["ttt" + "itt" * 11], 17, 5)
    assert plan.n_images.sum() == 11
    assert plan.row_positions.max() <= 17


def test_pictures_of_pieces_are_counted_right():
    documents = ["ttt" + "itt" * 11, "itititiiit", "t" * 41]
    plan = packed(documents, 23, 5)
    pieces = [piece for row in range(plan.n_rows) for piece in plan.pieces(row)]
    assert plan.n_images.tolist() == [documents[d][start:end].count("i") for d, start, end in pieces]


def test_a_document_whose_pictures_no_row_holds_is_left_out_and_the_others_are_not():
    plan = packed(["tit", "tiiit", "tiiti"], 16, 5)
    assert {reason: found.tolist() for reason, found in plan.dropped.items()} == {
        "more pictures in succession than a row holds": [1]
    }
    assert set(plan.document.tolist()) == {0, 2}


def test_nothing_is_packed_into_no_row():
    plan = packed([], 17, 5)
    assert plan.n_rows == len(plan.row_targets) == len(plan.row_positions) == 0


@given(st.lists(st.integers(1, 17), min_size=1, max_size=101), st.integers(1, 13))
def test_best_fit_fills_no_row_beyond_its_capacity(widths, window):
    rows = best_fit(np.array(widths), 17, window)
    assert np.bincount(rows, widths).max() <= 17
    assert set(rows.tolist()) == set(range(rows.max() + 1))


@given(st.data())
def test_supervised_tokens_of_documents_are_counted_alike_alone_and_together(data):
    said = data.draw(st.lists(st.lists(st.booleans(), min_size=1, max_size=7), min_size=1, max_size=23))
    corpus = Offsets(["t" * len(marks) for marks in said], extra={"supervised": np.concatenate(said).astype(np.uint8)})
    documents = data.draw(st.lists(st.integers(0, len(said) - 1), min_size=1, max_size=11))
    runs = [sum(here and not after for here, after in zip(m, [*m[1:], False], strict=True)) for m in said]
    found = answer_targets(corpus, np.array(documents))  # type: ignore[arg-type]
    assert found.tolist() == [sum(said[d]) + runs[d] for d in documents]


def test_supervised_tokens_of_documents_far_apart_are_counted_without_those_between():
    n = 5003
    marks = (np.arange(n * 3) % 3 != 1).astype(np.uint8)  # say, listen, say
    corpus = Offsets(["ttt"] * n, extra={"supervised": marks})
    assert answer_targets(corpus, np.array([4999, 3, 2500, 3])).tolist() == [4, 4, 4, 4]  # type: ignore[arg-type]
