import io
import tarfile
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datamodules.sources.tar import BLOCK, WINDOW, Member, TarError, TarReader
from tests.datamodules import sample_data

quick = settings(deadline=None, max_examples=200)
FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
KINDS = (
    tarfile.REGTYPE,
    tarfile.AREGTYPE,
    tarfile.CONTTYPE,
    tarfile.DIRTYPE,
    tarfile.SYMTYPE,
    tarfile.LNKTYPE,
    tarfile.FIFOTYPE,
    tarfile.CHRTYPE,
)
names = st.text("abé漢 ./_-", min_size=1, max_size=300).map(lambda name: "x" + name.rstrip("/ "))
entries = st.lists(st.tuples(names, st.sampled_from(KINDS), st.binary(max_size=1100)), max_size=7)


def written(members, format_=tarfile.GNU_FORMAT):
    """The bytes of a tar of (name, kind, data)."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=format_) as tar:
        for name, kind, data in members:
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "../../etc/passwd" if kind in (tarfile.SYMTYPE, tarfile.LNKTYPE) else ""
            member.size = len(data) if member.isreg() else 0
            tar.addfile(member, io.BytesIO(data) if member.isreg() else None)
    return file.getvalue()


def plain(path):
    """What `tarfile` finds: the plain twin."""
    with tarfile.open(path, "r:") as tar:
        return [(m.name, m.offset, m.offset_data, m.size) for m in tar if m.isreg()]


def members_of(path):
    with TarReader(path) as tar:
        return list(tar.members())


def broken_at(path):
    """The members before a tar breaks off, and the error."""
    members = []
    with TarReader(path) as tar, pytest.raises(TarError) as error:
        members.extend(tar.members())
    return members, error.value


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    return tmp_path_factory.mktemp("tar") / "a.tar"


@quick
@given(entries, st.sampled_from(["gnu", "pax"]))
def test_members_are_those_that_tarfile_finds(archive, members, format_):
    archive.write_bytes(written(members, FORMATS[format_]))
    assert [tuple(member) for member in members_of(archive)] == plain(archive)


@quick
@given(entries, st.sampled_from(["gnu", "pax"]), st.data())
def test_a_cut_gives_the_members_before_it_and_an_error(archive, members, format_, data):
    complete = written(members, FORMATS[format_])
    archive.write_bytes(complete)
    all_members = members_of(archive)
    with tarfile.open(archive) as tar:
        tar.getmembers()
        end = tar.offset  # where the first block of zeros lies
    cut = data.draw(st.integers(0, end + BLOCK - 1))
    archive.write_bytes(complete[:cut])
    before, error = broken_at(archive)
    assert before == all_members[: len(before)]
    assert all(member.offset + member.size <= cut for member in before)
    assert error.at <= cut


@quick
@given(st.data())
def test_a_header_with_a_changed_byte_is_noticed(archive, data):
    complete = bytearray(written([("a.jpg", tarfile.REGTYPE, b"1" * 700), ("b.jpg", tarfile.REGTYPE, b"2" * 3)]))
    second = 3 * BLOCK
    at = data.draw(st.integers(0, BLOCK - 1).filter(lambda at: not 148 <= at < 156))  # the checksum may be padded otherwise
    complete[second + at] ^= data.draw(st.integers(1, 255))
    archive.write_bytes(complete)
    members, error = broken_at(archive)
    assert [member.name for member in members] == ["a.jpg"]
    assert error.at == second


@pytest.mark.parametrize("format_", ["gnu", "pax"])
def test_a_name_of_a_thousand_characters_is_read_from_its_first_header(archive, format_):
    name = "漢" * 331 + "/" + "x" * 668 + ".jpg"
    archive.write_bytes(written([("a.jpg", tarfile.REGTYPE, b"1"), (name, tarfile.REGTYPE, b"23")], FORMATS[format_]))
    long = members_of(archive)[1]
    assert long.name == name
    with TarReader(archive) as tar:
        assert next(tar.members(long.header)) == long
        assert tar.read(long.offset, long.size) == b"23"


def test_a_ustar_name_is_its_prefix_and_its_name(archive):
    name = "/".join(["folder"] * 20) + "/x.jpg"
    archive.write_bytes(written([(name, tarfile.REGTYPE, b"1")], tarfile.USTAR_FORMAT))
    assert [member.name for member in members_of(archive)] == [name]


@pytest.mark.parametrize("name", ["../../evil.jpg", "/abs/evil.jpg", "a/../../evil.jpg", "C:\\evil.jpg", "~/evil.jpg"])
def test_a_name_is_kept_as_the_label_that_it_is(archive, name):
    archive.write_bytes(written([(name, tarfile.REGTYPE, b"1")]))
    assert [member.name for member in members_of(archive)] == [name]


def test_sizes_beyond_eight_gigabytes_are_read_in_base_256_and_in_pax(tmp_path):
    size = 9 << 30
    for format_ in ("gnu", "pax"):
        member = tarfile.TarInfo("big.jpg")
        member.size = size
        with (tmp_path / "big.tar").open("wb") as file:
            head = member.tobuf(FORMATS[format_])
            file.write(head)
            file.truncate(len(head) + size + 2 * BLOCK)  # holes: nothing is on disk
        assert members_of(tmp_path / "big.tar") == [Member("big.jpg", 0, len(head), size)]


def test_data_longer_than_the_window_are_read_whole(archive):
    data = [bytes([n]) * (WINDOW * n // 2 + n) for n in range(1, 5)]
    archive.write_bytes(written([(f"{n}.jpg", tarfile.REGTYPE, d) for n, d in enumerate(data)]))
    with TarReader(archive) as tar:
        assert [tar.read(m.offset, m.size) for m in tar.members()] == data
        assert [tar.read(m.offset, m.size) for m in reversed(list(tar.members()))] == data[::-1]


def test_a_sparse_file_is_passed_over_with_its_map_and_its_data(archive):
    sparse = bytearray(tarfile.TarInfo("holes.jpg").tobuf(tarfile.GNU_FORMAT))
    sparse[156:157], sparse[124:136], sparse[482] = b"S", b"%011o\0" % 700, 1
    total = sum(sparse[:148]) + sum(sparse[156:]) + 8 * 32
    sparse[148:156] = b"%06o\0 " % total
    data = b"\0" * BLOCK + b"d" * 700 + b"\0" * (2 * BLOCK - 700)
    archive.write_bytes(bytes(sparse) + data + written([("a.jpg", tarfile.REGTYPE, b"1")]))
    assert [member.name for member in members_of(archive)] == ["a.jpg"]


def test_a_sparse_file_of_pax_is_passed_over(archive):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, headers in (("holes.jpg", {"GNU.sparse.major": "1"}), ("a.jpg", {"comment": "whole"})):
            member = tarfile.TarInfo(name)
            member.size, member.pax_headers = 3, headers
            tar.addfile(member, io.BytesIO(b"123"))
    archive.write_bytes(file.getvalue())
    assert [member.name for member in members_of(archive)] == ["a.jpg"]


@pytest.mark.parametrize("size", [b"-5", b"1_0", "٣".encode(), b"x"])
def test_a_size_that_is_no_number_is_an_error(archive, size):
    record = b"size=" + size + b"\n"
    length = len(record) + 3
    pax = b"%d %s" % (length, record)
    head = tarfile.TarInfo("x")
    head.type, head.size = b"x", len(pax)
    block = head.tobuf(tarfile.USTAR_FORMAT) + pax.ljust(BLOCK, b"\0")
    archive.write_bytes(block + written([("a.jpg", tarfile.REGTYPE, b"1")]))
    assert "size" in broken_at(archive)[1].detail


@pytest.mark.parametrize("data", [b"", b"no tar", b"\x1f\x8b" + b"gzip? " * 997, sample_data.jpeg(3) * 3])
def test_what_is_no_tar_is_an_error(archive, data):
    archive.write_bytes(data)
    members, _ = broken_at(archive)
    assert members == []


@settings(deadline=None, max_examples=300)
@given(st.binary(max_size=3 * BLOCK))
def test_random_bytes_raise_nothing_but_that_they_are_no_tar(archive, data):
    archive.write_bytes(data + written([("a.jpg", tarfile.REGTYPE, b"1")]))
    members = []
    with TarReader(archive) as tar, suppress(TarError):
        members.extend(tar.members())
    assert all(member.offset + member.size <= tar.size for member in members)
