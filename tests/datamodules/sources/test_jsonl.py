import gzip
import json
import subprocess
import sys

import pytest
from backports import zstd

from datamodules.document import Tally
from datamodules.io.compression import compress_zstd
from datamodules.sources import SOURCES, ReadOptions
from datamodules.sources.base import TOO_LARGE
from tests.datamodules import sample_data


def read(path, **options):
    tally = Tally()
    return list(SOURCES["jsonl"].documents(path, 0, ReadOptions(**options), tally, None)), tally


def texts(documents):
    return [part for document in documents for part in document.parts]


def line(text):
    return json.dumps({"text": text}).encode()


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".ndjson", ".jsonl.gz", ".jsonl.zst"])
def test_every_ending_gives_the_same_documents(tmp_path, ending):
    sample_data.write_jsonl(tmp_path / f"a{ending}", sample_data.texts(7, 0))
    documents, tally = read(tmp_path / f"a{ending}")
    assert texts(documents) == sample_data.texts(7, 0)
    assert [d.record for d in documents] == [1, 2, 3, 4, 5, 6, 7]
    assert tally == Tally()


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (b'{"text": "half', "line is not JSON"),
        (b'{"text": "\xff\xfe"}', "line is not UTF-8"),
        (b"[" * 100_000, "line is not JSON"),
        (b'{"text": ' + b"9" * 5000 + b"}", "line is not JSON"),
        (b'{"title": "no text"}', 'no text under "text"'),
        (b'{"text": null}', 'no text under "text"'),
        (b'{"text": 7}', 'no text under "text"'),
        (b'["text"]', "line is no JSON object"),
        (b'"text"', "line is no JSON object"),
    ],
)
def test_a_broken_line_is_counted_by_its_reason_and_the_next_one_read(tmp_path, bad, reason):
    sample_data.write_lines(tmp_path / "a.jsonl", [line("first"), bad, line("third")])
    documents, tally = read(tmp_path / "a.jsonl")
    assert texts(documents) == ["first", "third"]
    assert tally.broken == {reason: 1}
    assert tally.examples[reason].startswith("a.jsonl, line 2")


@pytest.mark.parametrize("empty", ["", " \t ", "\n\n"])
def test_an_empty_text_is_left_out_and_not_broken(tmp_path, empty):
    sample_data.write_jsonl(tmp_path / "a.jsonl", ["first", empty, "third"])
    documents, tally = read(tmp_path / "a.jsonl")
    assert [d.record for d in documents] == [1, 3]
    assert (tally.skipped, tally.broken) == ({"empty text": 1}, {})


def test_blank_lines_are_no_records_but_count_as_lines(tmp_path):
    sample_data.write_lines(tmp_path / "a.jsonl", [line("first"), b"", b"  ", line("fourth")])
    documents, tally = read(tmp_path / "a.jsonl")
    assert [d.record for d in documents] == [1, 4]
    assert tally == Tally()


