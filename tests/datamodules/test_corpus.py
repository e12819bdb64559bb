import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.index import PROBE, sparse_index
from datamodules.corpus import MANIFEST, IndexedCorpus, pack_place, read_manifest, unpack_place
from datamodules.prepare.index import prepare_corpus
from datamodules.prepare.tokenizer import train_tokenizer
from kosmos_lit.errors import UserError
from tests.cli_runs import ROOT
from tests.datamodules import sample_data


@pytest.fixture
def copy(corpora, tmp_path):
    """A copy of an index, to be damaged."""
    return shutil.copytree(corpora["text"].folder, tmp_path / "text")


def other_tokenizer(tmp_path):
    sample_data.write_jsonl(tmp_path / "other.jsonl", sample_data.sentences(101, 3))
    return train_tokenizer([str(tmp_path / "other.jsonl")], 101, tmp_path / "other")


@given(st.integers(0, 2**24 - 1), st.integers(0, 2**40 - 1))
def test_a_place_is_a_shard_and_an_offset(shard, at):
    assert unpack_place(pack_place(shard, at)) == (shard, at)
    assert pack_place(shard, at) < 2**64


def test_a_tokenizer_that_made_the_index_opens_it(corpora, tokenizer):
    assert IndexedCorpus(corpora["text"].folder, tokenizer).n_documents == corpora["text"].n_documents


def test_another_tokenizer_is_refused_and_both_are_named(corpora, tokenizer, tmp_path):
    other = other_tokenizer(tmp_path)
    with pytest.raises(UserError) as refused:
        IndexedCorpus(corpora["text"].folder, other)
    assert tokenizer.fingerprint in str(refused.value)
    assert other.fingerprint in str(refused.value)


def test_a_folder_without_an_index_is_refused(tmp_path):
    with pytest.raises(UserError, match="no index in"):
        IndexedCorpus(tmp_path / "nothing")


def test_an_index_of_another_version_is_refused(copy):
    manifest = json.loads((copy / MANIFEST).read_text())
    (copy / MANIFEST).write_text(json.dumps(manifest | {"version": 97}))
    with pytest.raises(UserError, match="has version 97, this program reads version 2"):
        IndexedCorpus(copy)


def test_a_manifest_that_is_no_json_is_refused(copy):
    (copy / MANIFEST).write_text("{")
    with pytest.raises(UserError, match="is damaged"):
        read_manifest(copy)


def test_a_missing_column_is_named(copy):
    (copy / "records.npy").unlink()
    with pytest.raises(UserError, match=r"damaged: records\.npy"):
        IndexedCorpus(copy)


def test_a_column_that_is_cut_off_is_named(copy):
    data = (copy / "tokens.npy").read_bytes()
    (copy / "tokens.npy").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=r"damaged: tokens\.npy"):
        IndexedCorpus(copy)


def test_a_document_is_named_after_its_place_in_its_shard(corpora):
    names = {name: corpora[name].shard_and_name(0) for name in corpora}
    assert [(shard.rpartition("/")[2], name) for shard, name in names.values()] == [
        ("a.jsonl", "line 1"),
        ("00000.tar", "000000000"),
        ("a.warc.gz", "https://pages.example/0.html"),
    ]


def test_a_shard_that_has_moved_leaves_its_documents_numbers(corpora, tmp_path):
    moved = IndexedCorpus(shutil.copytree(corpora["caption"].folder, tmp_path / "far" / "caption"))
    assert moved.shard_and_name(0)[1].startswith("record ")


def test_shards_that_move_along_with_their_index_are_read(tokenizer_folder, tmp_path):
    sample_data.write_tar(tmp_path / "old/raw/0.tar", sample_data.pairs(3, 0))
    prepare_corpus(
        format="img2dataset",
        inputs=[str(tmp_path / "old/raw/*.tar")],
        tokenizer=tokenizer_folder,
        output=tmp_path / "old/index",
    )
    (tmp_path / "old").rename(tmp_path / "new")
    corpus = IndexedCorpus(tmp_path / "new/index")
    assert corpus.image_bytes(corpus.document_images(0)[0]) == sample_data.png(0)


