"""Faults that are injected into raw files, and what an index makes of them."""

import errno
import fcntl
import json
import os
import tarfile
from random import Random

import numpy as np
import pytest

from datamodules.corpus import read_manifest
from datamodules.prepare.index import prepare_corpus
from datamodules.quarantine import LEDGER
from kosmos_lit.errors import UserError
from kosmos_lit.tokenizer import LEADING, TRAILING
from tests.datamodules import sample_data


@pytest.fixture
def prepare(tokenizer_folder, tmp_path):
    """Index all files in `raw`."""

    def run(format_, **changes):
        defaults = {"inputs": [str(tmp_path / "raw/*")], "tokenizer": tokenizer_folder, "output": tmp_path / "index"}
        return prepare_corpus(**({"format": format_} | defaults | changes))

    return run


def decoded(corpus, tokenizer):
    return [tokenizer.decode(corpus.document_tokens(d).tolist()) for d in range(corpus.n_documents)]


def ledger(folder):
    return [json.loads(line) for line in (folder / LEDGER).read_text().splitlines()]


# ---- cut and corrupt shards


def cut_in_data(data, last):
    return data[: last + 512 + 3]


def cut_in_header(data, last):
    return data[: last + 300]


def without_end(data, last):
    return data[: last + 512 + 512]


def corrupt_header(data, last):
    return data[: last + 7] + b"\xff" + data[last + 8 :]


@pytest.mark.parametrize("damage", [cut_in_data, cut_in_header, without_end, corrupt_header])
def test_a_damaged_tar_gives_the_pairs_before_and_one_line_in_the_ledger(prepare, tmp_path, damage):
    path = tmp_path / "raw/a.tar"
    sample_data.write_tar(path, [member for member in sample_data.pairs(29, 0) if not member[0].endswith("json")])
    with tarfile.open(path) as tar:
        last = tar.getmembers()[-1].offset
    path.write_bytes(damage(path.read_bytes(), last))
    corpus = prepare("img2dataset")
    assert corpus.n_documents == (29 if damage is without_end else 28)
    assert [line["reason"] for line in ledger(corpus.folder)] == ["shard cut off or corrupt"]
    assert corpus.image_bytes(corpus.document_images(27)[0]) == sample_data.jpeg(27)


@pytest.mark.parametrize("ending", ["gz", "zst"])
def test_a_compressed_file_with_changed_bytes_gives_the_texts_before_and_one_line_in_the_ledger(prepare, tmp_path, ending):
    """Two compressed stretches one after another, of which the second is changed in its middle."""
    stretches = []
    for n in range(2):
        sample_data.write_jsonl(tmp_path / f"stretch.jsonl.{ending}", sample_data.texts(211, n))
        stretches.append((tmp_path / f"stretch.jsonl.{ending}").read_bytes())
    middle = len(stretches[1]) // 2
    changed = stretches[1][:middle] + Random(5).randbytes(101) + stretches[1][middle + 101 :]
    (tmp_path / "raw").mkdir()
    (tmp_path / f"raw/a.jsonl.{ending}").write_bytes(stretches[0] + changed)
    corpus = prepare("jsonl")
    assert 211 <= corpus.n_documents < 422
    cuts = [line for line in ledger(corpus.folder) if line["reason"] == "shard cut off or corrupt"]
    assert [line["key"].startswith("after line") for line in cuts] == [True]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_shard_that_may_not_be_read_is_named(prepare, tmp_path):
    sample_data.write_tar(tmp_path / "raw/a.tar", sample_data.pairs(3, 0))
    (tmp_path / "raw/a.tar").chmod(0)
    with pytest.raises(UserError, match=r"a\.tar: 1 of 1 records are broken .* Permission denied"):
        prepare("img2dataset")


@pytest.mark.parametrize(("format_", "name"), [("img2dataset", "a.tar"), ("jsonl", "a.jsonl.gz"), ("warc", "a.warc.gz")])
def test_a_shard_that_cannot_be_read_is_named(prepare, tmp_path, format_, name, monkeypatch):
    """As on a disk that fails: opening works while files are looked for, reading does not."""
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / name).symlink_to("/proc/self/mem")
    monkeypatch.setattr("datamodules.prepare.index.expand", lambda *_: [tmp_path / "raw" / name])
    with pytest.raises(UserError, match=rf"{name}: 1 of 1 records are broken .*shard cut off or corrupt"):
        prepare(format_)
    assert read_manifest(tmp_path / "index") is None


# ---- hostile tars


