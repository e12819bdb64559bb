import shutil
from contextlib import contextmanager, nullcontext
from hashlib import sha256

import numpy as np
import pytest

from datamodules.corpus import COLUMNS, MANIFEST, IndexedCorpus, read_manifest
from datamodules.prepare import columns, index, join
from datamodules.prepare.index import prepare_corpus
from datamodules.prepare.report import describe
from datamodules.prepare.tokenizer import train_tokenizer
from datamodules.sources import ReadOptions
from kosmos_lit.errors import UserError
from tests.datamodules import sample_data

N_SHARDS = 3


@pytest.fixture
def shards(tmp_path):
    """A folder of three JSONL shards of 23 texts each."""
    for n in range(N_SHARDS):
        sample_data.write_jsonl(tmp_path / f"raw/{n}.jsonl", sample_data.texts(23, n))
    return tmp_path / "raw"


@pytest.fixture
def prepare(shards, tokenizer_folder, tmp_path):
    """Prepare the three shards, or something else where it is said."""

    def run(**changes):
        given = {"inputs": [str(shards / "*.jsonl")], "tokenizer": tokenizer_folder, "output": tmp_path / "index"}
        return prepare_corpus(**({"format": "jsonl"} | given | changes))

    return run


def watch(monkeypatch):
    """Return a list that gets the number of every shard that is indexed from now on."""
    done = []
    original = index.index_shard

    def noticed(task, progress):
        original(task, progress)
        done.append(task.shard)

    monkeypatch.setattr(index, "index_shard", noticed)
    return done


@pytest.fixture
def indexed(monkeypatch):
    return watch(monkeypatch)


def stop(*arguments):
    raise KeyboardInterrupt


def interrupt_at(monkeypatch, shard, error=KeyboardInterrupt):
    original = index.index_shard

    def interrupted(task, progress):
        if task.shard == shard:
            raise error
        original(task, progress)

    monkeypatch.setattr(index, "index_shard", interrupted)