def test_a_shard_that_has_become_shorter_is_noticed(tokenizer_folder, tmp_path):
    sample_data.write_tar(tmp_path / "0.tar", sample_data.pairs(3, 0))
    corpus = prepare_corpus(
        format="img2dataset", inputs=[str(tmp_path / "*.tar")], tokenizer=tokenizer_folder, output=tmp_path / "index"
    )
    (tmp_path / "0.tar").write_bytes(b"short")
    with pytest.raises(OSError, match="has changed since it was prepared"):
        corpus.image_bytes(corpus.document_images(2)[0])


# ---- at scale


def test_opening_a_hundred_million_documents_takes_less_than_100_megabytes(tmp_path):
    """In a fresh process, with 200,000 shards in the manifest; the columns are holes in files."""
    sparse_index(tmp_path / "index", 10**8, 200_000)
    process = subprocess.run(
        [sys.executable, "-c", PROBE, str(tmp_path / "index")], capture_output=True, text=True, cwd=ROOT
    )
    assert process.returncode == 0, process.stderr
    assert json.loads(process.stdout)["MB opened"] < 100  # 63 were measured: the manifest


def test_the_paths_of_shards_are_those_of_the_manifest(corpora):
    corpus = corpora["text"]
    assert [path.name for path in corpus.shards] == ["a.jsonl", "b.jsonl.gz", "c.jsonl.zst"]
    assert corpus.shards[-1] == corpus.shards[2] == corpus.shards[1:][1]
    assert all(path.is_file() for path in corpus.shards)
    with pytest.raises(IndexError):
        corpus.shards[3]


def test_a_manifest_of_before_still_opens(copy, corpora):
    """It repeated the names and sizes of the shards."""
    manifest = json.loads((copy / MANIFEST).read_text())
    (copy / MANIFEST).write_text(json.dumps(manifest | {"shards_key": corpora["text"].shards_key}))
    assert IndexedCorpus(copy).shards_key == [[p.name, p.stat().st_size] for p in corpora["text"].shards]


def test_every_shard_that_is_gone_is_counted_among_many(tokenizer_folder, tmp_path, monkeypatch):
    for n in range(7):
        sample_data.write_tar(tmp_path / f"raw/{n}.tar", sample_data.pairs(1, n))
    corpus = prepare_corpus(
        format="img2dataset", inputs=[str(tmp_path / "raw/*.tar")], tokenizer=tokenizer_folder, output=tmp_path / "index"
    )
    monkeypatch.setattr("datamodules.corpus.SHARDS_PER_CHECK", 2)
    corpus.check_shards()
    for n in (2, 5):
        (tmp_path / f"raw/{n}.tar").unlink()
    with pytest.raises(UserError, match=r"2 shards that are gone or have changed, .*2\.tar for one"):
        corpus.check_shards()


def test_text_that_has_changed_is_refused_and_text_that_is_gone_is_not(tokenizer_folder, tmp_path):
    for n in range(3):
        sample_data.write_lines(tmp_path / f"raw/{n}.jsonl", [json.dumps({"text": f"line {n}"}).encode()])
    corpus = prepare_corpus(
        format="jsonl", inputs=[str(tmp_path / "raw/*")], tokenizer=tokenizer_folder, output=tmp_path / "index"
    )
    (tmp_path / "raw/0.jsonl").unlink()
    corpus.check_shards()
    with (tmp_path / "raw/2.jsonl").open("a") as file:
        file.write("more")
    with pytest.raises(UserError, match=r"was made from 1 shards that are gone or have changed, .*2\.jsonl for one"):
        corpus.check_shards()


def test_answer_targets_are_counted_for_the_documents_of_the_argument(examples, monkeypatch):
    def plain(document):
        supervised = examples.document_supervised(document).astype(int)
        return int(supervised.sum() + (np.diff(supervised, append=0) == -1).sum())

    documents = np.array([11, 3, 3, 0, 31, 7])
    monkeypatch.setattr("datamodules.corpus.DOCUMENTS_PER_CHUNK", 2)
    assert examples.answer_targets(documents).tolist() == [plain(d) for d in documents]
    every = np.arange(examples.n_documents)
    assert examples.answer_targets(every).tolist() == [plain(d) for d in every.tolist()]
    assert examples.answer_targets(documents[:0]).tolist() == []


def test_text_has_no_count_of_answer_targets(corpora):
    assert corpora["text"].answer_targets(np.arange(3)) is None
