import hashlib
import json
import os
import tarfile

import pytest

from datamodules.document import ImageRef, Tally
from datamodules.sources import SOURCES, ReadOptions
from datamodules.sources.tar import TarReader
from tests.datamodules import sample_data

SOURCE = SOURCES["img2dataset"]
BEFORE, AFTER = sample_data.pairs(1, 3), sample_data.pairs(1, 5)


def read(path):
    tally = Tally()
    return list(SOURCE.documents(path, 7, ReadOptions(), tally, None)), tally


def between(path, *members):
    """Read a tar with the given members between two sound samples."""
    sample_data.write_tar(path, [*BEFORE, *members, *AFTER])
    documents, tally = read(path)
    names = [SOURCE.record_name(path, d.record) for d in documents]
    return names, tally


def test_a_pair_is_its_image_and_then_its_caption(tmp_path):
    sample_data.write_tar(tmp_path / "a.tar", sample_data.pairs(5, 0))
    documents, tally = read(tmp_path / "a.tar")
    assert [d.parts[1] for d in documents] == sample_data.sentences(5, 0)
    assert all(isinstance(d.parts[0], ImageRef) and d.parts[0].shard == 7 for d in documents)
    assert tally == Tally()


def test_an_images_place_is_that_of_its_original_bytes(tmp_path):
    sample_data.write_tar(tmp_path / "a.tar", sample_data.pairs(5, 0))
    refs = [d.parts[0] for d in read(tmp_path / "a.tar")[0]]
    digests = [hashlib.sha256(SOURCE.image_bytes(tmp_path / "a.tar", r.offset, r.length)).digest() for r in refs]
    originals = [d for n, d in sample_data.pairs(5, 0) if n.endswith(("jpg", "png"))]
    assert digests == [hashlib.sha256(d).digest() for d in originals]


def test_a_record_is_named_by_its_key(tmp_path):
    sample_data.write_tar(tmp_path / "a.tar", sample_data.pairs(3, 7))
    records = [d.record for d in read(tmp_path / "a.tar")[0]]
    assert [SOURCE.record_name(tmp_path / "a.tar", r) for r in records] == ["000000007", "000000008", "000000009"]


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ([("x.jpg", sample_data.jpeg(0))], "no caption"),
        ([("x.jpg", sample_data.jpeg(0)), ("x.json", b'{"caption": null}')], "no caption"),
        ([("x.jpg", sample_data.jpeg(0)), ("x.json", b'["caption"]')], "no caption"),
        ([("x.jpg", sample_data.jpeg(0)), ("x.json", b'{"caption')], "caption cannot be read"),
        ([("x.jpg", sample_data.jpeg(0)), ("x.txt", b"\xff\xfe")], "caption cannot be read"),
        ([("x.txt", b"alone")], "no image"),
        ([("x.heic", b"??"), ("x.txt", b"an image of another kind")], "no image"),
        ([("x.jpg", b"<html>not an image</html>"), ("x.txt", b"words")], "not an image"),
        ([("x.jpg", b""), ("x.txt", b"words")], "empty image"),
        ([("x.jpg", sample_data.jpeg(0)[:-100]), ("x.txt", b"words")], "image cannot be decoded"),
        ([("x.png", sample_data.png(0)[:-100]), ("x.txt", b"words")], "image cannot be decoded"),
        ([("x.png", sample_data.png(0, 211, 3)), ("x.txt", b"words")], "image too elongated"),
    ],
)
def test_a_broken_sample_is_counted_by_its_reason_and_the_next_one_read(tmp_path, members, reason):
    names, tally = between(tmp_path / "a.tar", *members)
    assert names == ["000000003", "000000005"]
    assert tally.broken == {reason: 1}
    assert tally.examples[reason].startswith("a.tar, x")


def test_an_empty_caption_is_left_out_and_not_broken(tmp_path):
    names, tally = between(tmp_path / "a.tar", ("x.jpg", sample_data.jpeg(0)), ("x.txt", b" \n"))
    assert names == ["000000003", "000000005"]
    assert (tally.skipped, tally.broken) == ({"empty caption": 1}, {})