def test_a_last_line_without_a_newline_is_read(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(line("first") + b"\n" + line("second"))
    assert texts(read(tmp_path / "a.jsonl")[0]) == ["first", "second"]


def test_windows_newlines_are_read(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(line("first") + b"\r\n" + line("second") + b"\r\n")
    documents, tally = read(tmp_path / "a.jsonl")
    assert (texts(documents), tally) == (["first", "second"], Tally())


def test_a_byte_order_mark_does_not_cost_the_first_line(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + line("first") + b"\n" + line("second") + b"\n")
    assert texts(read(tmp_path / "a.jsonl")[0]) == ["first", "second"]


def test_the_text_field_can_be_named(tmp_path):
    sample_data.write_lines(tmp_path / "a.jsonl", [b'{"content": "mine", "text": "not mine"}'])
    assert texts(read(tmp_path / "a.jsonl", text_field="content")[0]) == ["mine"]


def test_lines_longer_than_a_chunk_are_read_whole(tmp_path):
    long = "wide " * 700_001
    sample_data.write_jsonl(tmp_path / "a.jsonl.zst", ["first", long, "third"])
    assert texts(read(tmp_path / "a.jsonl.zst")[0]) == ["first", long, "third"]


@pytest.mark.parametrize("ending", [".gz", ".zst"])
@pytest.mark.parametrize("share", [0.3, 0.7, 0.99])
def test_a_compressed_file_that_is_cut_off_is_counted_once(tmp_path, ending, share):
    path = tmp_path / f"a.jsonl{ending}"
    sample_data.write_jsonl(path, sample_data.texts(997, 0))
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    documents, tally = read(path)
    assert tally.broken["shard cut off or corrupt"] == tally.broken.total() == 1
    assert texts(documents) == sample_data.texts(997, 0)[: len(documents)]


def test_lines_before_the_cut_are_read(tmp_path):
    data = gzip.compress(line("first") + b"\n") + gzip.compress(line("second") + b"\n")[:-9]
    (tmp_path / "a.jsonl.gz").write_bytes(data)
    documents, tally = read(tmp_path / "a.jsonl.gz")
    assert texts(documents)[:1] == ["first"]
    assert tally.broken == {"shard cut off or corrupt": 1}


def test_a_file_that_is_not_compressed_at_all_is_counted(tmp_path):
    for name in ("a.jsonl.gz", "a.jsonl.zst"):
        (tmp_path / name).write_bytes(line("first") + b"\n")
        assert read(tmp_path / name)[1].broken == {"shard cut off or corrupt": 1}


def test_frames_of_zstd_follow_one_another(tmp_path):
    skippable = b"\x50\x2a\x4d\x18" + (5).to_bytes(4, "little") + b"index"
    first, second, third = (compress_zstd(line(text) + b"\n") for text in ("first", "second", "third"))
    data = first + skippable + second + third
    (tmp_path / "a.jsonl.zst").write_bytes(data)
    documents, tally = read(tmp_path / "a.jsonl.zst")
    assert (texts(documents), tally) == (["first", "second", "third"], Tally())


def test_members_of_gzip_follow_one_another(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(line("first") + b"\n") + gzip.compress(line("second") + b"\n"))
    assert texts(read(tmp_path / "a.jsonl.gz")[0]) == ["first", "second"]


def test_a_record_is_named_by_its_line(tmp_path):
    assert SOURCES["jsonl"].record_name(tmp_path / "a.jsonl", 7) == "line 7"


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst"])
def test_a_line_that_is_too_large_is_counted_and_its_neighbours_are_read(tmp_path, name, monkeypatch):
    monkeypatch.setattr("datamodules.sources.jsonl.MAX_RECORD", 5_000_000)
    sample_data.write_lines(
        tmp_path / name, [line("first"), b'"' + bytes(6_000_000), line("x" * 4_000_000), bytes(7_000_000)]
    )
    documents, tally = read(tmp_path / name)
    assert [len(text) for text in texts(documents)] == [5, 4_000_000]
    assert tally.broken == {TOO_LARGE: 2}


def test_a_bomb_costs_no_memory(tmp_path):
    # 4 GB of blanks, compressed to some 130 kB: one line, which is read piece by piece.
    with zstd.open(tmp_path / "a.jsonl.zst", "w") as file:
        for _ in range(4_000):
            file.write(bytes(1_000_000))
        file.write(b"\n" + line("last"))
    assert (tmp_path / "a.jsonl.zst").stat().st_size < 1_000_000
    script = (
        "import resource, sys; from pathlib import Path; from datamodules.sources.jsonl import lines; "
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; before = peak(); "
        "n = [line is None for line in lines(Path(sys.argv[1]))]; print(n, peak() - before)"
    )
    end = subprocess.run([sys.executable, "-c", script, str(tmp_path / "a.jsonl.zst")], text=True, capture_output=True)
    lengths, kilobytes = end.stdout.rsplit(" ", 1)
    assert lengths == "[True, False]", end.stderr
    assert int(kilobytes) < 300_000
