import gzip
import hashlib
import json
import pickle
from itertools import islice

import numpy as np
import pytest
import torch

from datamodules.blocklist import Blocklist, mask_segments
from datamodules.loader import BatchLayout, FiniteLoader, Loader, MicroBatches, RenderOptions
from datamodules.prepare.index import prepare_corpus
from datamodules.quarantine import Ledger, read_ledger
from datamodules.row_display import describe_row, readable_row
from datamodules.stream import SequentialSchedule, Stream
from kosmos_lit.batch import CORPORA
from kosmos_lit.errors import UserError
from kosmos_lit.tokenizer import IGNORE, PAD
from tests.datamodules import sample_data

SIDE, N_LATENTS, N_ROWS = 5, 3, 149


@pytest.fixture(scope="module")
def originals(corpora, tokenizer_folder, tmp_path_factory):
    """The corpora, with caption pairs whose KEY.json says where each image is from and what was downloaded."""
    folder = tmp_path_factory.mktemp("origins")
    members = []
    for name, data in sample_data.pairs(37, 0):
        key, extension = name.split(".")
        origin = {"url": f"https://images.example/{key}.jpg", "sha256": hashlib.sha256(key.encode()).hexdigest()}
        members.append((name, json.dumps(origin).encode() if extension == "json" else data))
    sample_data.write_tar(folder / "00000.tar", members[: 3 * 23])
    sample_data.write_tar(folder / "00001.tar", members[3 * 23 :])
    caption = prepare_corpus(
        format="img2dataset", inputs=[str(folder / "*.tar")], tokenizer=tokenizer_folder, output=folder / "index"
    )
    return {**corpora, "caption": caption}


@pytest.fixture(scope="module")
def stream(originals, tokenizer):
    return sample_data.stream(originals, tokenizer.special)


@pytest.fixture
def listed(tmp_path):
    """Makes a blocklist of lines."""

    def load(*lines):
        sample_data.write_lines(tmp_path / "blocked.txt", [line.encode() for line in lines])
        return Blocklist.load([str(tmp_path / "blocked.txt")])

    return load


def blocked(blocklist, corpus):
    """The names of a corpus's documents that are on a list."""
    documents = range(corpus.n_documents)
    return [corpus.shard_and_name(d)[1] for d in documents if blocklist.match(corpus, d) is not None]


def batches(stream, tokenizer, blocklist=None, ledger=None, workers=0, n_rows=None):
    options = RenderOptions(
        tokenizer=tokenizer,
        image_size=SIDE,
        fit="crop",
        n_latents=N_LATENTS,
        max_bad_share=dict.fromkeys(CORPORA, 0.0),
        ledger=ledger,
        blocklist=blocklist,
    )
    layout = BatchLayout(first_row=0, global_batch_rows=3, micro_batch_rows=1)
    micro = MicroBatches(stream, layout, options, n_rows)
    return list(islice(Loader(micro, workers), N_ROWS) if n_rows is None else FiniteLoader(micro, workers))


def digest(data, name="sha256"):
    return hashlib.new(name, data).hexdigest()


# ---- entries


@pytest.mark.parametrize(
    ("entry", "corpus", "names"),
    [
        ("000000007", "caption", ["000000007"]),
        ("00000.tar:000000007", "caption", ["000000007"]),
        ("00001.tar:000000007", "caption", []),
        ("00000", "caption", []),
        ("https://images.example/000000029.jpg", "caption", ["000000029"]),
        ("  https://images.example/000000029.jpg#top \t", "caption", ["000000029"]),
        ("https://images.example/000000029.JPG", "caption", []),
        (digest(b"000000011"), "caption", ["000000011"]),
        (digest(sample_data.jpeg(13)), "caption", ["000000013"]),
        (digest(sample_data.jpeg(13)).upper(), "caption", ["000000013"]),
        (digest(sample_data.png(24), "md5"), "caption", ["000000024"]),
        (digest(sample_data.png(12345)), "caption", []),
        (f"{sample_data.SITE}/4.html", "interleaved", [f"{sample_data.SITE}/4.html"]),
        (f"{sample_data.SITE}/13-1.jpg", "interleaved", [f"{sample_data.SITE}/13.html"]),
        (digest(sample_data.png(100 + 7 * 5 + 2)), "interleaved", [f"{sample_data.SITE}/5.html"]),
        ("c.jsonl.zst:line 3", "text", ["line 3"]),
        ("00000.tar:line 3", "text", []),
    ],
)
def test_a_document_is_found_by_key_url_and_hash_alone(originals, listed, entry, corpus, names):
    assert blocked(listed(entry), originals[corpus]) == names