def content(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def hashes(corpus):
    """The SHA-256 of each image's bytes, read by way of the index."""
    images = [i for d in range(corpus.n_documents) for i in corpus.document_images(d)]
    return [sha256(corpus.image_bytes(i)).hexdigest() for i in images]


def spoil(path, n):
    """Put n broken lines behind a shard's sound ones."""
    path.write_bytes(path.read_bytes() + b"{broken\n" * n)


# ---- what an index holds


def test_each_corpus_has_the_documents_of_its_files(corpora):
    counts = {name: corpus.manifest["documents"] for name, corpus in corpora.items()}
    assert counts == {"text": sample_data.N_TEXTS, "caption": sample_data.N_PAIRS, "interleaved": sample_data.N_PAGES}
    assert counts == {name: corpus.n_documents for name, corpus in corpora.items()}


def test_each_corpus_has_the_images_of_its_files(corpora):
    n_shown = sum((2, 3, 5)[n % 3] for n in range(sample_data.N_PAGES))
    assert [corpora[n].manifest["images"] for n in corpora] == [0, sample_data.N_PAIRS, n_shown]


def test_tokens_are_counted_without_images(corpora, tokenizer):
    for corpus in corpora.values():
        ids = np.concatenate([corpus.document_tokens(d) for d in range(corpus.n_documents)])
        assert corpus.manifest["tokens"] == int((ids != tokenizer.special.image).sum())


def test_texts_are_stored_in_the_order_of_their_files(corpora, tokenizer):
    stored = [tokenizer.decode(corpora["text"].document_tokens(d).tolist()) for d in range(sample_data.N_TEXTS)]
    assert stored == sample_data.texts(17, 1) + sample_data.texts(13, 2) + sample_data.texts(11, 3)


def test_captions_are_an_image_and_then_their_text(corpora, tokenizer):
    stored = [corpora["caption"].document_tokens(d).tolist() for d in range(sample_data.N_PAIRS)]
    assert {ids.index(tokenizer.special.image) for ids in stored} == {0}
    assert [tokenizer.decode(ids) for ids in stored] == sample_data.sentences(23, 0) + sample_data.sentences(19, 23)


def test_a_pages_images_stand_between_its_texts(corpora, tokenizer):
    ids = corpora["interleaved"].document_tokens(0).tolist()
    at = [i for i, id_ in enumerate(ids) if id_ == tokenizer.special.image]
    assert [i.position for i in corpora["interleaved"].document_images(0)] == at
    texts = [tokenizer.decode(part) for part in (ids[: at[0]], ids[at[0] : at[1]], ids[at[1] :])]
    assert texts == ["A page.", *sample_data.sentences(2, 0)]


def test_captions_images_are_the_original_bytes(corpora):
    corpus = corpora["caption"]
    members = sample_data.pairs(23, 0) + sample_data.pairs(19, 23)
    assert hashes(corpus) == [sha256(data).hexdigest() for name, data in members if name.endswith(("jpg", "png"))]


def test_crawled_images_are_the_original_bytes(corpora):
    corpus = corpora["interleaved"]
    records = sample_data.crawl(11, 0) + sample_data.crawl(7, 11)
    assert hashes(corpus) == [sha256(body).hexdigest() for _, mime, body in records if mime.startswith("image")]


def test_a_pages_images_may_lie_in_another_shard(tokenizer_folder, tmp_path):
    records = sample_data.crawl(5, 0)
    sample_data.write_warc(tmp_path / "a.warc.gz", [r for r in records if r[1].startswith("text")])
    sample_data.write_warc(tmp_path / "b.warc", [r for r in records if r[1].startswith("image")])
    corpus = prepare_corpus(
        format="warc", inputs=[str(tmp_path / "*.warc*")], tokenizer=tokenizer_folder, output=tmp_path / "index"
    )
    assert corpus.n_documents == 5
    assert {i.shard for d in range(5) for i in corpus.document_images(d)} == {1}
    assert corpus.image_bytes(corpus.document_images(0)[0]) == records[0][2]


def test_parquet_and_jsonl_of_the_same_texts_are_indexed_alike(raw, tokenizer_folder, tokenizer, tmp_path):
    corpus = prepare_corpus(
        format="parquet", inputs=[str(raw / "table/*.parquet")], tokenizer=tokenizer_folder, output=tmp_path / "index"
    )
    stored = [tokenizer.decode(corpus.document_tokens(d).tolist()) for d in range(corpus.n_documents)]
    assert stored == sample_data.texts(7, 4)


def test_a_marker_written_in_a_text_is_no_image(prepare, shards, tokenizer, tmp_path):
    sample_data.write_jsonl(shards / "x.jsonl", ["a <image> and a </s> and a </doc>"])
    corpus = prepare(inputs=[str(shards / "x.jsonl")])
    stored = corpus.document_tokens(0).tolist()
    assert corpus.manifest["images"] == 0
    assert max(stored) < tokenizer.special.mask
    assert min(stored) >= 3


def test_a_text_that_normalises_to_nothing_is_left_out(prepare, shards):
    sample_data.write_jsonl(shards / "x.jsonl", ["\u200b", "the cat"])
    corpus = prepare(inputs=[str(shards / "x.jsonl")])
    assert corpus.n_documents == 1
    assert corpus.manifest["tally"]["skipped"] == {"no text left after normalisation": 1}


def test_ids_take_two_bytes_while_they_fit(corpora):
    assert corpora["text"].tokens.dtype == np.dtype("<u2")


def test_the_report_says_what_was_skipped_and_where(prepare, shards):
    spoil(shards / "1.jsonl", 1)
    sample_data.write_jsonl(shards / "3.jsonl", ["one", " "])
    shown = describe(prepare())
    assert "jsonl, 4 shards" in shown
    assert "line is not JSON (first: 1.jsonl, line 24)" in shown
    assert "empty text (first: 3.jsonl, line 2)" in shown


# ---- many processes, interruptions, repetitions


def test_two_processes_make_the_same_index_as_one(prepare, shards, tmp_path):
    prepare(output=tmp_path / "one")
    prepare(output=tmp_path / "two", workers=2)
    assert content(tmp_path / "one") == content(tmp_path / "two")


def test_an_interrupted_run_leaves_no_index(prepare, monkeypatch, tmp_path):
    interrupt_at(monkeypatch, 1)
    with pytest.raises(KeyboardInterrupt):
        prepare()
    assert read_manifest(tmp_path / "index") is None
    with pytest.raises(UserError, match="no index in"):
        IndexedCorpus(tmp_path / "index")


def test_a_run_after_an_interrupted_one_keeps_its_finished_shards(prepare, monkeypatch, indexed):
    with monkeypatch.context() as patch:
        interrupt_at(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            prepare()
    assert indexed == [0, 1]
    prepare()
    assert indexed == [0, 1, 2]


def test_a_resumed_index_is_the_one_of_an_uninterrupted_run(prepare, monkeypatch, tmp_path):
    prepare(output=tmp_path / "whole")
    with monkeypatch.context() as patch:
        interrupt_at(patch, 1)
        with pytest.raises(KeyboardInterrupt):
            prepare()
    prepare()
    assert content(tmp_path / "index") == content(tmp_path / "whole")


def test_a_shard_whose_part_was_lost_is_indexed_again_alone(prepare, monkeypatch, indexed, tmp_path):
    with monkeypatch.context() as patch:
        patch.setattr(index, "join", stop)
        with pytest.raises(KeyboardInterrupt):
            prepare()
    shutil.rmtree(tmp_path / "index/parts/000001")
    indexed.clear()
    prepare()
    assert indexed == [1]


def test_a_part_that_was_not_finished_leaves_no_trace(prepare, monkeypatch, tmp_path):
    def full(writer, values):
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(columns.ColumnWriter, "append", full)
        with pytest.raises(OSError, match="no space left"):
            prepare()
    assert [p.name for p in (tmp_path / "index/parts").iterdir()] == ["identity.json"]


def test_an_interruption_while_joining_keeps_every_shard(prepare, monkeypatch, indexed, tmp_path):
    with monkeypatch.context() as patch:
        patch.setattr(join, "write_atomically", stop)  # the columns are joined by then, the manifest is not written
        with pytest.raises(KeyboardInterrupt):
            prepare()
    assert read_manifest(tmp_path / "index") is None
    assert prepare().n_documents == 3 * 23
    assert indexed == [0, 1, 2]


def test_parts_of_other_input_are_not_joined(prepare, shards, monkeypatch, indexed):
    with monkeypatch.context() as patch:
        interrupt_at(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            prepare()
    sample_data.write_jsonl(shards / "0.jsonl", sample_data.texts(29, 7))
    indexed.clear()
    assert prepare().n_documents == 29 + 23 + 23
    assert indexed == [0, 1, 2]


def test_a_finished_index_is_opened_and_not_made_again(prepare, indexed, tmp_path):
    prepare()
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "index").iterdir()}
    again = prepare()
    assert indexed == [0, 1, 2]
    assert again.n_documents == 3 * 23
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "index").iterdir()} == before