def test_a_caption_may_stand_in_the_json_alone(tmp_path):
    sample_data.write_tar(
        tmp_path / "a.tar", [("x.jpg", sample_data.jpeg(0)), ("x.json", b'{"caption": "from\\n the JSON"}')]
    )
    assert [d.parts[1] for d in read(tmp_path / "a.tar")[0]] == ["from the JSON"]


def test_a_members_name_is_a_label_and_never_a_path(tmp_path):
    folder = tmp_path / "a" / "b"
    names, tally = between(folder / "a.tar", ("../../evil.jpg", sample_data.jpeg(0)), ("../../evil.txt", b"evil"))
    assert names == ["000000003", "../../evil", "000000005"]
    assert tally == Tally()
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["a.tar"]


def test_folders_in_a_tar_keep_equal_keys_apart(tmp_path):
    members = [(f"{f}/x.{e}", d) for f in ("a", "b") for e, d in (("jpg", sample_data.jpeg(0)), ("txt", b"words"))]
    sample_data.write_tar(tmp_path / "a.tar", members)
    documents, tally = read(tmp_path / "a.tar")
    assert [SOURCE.record_name(tmp_path / "a.tar", d.record) for d in documents] == ["a/x", "b/x"]
    assert tally == Tally()


def test_a_tar_that_is_cut_off_in_an_image_gives_the_samples_before(tmp_path):
    sample_data.write_tar(tmp_path / "a.tar", sample_data.pairs(5, 0))
    last = read(tmp_path / "a.tar")[0][-1]
    (tmp_path / "b.tar").write_bytes((tmp_path / "a.tar").read_bytes()[: last.record + 512 + 101])
    documents, tally = read(tmp_path / "b.tar")
    assert [d.parts[1] for d in documents] == sample_data.sentences(5, 0)[:4]
    assert tally.broken["shard cut off or corrupt"] == 1


def test_a_tar_that_merely_stops_is_noticed(tmp_path):
    sample_data.write_tar(tmp_path / "a.tar", sample_data.pairs(5, 0))
    last = read(tmp_path / "a.tar")[0][-1]
    (tmp_path / "b.tar").write_bytes((tmp_path / "a.tar").read_bytes()[: last.record])
    documents, tally = read(tmp_path / "b.tar")
    assert len(documents) == 4
    assert tally.broken == {"shard cut off or corrupt": 1}


def test_a_tar_with_a_damaged_header_gives_the_samples_before(tmp_path):
    sample_data.write_tar(tmp_path / "a.tar", sample_data.pairs(5, 0))
    middle = read(tmp_path / "a.tar")[0][2]
    data = bytearray((tmp_path / "a.tar").read_bytes())
    data[middle.record : middle.record + 512] = b"\xff" * 512
    (tmp_path / "b.tar").write_bytes(data)
    documents, tally = read(tmp_path / "b.tar")
    assert [d.parts[1] for d in documents] == sample_data.sentences(5, 0)[:2]
    assert tally.broken == {"shard cut off or corrupt": 1}


@pytest.mark.parametrize("data", [b"", b"no tar", b"\x1f\x8b" + b"gzip? " * 997])
def test_a_file_that_is_no_tar_is_counted(tmp_path, data):
    (tmp_path / "a.tar").write_bytes(data)
    documents, tally = read(tmp_path / "a.tar")
    assert documents == []
    assert tally.broken == {"shard cut off or corrupt": 1}