def test_an_entry_with_a_shard_is_for_that_shard_alone(originals, listed):
    corpus = originals["text"]
    shards = {corpus.shard_and_name(d)[0].rpartition("/")[2] for d in range(corpus.n_documents)}
    assert len(shards) == 3
    assert len(blocked(listed(*(f"{shard}:line 7" for shard in shards)), corpus)) == 3


def test_files_are_joined_and_may_be_compressed(originals, tmp_path):
    sample_data.write_lines(tmp_path / "a.txt", [b"\xef\xbb\xbf# a comment", b"", b"  ", b"000000003\r"])
    sample_data.write_lines(tmp_path / "b.txt.gz", [b"000000005", b"000000003"])
    sample_data.write_lines(tmp_path / "c.zst", [b"#000000009", b"000000008"])
    blocklist = Blocklist.load([str(tmp_path / "?.txt*"), str(tmp_path / "c.zst")])
    assert len(blocklist) == 3
    assert blocked(blocklist, originals["caption"]) == ["000000003", "000000005", "000000008"]


def test_an_instruction_is_found_by_its_line_and_its_images_hash(examples, raw, listed):
    data = (raw / "tuning/p/4-0.png").read_bytes()
    assert blocked(listed(digest(data)), examples) == ["line 5", "line 4"]  # of two files that show the same image
    assert len(blocked(listed("a.jsonl:line 5"), examples)) == 1


def test_a_key_json_before_a_large_image_and_behind_extended_headers_is_read(tmp_path, tokenizer_folder, listed):
    big = np.random.default_rng(0).integers(0, 256, (131, 257, 3), dtype=np.uint8)  # noise: above 64 KiB as PNG
    members = []
    for n in range(5):
        data = sample_data.encoded(sample_data.Image.fromarray(np.roll(big, n, 0)), "PNG")
        assert len(data) > 1 << 16
        origin = json.dumps({"url": f"https://images.example/{n}"}).encode()
        members += [(f"{n}.json", origin), (f"{n}.png", data), (f"{n}.txt", b"some noise")]
    sample_data.write_tar(tmp_path / "a.tar", members, mtime=1.5)  # fractions of a second need a header of their own
    assert (tmp_path / "a.tar").read_bytes().count(b"PaxHeader") == len(members)
    corpus = prepare_corpus(
        format="img2dataset", inputs=[str(tmp_path / "a.tar")], tokenizer=tokenizer_folder, output=tmp_path / "index"
    )
    assert blocked(listed("https://images.example/3"), corpus) == ["3"]


def test_a_list_without_hashes_and_names_reads_no_image_and_no_name(originals, listed):
    class Closed:
        def __init__(self, corpus):
            self.document_images = corpus.document_images

    assert listed("# nothing").match(Closed(originals["caption"]), 0) is None
    assert listed(digest(b"an image")).match(Closed(originals["text"]), 0) is None


def test_an_unpickled_list_reads_its_files_again(originals, listed):
    blocklist = listed(*(f"{n:09d}" for n in range(1000)))
    sent = pickle.dumps(blocklist)
    assert len(sent) < 1000
    assert len(pickle.loads(sent)) == len(blocklist) == 1000


def refusal(*patterns):
    with pytest.raises(UserError) as caught:
        Blocklist.load(list(patterns))
    return str(caught.value)


def test_a_line_that_is_not_utf8_is_named(tmp_path):
    sample_data.write_lines(tmp_path / "a.txt", [b"fine", b"", b"caf\xe9"])
    assert f"blocklist {tmp_path / 'a.txt'}, line 3: it is not UTF-8" in refusal(str(tmp_path / "a.txt"))


