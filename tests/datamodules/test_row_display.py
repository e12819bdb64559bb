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
    assert described["segments"] == row.segments().tolist()
    assert [d["tokens"] for d in described["documents"]] == [[d.start, d.end] for d in row.documents]
    assert len(described["images"]) == len(row.images)


def test_described_captions_images_are_found_byte_by_byte(stream):
    row = next(row for row in map(stream.row, range(31)) if row.corpus == 1)
    for image in describe_row(row, stream)["images"]:
        with Path(image["shard"]).open("rb") as file:
            file.seek(image["offset"])
            assert hashlib.sha256(file.read(image["length"])).hexdigest() == image["sha256"]


def test_the_hash_of_a_described_image_is_that_of_the_original(stream):
    originals = {hashlib.sha256(d).hexdigest() for _, d in sample_data.pairs(23, 0) + sample_data.pairs(19, 23)}
    originals |= {hashlib.sha256(d).hexdigest() for _, _, d in sample_data.crawl(18, 0)}
    shown = {i["sha256"] for n in range(31) for i in describe_row(stream.row(n), stream)["images"]}
    assert shown
    assert shown <= originals


def test_described_documents_say_where_they_come_from(row, stream):
    corpus = stream.by_name[row.source].corpus
    found = [(d["source"], d["id"]) for d in describe_row(row, stream)["documents"]]
    assert found == [corpus.shard_and_name(d.document) for d in row.documents]


def test_a_readable_row_marks_each_image_once(row, stream, tokenizer):
    shown = readable_row(row, stream, tokenizer)
    assert shown.count("<image>") == shown.count("</image>") == len(row.images)
    assert all(f"at {i.offset} + {i.length} in" in shown for i in row.images)


def test_a_readable_row_shows_its_documents_text(row, stream, tokenizer):
    shown = readable_row(row, stream, tokenizer)
    whole = [d for d in row.documents if d.start == 0 and row.targets[d.at + d.length - 1] == EOS]
    corpus = stream.by_name[row.source].corpus
    assert whole
    for placed in whole:
        last_line = tokenizer.decode(corpus.document_tokens(placed.document)).split("\n")[-1]
        ending = last_line.split(".")[-2] + "."
        assert ending[:-1].strip() in shown
    assert shown.count(" -> </s>") == sum(int(row.targets[d.at + d.length - 1]) == EOS for d in row.documents)