def test_a_process_that_waited_for_another_one_takes_its_index(prepare, monkeypatch, indexed):
    @contextmanager
    def meanwhile(output, part):
        with monkeypatch.context() as patch:
            patch.setattr(index, "locked", locked)
            prepare()
        yield nullcontext

    locked = index.locked
    monkeypatch.setattr(index, "locked", meanwhile)
    prepare()
    assert indexed == [0, 1, 2]


def test_a_finished_index_holds_columns_and_manifest_alone(prepare, tmp_path):
    prepare()
    visible = {p.name for p in (tmp_path / "index").iterdir() if not p.name.startswith(".")}
    assert visible == {MANIFEST, "tokens.npy", *(f"{c}.npy" for c in COLUMNS)}


# ---- refusals


def refusal(prepare, **changes):
    with pytest.raises(UserError) as refused:
        prepare(**changes)
    return str(refused.value)


def test_another_tokenizer_is_refused_and_both_are_named(prepare, tokenizer, tmp_path):
    prepare()
    sample_data.write_jsonl(tmp_path / "other.jsonl", sample_data.sentences(101, 3))
    other = train_tokenizer([str(tmp_path / "other.jsonl")], 101, tmp_path / "other")
    message = refusal(prepare, tokenizer=tmp_path / "other")
    assert tokenizer.fingerprint in message
    assert other.fingerprint in message