@pytest.mark.parametrize("ending", ["gz", "zst"])
def test_a_list_that_is_cut_off_is_named(tmp_path, ending):
    path = tmp_path / f"a.txt.{ending}"
    sample_data.write_lines(path, [f"{n:09d}".encode() for n in range(997)])
    path.write_bytes(path.read_bytes()[:-7])
    assert f"blocklist {path} cannot be read after line" in refusal(str(path))


def test_a_missing_list_is_named(tmp_path):
    assert f"data.blocklist: no file matches '{tmp_path}/a.txt'" in refusal(str(tmp_path / "a.txt"))


def test_a_list_whose_files_are_empty_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("")
    assert "matches empty files only" in refusal(str(tmp_path / "a.txt"))


@pytest.mark.parametrize("entry", ["line 17", "row 0"])
def test_a_name_that_every_file_has_is_refused_without_a_shard(tmp_path, entry):
    sample_data.write_lines(tmp_path / "a.txt", [b"fine", entry.encode()])
    assert f"line 2: every file has a '{entry}'; say of which shard" in refusal(str(tmp_path / "a.txt"))


# ---- blocked documents


ENTRIES = (
    "000000007",
    "https://images.example/000000029.jpg",
    digest(sample_data.jpeg(13)),
    f"{sample_data.SITE}/4.html",
    f"{sample_data.SITE}/13-1.jpg",
    "c.jsonl.zst:line 3",
    "a.jsonl:line 5",
    "b.jsonl.gz:line 2",
)
NAMES = {
    "000000007",
    "000000029",
    "000000013",
    f"{sample_data.SITE}/4.html",
    f"{sample_data.SITE}/13.html",
    "line 3",
    "line 5",
    "line 2",
}


def blocked_parts(stream, blocklist):
    """Per row of the stream: masks of the positions and of the images that belong to blocked documents."""
    masks = []
    for number in range(N_ROWS):
        row = stream.row(number)
        corpus = stream.by_name[row.source].corpus
        places = np.zeros(len(row.tokens), dtype=bool)
        is_blocked = [blocklist.match(corpus, s.document) is not None for s in row.segments]
        for segment, value in zip(row.segments, is_blocked, strict=True):
            places[segment.position : segment.position + segment.length] = value
        masks.append((places, [is_blocked[n] for n in row.image_segments]))
    return masks


@pytest.mark.parametrize("workers", [0, 2])
def test_every_other_document_is_the_same_with_and_without_the_list(stream, tokenizer, listed, workers):
    blocklist = listed(*ENTRIES)
    plain = batches(stream, tokenizer)
    n_blocked = 0
    for (places, images), before, after in zip(
        blocked_parts(stream, blocklist), plain, batches(stream, tokenizer, blocklist, workers=workers), strict=True
    ):
        others = torch.from_numpy(~places)
        for name in ("tokens", "targets"):
            assert getattr(after, name)[0, others].equal(getattr(before, name)[0, others])
        for name in ("positions", "slots", "corpus"):
            assert getattr(after, name).equal(getattr(before, name))
        assert (after.lengths, after.rows, after.n_step_targets) == (before.lengths, before.rows, before.n_step_targets)
        other_images = torch.tensor([not p for p in images], dtype=torch.bool)
        assert after.images[other_images].equal(before.images[other_images])
        n_blocked += int(places.any())
    assert 5 < n_blocked < N_ROWS


def test_a_blocked_document_keeps_nothing_but_its_positions(stream, tokenizer, listed):
    blocklist = listed(*ENTRIES)
    special = tokenizer.special
    n_images = 0
    for (places, images), batch in zip(blocked_parts(stream, blocklist), batches(stream, tokenizer, blocklist), strict=True):
        assert set(batch.tokens[0, places].tolist()) <= {PAD, special.image, special.image_end}
        assert set(batch.targets[0, places].tolist()) <= {IGNORE}
        assert batch.loss_at.tolist() == np.flatnonzero(batch.targets.numpy() != IGNORE).tolist()
        assert not batch.images[images].any()
        assert batch.n_bad_images == 0
        n_images += sum(images)
    assert n_images > 5