def test_what_is_no_file_in_a_tar_is_passed_over(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for kind in (tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE):
            member = tarfile.TarInfo("x.jpg")
            member.type, member.linkname = kind, "/etc/hostname"
            tar.addfile(member)
    assert read(tmp_path / "a.tar") == ([], Tally())


def test_pairs_are_not_split_between_rows():
    assert SOURCE.packing == "whole"


DEEP = "d" * 61 + "/" + "n" * 67 + "/"
"""A folder whose name alone is longer than a header's 100 bytes."""
URL = "https://images.example/7.jpg"


def write_as(path, format_, members):
    """Write a tar of a format; `tarfile` writes no V7, which is ustar without its magic and what comes behind."""
    sample_data.write_tar(path, members, format_=tarfile.USTAR_FORMAT if format_ == "v7" else format_)
    if format_ == "v7":
        data = bytearray(path.read_bytes())
        with TarReader(path) as tar:
            for member in tar.members():
                header = data[member.header : member.header + 257] + bytes(255)
                header[148:156] = b" " * 8
                header[148:156] = b"%06o\0 " % sum(header)
                data[member.header : member.header + 512] = header
        path.write_bytes(data)


@pytest.mark.parametrize("before", [True, False], ids=["before the image", "behind the image"])
@pytest.mark.parametrize("side", [67, 997], ids=["small image", "large image"])
@pytest.mark.parametrize(
    ("format_", "folder"),
    [
        (tarfile.USTAR_FORMAT, ""),
        (tarfile.GNU_FORMAT, ""),
        (tarfile.PAX_FORMAT, ""),
        ("v7", ""),
        (tarfile.GNU_FORMAT, DEEP),
        (tarfile.PAX_FORMAT, DEEP),
        (tarfile.USTAR_FORMAT, DEEP),
        (tarfile.PAX_FORMAT, "kätzchen/"),
    ],
    ids=["ustar", "gnu", "pax", "V7", "gnu long", "pax long", "ustar prefix", "pax umlaut"],
)
def test_labels_are_those_of_the_images_own_json(tmp_path, format_, folder, before, side):
    members = []
    for name in ("6", "ü7" if folder.startswith("k") else "7", "8"):
        own = [
            (f"{folder}{name}.json", json.dumps({"url": URL.replace("7", name[-1]), "key": name}).encode()),
            (f"{folder}{name}.png", sample_data.png(7, width=side)),
        ]
        members += [*own, (f"{folder}{name}.txt", b"words")] if before else [*own[::-1], (f"{folder}{name}.txt", b"words")]
    write_as(tmp_path / "a.tar", format_, members)
    documents, tally = read(tmp_path / "a.tar")
    identifiers = [SOURCE.identifiers(tmp_path / "a.tar", d.record) for d in documents]
    assert [label.urls for label in identifiers] == [(URL.replace("7", n),) for n in "678"]
    assert [label.key for label in identifiers] == [SOURCE.record_name(tmp_path / "a.tar", d.record) for d in documents]
    assert [label.key for label in identifiers] == [n.removesuffix(".png") for n, _ in members if n.endswith("png")]
    assert tally == Tally()


def test_a_json_of_another_sample_says_nothing_of_an_image(tmp_path):
    other = [("6.json", json.dumps({"url": URL}).encode()), ("7.jpg", sample_data.jpeg(0)), ("7.txt", b"words")]
    sample_data.write_tar(tmp_path / "a.tar", [*other, ("8.json", json.dumps({"url": URL}).encode())])
    assert [SOURCE.identifiers(tmp_path / "a.tar", d.record) for d in read(tmp_path / "a.tar")[0]] == [("7", (), ())]


def test_a_tar_within_a_member_is_no_part_of_the_archive(tmp_path):
    sample_data.write_tar(tmp_path / "inner.tar", [("7.json", json.dumps({"url": URL}).encode())])
    inner = (tmp_path / "inner.tar").read_bytes()[:1024]  # without its end: a chain of headers up to the image's
    sample_data.write_tar(
        tmp_path / "a.tar", [("6.bin", b"x" * 512 + inner), ("7.jpg", sample_data.jpeg(0)), ("7.txt", b"words")]
    )
    (document,) = read(tmp_path / "a.tar")[0]
    assert SOURCE.identifiers(tmp_path / "a.tar", document.record).urls == ()


def test_labels_of_a_shard_that_has_changed_are_refused(tmp_path):
    sample_data.write_tar(tmp_path / "a.tar", sample_data.pairs(3, 0))
    with pytest.raises(OSError, match="no file at byte 517; it has changed"):
        SOURCE.identifiers(tmp_path / "a.tar", 517)


def test_a_lookup_reads_a_small_part_of_a_tar(tmp_path, monkeypatch):
    sample_data.write_tar(tmp_path / "a.tar", sample_data.pairs(997, 0))
    documents = read(tmp_path / "a.tar")[0]
    n_read = []
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda *a: n_read.append(len(data := pread(*a))) or data)
    SOURCE.identifiers(tmp_path / "a.tar", documents[500].record)
    assert 0 < sum(n_read) < 1 << 17 < (tmp_path / "a.tar").stat().st_size / 5