def test_links_and_names_that_climb_out_of_a_tar_reach_nothing(prepare, tmp_path):
    secret = tmp_path / "secret.jpg"
    secret.write_bytes(sample_data.jpeg(5))
    (tmp_path / "raw").mkdir()
    with tarfile.open(tmp_path / "raw/a.tar", "w") as tar:
        for kind, target in ((tarfile.SYMTYPE, str(secret)), (tarfile.LNKTYPE, "../secret.jpg")):
            link = tarfile.TarInfo("linked.jpg")
            link.type, link.linkname = kind, target
            tar.addfile(link)
    extra = tmp_path / "raw/b.tar"
    names = ("../../evil", "/abs/evil", "a/../../x")
    sample_data.write_tar(
        extra, [(f"{n}.{e}", d) for n in names for e, d in (("jpg", sample_data.jpeg(7)), ("txt", b"the cat"))]
    )
    before = {path for path in tmp_path.rglob("*") if "index" not in path.parts}
    corpus = prepare("img2dataset")
    assert [corpus.image_bytes(corpus.document_images(d)[0]) for d in range(corpus.n_documents)] == [sample_data.jpeg(7)] * 3
    assert {path for path in tmp_path.rglob("*") if "index" not in path.parts} == before
    assert not any(path.name.startswith("evil") for path in tmp_path.rglob("*"))


# ---- odd text


def test_names_of_control_tokens_in_a_text_never_become_control_ids(prepare, tmp_path, tokenizer):
    spelled = [f"the {name} cat {name}" for name in (*LEADING, *TRAILING, "</image>", "<s><image></s>")]
    sample_data.write_jsonl(tmp_path / "raw/a.jsonl", spelled)
    sample_data.write_tar(tmp_path / "pairs/a.tar", [("x.jpg", sample_data.jpeg(1)), ("x.txt", " ".join(spelled).encode())])
    text = prepare("jsonl")
    pairs = prepare("img2dataset", inputs=[str(tmp_path / "pairs/*")], output=tmp_path / "pairs-index")
    controls = {tokenizer.id_of(name) for name in (*LEADING, *TRAILING)} - {tokenizer.id_of("<unk>")}
    assert not controls & set(np.asarray(text.tokens).tolist())
    assert [i for i in pairs.tokens.tolist() if i in controls] == [tokenizer.special.image]


def test_halves_of_characters_and_zero_bytes_are_indexed_as_documented_and_counted(prepare, tmp_path, tokenizer):
    lines = [rb'{"text": "a \ud800 cat"}', rb'{"text": "a \u0000 cat"}', rb'{"text": "a dog"}']
    sample_data.write_lines(tmp_path / "raw/a.jsonl", lines)
    corpus = prepare("jsonl")
    assert corpus.manifest["tally"]["notes"] == {
        'text with halves of characters, indexed as "?"': 1,
        "text with zero bytes, indexed as unknown characters": 1,
    }
    assert corpus.manifest["tally"]["examples"]['text with halves of characters, indexed as "?"'] == "a.jsonl, record 1"
    assert corpus.document_tokens(0).tolist() == tokenizer.encode("a ? cat").tolist()
    assert corpus.n_documents == 3


def test_a_line_that_is_not_utf_8_is_in_the_ledger_and_its_neighbours_are_indexed(prepare, tmp_path, tokenizer):
    sample_data.write_lines(
        tmp_path / "raw/a.jsonl", [b'{"text": "one cat"}', b'{"text": "\xff\xfe"}', b'{"text": "a dog"}']
    )
    corpus = prepare("jsonl", max_bad_share=0.5)
    assert corpus.n_documents == 2
    assert [(line["key"], line["reason"]) for line in ledger(corpus.folder)] == [("line 2", "line is not UTF-8")]


def test_empty_and_blank_documents_are_left_out_and_counted(prepare, tmp_path):
    sample_data.write_jsonl(tmp_path / "raw/a.jsonl", ["", " \n\t ", "\u200b", "the cat"])
    corpus = prepare("jsonl")
    assert corpus.n_documents == 1
    assert corpus.manifest["tally"]["skipped"] == {"empty text": 2, "no text left after normalisation": 1}
    assert not (corpus.folder / LEDGER).exists()


def test_a_page_of_images_alone_is_left_out_and_counted(prepare, tmp_path):
    images = [(f"{sample_data.SITE}/{n}.png", "image/png", sample_data.png(n)) for n in range(2)]
    bare = (f"{sample_data.SITE}/bare.html", "text/html", sample_data.page("0.png", "1.png"))
    sample_data.write_warc(tmp_path / "raw/a.warc.gz", [*images, bare, *sample_data.crawl(1, 0)])
    corpus = prepare("warc")
    assert corpus.n_documents == 1
    assert corpus.manifest["tally"]["skipped"] == {"page without text": 1}


def test_a_document_of_ten_megabytes_is_indexed_whole(prepare, tmp_path, tokenizer):
    long = " ".join(sample_data.sentences(997, 3) * 277)
    sample_data.write_jsonl(tmp_path / "raw/a.jsonl.zst", ["the cat", long, "a dog"])
    corpus = prepare("jsonl")
    assert len(long) > 10_000_000
    assert corpus.n_documents == 3
    assert np.array_equal(corpus.document_tokens(1), tokenizer.encode(long))


def test_a_folder_without_locks_is_refused_in_one_line(prepare, tmp_path, monkeypatch):
    """As on a network's file system that is mounted without them."""

    def lockf(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    sample_data.write_tar(tmp_path / "raw/a.tar", sample_data.pairs(3, 0))
    monkeypatch.setattr(fcntl, "lockf", lockf)
    with pytest.raises(UserError, match=r"index: its file system cannot keep other processes out .*No locks available"):
        prepare("img2dataset")