def test_blocked_documents_are_in_the_ledger_and_in_the_batch_but_not_in_the_budget(stream, tokenizer, listed, tmp_path):
    ledger = Ledger(tmp_path / "bad.jsonl")
    read = batches(stream, tokenizer, listed(*ENTRIES), ledger)  # max_bad_share is 0
    samples = list(read_ledger(ledger.path))
    assert {s.key for s in samples} == NAMES
    assert {s.reason for s in samples} == {"blocked"}
    assert f"image's hash {digest(sample_data.jpeg(13))}" in {s.detail for s in samples}
    assert {pair for batch in read for pair in batch.bad} == {(n, "blocked") for n in ("text", "caption", "interleaved")}
    lines = ledger.path.read_text().splitlines()
    assert len(lines) == sum(len(batch.bad) for batch in read)
    assert sorted(json.loads(line)["row"] for line in lines) == [b.rows[0] for b in read for _ in b.bad]


def test_shards_and_indexes_are_not_written(stream, tokenizer, listed):
    files = sorted(
        {path for s in stream.by_name.values() for path in (*s.corpus.shards, *s.corpus.folder.iterdir()) if path.is_file()}
    )
    before = [(path.read_bytes(), path.stat().st_mtime_ns) for path in files]
    assert any("blocked" in pair for b in batches(stream, tokenizer, listed(*ENTRIES)) for pair in b.bad)
    assert [(path.read_bytes(), path.stat().st_mtime_ns) for path in files] == before


def test_held_out_documents_are_masked_as_well_and_the_ledger_has_their_split(stream, tokenizer, listed, tmp_path):
    ledger = Ledger(tmp_path / "bad.jsonl")
    sources = list(stream.by_name.values())
    schedule = SequentialSchedule([source.plan.n_rows for source in sources])
    held_out = Stream(sources, schedule, stream.special, 101)
    read = batches(held_out, tokenizer, listed(*ENTRIES), ledger, n_rows=schedule.n_rows)
    assert len(read) == schedule.n_rows
    assert {(s.key, s.split) for s in read_ledger(ledger.path)} == {(name, "val") for name in NAMES}


def test_printed_rows_are_those_that_the_model_reads(stream, tokenizer, listed):
    blocklist = listed("000000007")
    trained = batches(stream, tokenizer, blocklist)
    number = next(b.rows[0] for b in trained if b.bad)
    row, entries = blocklist.apply(stream.row(number), stream.by_name["caption"].corpus, tokenizer.special)
    printed = describe_row(row, stream)
    assert printed["tokens"] == trained[number].tokens[0].tolist()
    assert printed["targets"] == trained[number].targets[0].tolist()
    [(n, entry)] = entries.items()
    assert (printed["documents"][n]["id"], entry) == ("000000007", "key 000000007")
    assert "000000007, targets" in readable_row(row, stream, tokenizer)


def test_a_row_without_blocked_documents_is_the_very_row(stream, tokenizer):
    row = stream.row(0)
    assert mask_segments(row, {}, tokenizer.special) is row


def test_a_shard_that_is_gone_is_named_where_names_are_looked_up(stream, tokenizer, listed, tmp_path):
    row = next(row for row in map(stream.row, range(N_ROWS)) if row.corpus == CORPORA.index("caption"))

    class Moved:
        document_images = stream.by_name["caption"].corpus.document_images

        def identifiers(self, document):
            raise FileNotFoundError(2, "No such file", str(tmp_path / "gone.tar"))

    with pytest.raises(UserError, match=rf"row {row.number}: a document cannot be compared .*gone\.tar"):
        listed("000000007").apply(row, Moved(), tokenizer.special)


def test_a_compressed_list_may_have_several_members(tmp_path, originals):
    (tmp_path / "a.gz").write_bytes(gzip.compress(b"000000003\n0000") + gzip.compress(b"00005\n"))
    assert blocked(Blocklist.load([str(tmp_path / "a.gz")]), originals["caption"]) == ["000000003", "000000005"]