def test_another_format_is_refused_and_both_are_named(prepare):
    prepare()
    assert "format is 'jsonl' there, 'parquet' here" in refusal(prepare, format="parquet")


def test_other_options_are_refused_and_both_are_named(prepare):
    prepare()
    message = refusal(prepare, options=ReadOptions(max_images=3))
    assert "'max_images': 5" in message
    assert "'max_images': 3" in message


def test_other_shards_are_refused_and_named(prepare, shards):
    prepare()
    sample_data.write_jsonl(shards / "new.jsonl", sample_data.texts(5, 0))
    (shards / "0.jsonl").unlink()
    assert "its shards differ: 3 there, 3 here; new ['new.jsonl'], gone ['0.jsonl']" in refusal(prepare)


def test_a_shard_that_is_too_broken_is_named_with_both_shares(prepare, shards):
    spoil(shards / "1.jsonl", 7)
    message = refusal(prepare)
    assert "1.jsonl: 7 of 30 records are broken (23.3%, more than max_bad_share 10.0%)" in message
    assert "7 x line is not JSON (first: 1.jsonl, line 24)" in message


@pytest.mark.parametrize("workers", [1, 2])
def test_finished_shards_are_kept_when_one_is_too_broken(prepare, shards, monkeypatch, tmp_path, workers):
    spoil(shards / "2.jsonl", 7)
    refusal(prepare, workers=workers)
    assert {p.name for p in (tmp_path / "index/parts").iterdir()} == {"000000", "000001", "identity.json"}
    indexed = watch(monkeypatch)
    prepare(max_bad_share=0.3)
    assert indexed == [2]


def test_a_few_broken_records_are_counted_and_do_not_stop(prepare, shards):
    spoil(shards / "1.jsonl", 2)
    corpus = prepare()
    assert corpus.n_documents == 3 * 23
    assert corpus.manifest["tally"]["broken"] == {"line is not JSON": 2}


def test_a_small_shard_is_not_judged_by_its_share(prepare, shards):
    sample_data.write_jsonl(shards / "3.jsonl", ["one sound text"])
    spoil(shards / "3.jsonl", 3)
    assert prepare().n_documents == 3 * 23 + 1


def test_a_shard_of_which_nothing_can_be_read_is_too_broken_however_small(prepare, shards):
    (shards / "3.jsonl").write_bytes(b"{broken\n")
    assert "3.jsonl: 1 of 1 records are broken" in refusal(prepare)


def test_a_corpus_without_documents_is_refused_and_says_why(prepare, shards, tmp_path):
    sample_data.write_jsonl(shards / "x.jsonl", [" ", " "])
    message = refusal(prepare, inputs=[str(shards / "x.jsonl")])
    assert "no document in 1 shards" in message
    assert "empty text" in message
    assert read_manifest(tmp_path / "index") is None


def test_a_pattern_that_matches_nothing_is_refused(prepare, shards):
    assert "no file matches" in refusal(prepare, inputs=[str(shards / "*.tar")])


def test_a_pattern_that_matches_empty_files_only_is_refused(prepare, shards):
    (shards / "empty.tar").touch()
    assert "matches empty files only" in refusal(prepare, inputs=[str(shards / "*.tar")])


def test_an_unknown_format_is_refused_with_those_that_there_are(prepare):
    assert "unknown format 'csv'; there are jsonl, parquet, img2dataset, warc" in refusal(prepare, format="csv")


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan")])
def test_an_impossible_share_is_refused(prepare, share):
    assert f"max_bad_share must lie in [0, 1], got {share}" in refusal(prepare, max_bad_share=share)


def test_a_missing_tokenizer_is_refused(prepare, tmp_path):
    assert "no tokenizer in" in refusal(prepare, tokenizer=tmp_path / "none")
