from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from datamodules.packing.split import Split
from kosmos_lit.errors import UserError
from tests.datamodules.packing.offsets import Offsets


def split(n_documents, val_share=0.0, val_input=None):
    return Split(Offsets(["t"] * n_documents), val_share, val_input)  # type: ignore[arg-type]


def held_out(n_documents, val_share):
    return split(n_documents, val_share).documents(0, n_documents, "val").tolist()


INPUTS = st.sampled_from([None, ["0.tar"], ["1.tar", "2.tar"]])


@given(st.integers(0, 499), st.floats(0, 1, exclude_max=True), INPUTS)
def test_every_document_is_for_training_or_for_validation(n_documents, val_share, val_input):
    parts = [split(n_documents, val_share, val_input).documents(0, n_documents, part).tolist() for part in ("train", "val")]
    assert sorted(parts[0] + parts[1]) == list(range(n_documents))


@given(st.integers(0, 499), INPUTS, st.lists(st.integers(0, 499), min_size=2, max_size=2))
def test_a_range_is_split_as_all_documents_are(n_documents, val_input, bounds):
    first, stop = sorted(min(b, n_documents) for b in bounds)
    all_documents = split(n_documents, 0.3, val_input)
    inside = [d for d in all_documents.documents(0, n_documents, "val").tolist() if first <= d < stop]
    assert all_documents.documents(first, stop, "val").tolist() == inside


@given(st.integers(0, 499), INPUTS, st.integers(1, 31), st.sampled_from(["train", "val"]))
def test_the_first_documents_of_a_part_are_found_without_the_others(n_documents, val_input, n, part):
    of = split(n_documents, 0.3, val_input)
    assert of.first(part, n).tolist() == of.documents(0, n_documents, part).tolist()[:n]


def test_only_held_out_files_are_tested_for_held_out_documents(monkeypatch):
    of = split(100_003, val_input=["2.tar"])
    tested = []
    original = Split.documents
    monkeypatch.setattr(Split, "documents", lambda *a: tested.append(a[1]) or original(*a))
    assert of.first("val", 7).tolist() == tested + [tested[0] + k for k in range(1, 7)]


@pytest.mark.parametrize(("val_share", "part"), [(0.0, "val"), (1.0, "train")])
def test_an_empty_part_tests_no_document(monkeypatch, val_share, part):
    monkeypatch.setattr(Split, "documents", None)
    assert split(100_003, val_share).first(part, 1).tolist() == []
    assert list(split(100_003, val_share).chunks(part)) == []


@given(st.integers(0, 499), st.floats(0, 1), INPUTS, st.sampled_from(["train", "val"]))
def test_the_chunks_of_a_part_are_its_documents(n_documents, val_share, val_input, part):
    of = split(n_documents, val_share, val_input)
    in_chunks = [d for documents in of.chunks(part) for d in documents.tolist()]
    assert in_chunks == of.documents(0, n_documents, part).tolist()


def test_documents_of_the_named_files_are_held_out():
    assert split(11, val_input=["1.tar"]).documents(0, 11, "val").tolist() == [4, 5, 6, 7]


def test_a_file_is_held_out_by_whatever_name_it_has(tmp_path):
    (tmp_path / "0.tar").write_text("a shard")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked/1.tar").symlink_to(tmp_path / "0.tar")
    corpus = Offsets(["t"] * 11, shards=[tmp_path / "linked/1.tar", tmp_path / "gone.tar"])
    for name in ("0.tar", "linked/1.tar", "linked/../0.tar"):
        assert Split(corpus, 0.0, [str(tmp_path / name)]).documents(0, 11, "val").tolist() == [0, 1, 2, 3, 4, 5]  # type: ignore[arg-type]


def test_the_share_of_the_named_files_is_counted():
    assert split(11, val_input=["1.tar"]).share("val") == pytest.approx(4 / 11)
    assert split(11, val_input=["1.tar"]).share("train") == pytest.approx(7 / 11)


def test_files_that_were_not_prepared_cannot_be_held_out():
    with pytest.raises(UserError, match=r"val_input \['no.tar'\] names none of the files that were prepared"):
        split(11, val_input=["no.tar"])


def test_a_longer_corpus_moves_no_document_across():
    for shorter, longer in pairwise((101, 307, 997)):
        assert set(held_out(shorter, 0.11)) == {d for d in held_out(longer, 0.11) if d < shorter}


def test_a_share_of_zero_keeps_no_document_for_validation():
    assert held_out(997, 0.0) == []
    assert len(split(997).first("val", 3)) == 0


def test_the_validation_share_is_about_the_configured_one():
    n = len(held_out(10_007, 0.05))
    assert abs(n - 500) < 5 * (10_007 * 0.05 * 0.95) ** 0.5  # five standard deviations of a fair draw


def test_documents_of_several_chunks_are_split_alike():
    of = split(200_003, 0.01)
    apart = np.concatenate([of.documents(first, min(first + 997, 200_003), "val") for first in range(0, 200_003, 997)])
    assert of.documents(0, 200_003, "val").tolist() == apart.tolist()
