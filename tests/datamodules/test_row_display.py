import hashlib
import json
from pathlib import Path

import pytest

from datamodules.row_display import describe_row, readable_row
from kosmos_lit.batch import CORPORA
from kosmos_lit.tokenizer import EOS
from tests.datamodules import sample_data


@pytest.fixture(scope="module")
def stream(corpora, tokenizer):
    return sample_data.stream(corpora, tokenizer.special)


@pytest.fixture(scope="module", params=sample_data.INPUTS)
def row(request, stream):
    return next(row for row in map(stream.row, range(31)) if CORPORA[row.corpus] == request.param)


def test_a_described_row_has_every_field(row, stream):
    described = describe_row(row, stream)
    names = ["row", "corpus", "source", "epoch", "digest", "documents", "tokens", "targets", "segments", "images"]
    assert list(described) == names
    assert {tuple(d) for d in described["documents"]} == {("source", "id", "tokens")}
    assert {tuple(i) for i in described["images"]} <= {("shard", "offset", "length", "sha256")}


def test_a_described_row_is_json_with_the_rows_own_numbers(row, stream):
    described = json.loads(json.dumps(describe_row(row, stream)))
    assert described["row"] == row.number
    assert described["corpus"] == CORPORA[row.corpus]
    assert described["tokens"] == row.tokens.tolist()
    assert described["targets"] == row.targets.tolist()
    assert described["segments"] == row.segment_ids().tolist()
    assert [d["tokens"] for d in described["documents"]] == [[s.start, s.end] for s in row.segments]
    assert len(described["images"]) == len(row.images)


def test_described_images_of_captions_are_their_bytes_in_the_shard(stream):
    row = next(row for row in map(stream.row, range(31)) if row.corpus == 1)
    for image in describe_row(row, stream)["images"]:
        with Path(image["shard"]).open("rb") as file:
            file.seek(image["offset"])
            assert hashlib.sha256(file.read(image["length"])).hexdigest() == image["sha256"]


def test_the_hash_of_a_described_image_is_that_of_the_original(stream):
    originals = {hashlib.sha256(d).hexdigest() for _, d in sample_data.pairs(23, 0) + sample_data.pairs(19, 23)}
    originals |= {hashlib.sha256(d).hexdigest() for _, _, d in sample_data.crawl(18, 0)}
    digests = {i["sha256"] for n in range(31) for i in describe_row(stream.row(n), stream)["images"]}
    assert digests
    assert digests <= originals


def test_described_documents_have_their_origin(row, stream):
    corpus = stream.by_name[row.source].corpus
    origins = [(d["source"], d["id"]) for d in describe_row(row, stream)["documents"]]
    assert origins == [corpus.shard_and_name(s.document) for s in row.segments]


def test_a_readable_row_marks_each_image_once(row, stream, tokenizer):
    text = readable_row(row, stream, tokenizer)
    assert text.count("<image>") == text.count("</image>") == len(row.images)
    assert all(f"at {i.offset} + {i.length} in" in text for i in row.images)


def test_a_readable_row_shows_its_documents_text(row, stream, tokenizer):
    text = readable_row(row, stream, tokenizer)
    uncut = [s for s in row.segments if s.start == 0 and row.targets[s.position + s.length - 1] == EOS]
    corpus = stream.by_name[row.source].corpus
    assert uncut
    for segment in uncut:
        last_line = tokenizer.decode(corpus.document_tokens(segment.document)).split("\n")[-1]
        ending = last_line.split(".")[-2] + "."
        assert ending[:-1].strip() in text
    assert text.count(" -> </s>") == sum(int(row.targets[s.position + s.length - 1]) == EOS for s in row.segments)
