"""Where the regular files of an uncompressed tar lie: headers in sequence, nothing unpacked.

Formats: V7, ustar, GNU (long names, sizes in base 256) and pax (`path`, `size`), with every header's checksum verified.
A member's name is a label, never a path to write to or read from. What is no regular file (folders, links, devices) and
sparse files, whose bytes do not lie in one piece, are passed over. A tar ends with a block of zeros: one that merely
stops is reported, which `tarfile` does not do.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

BLOCK = 512
"""Bytes of a header; data are padded to a multiple."""
WINDOW = 1 << 20
"""Bytes that are read at once, from front to back."""
NEARBY = 1 << 16
"""Bytes before a member that are searched for those before it."""
MAX_EXTENSION = 1 << 20
"""Most bytes of a long name or of pax records; longer ones are no names."""

_REGULAR, _WITHOUT_DATA = frozenset(b"0\x007"), frozenset(b"123456")
_LONG_NAME, _LONG_LINK, _SPARSE = b"LKS"
_PAX, _PAX_GLOBAL, _PAX_SOLARIS = b"xgX"


class TarError(ValueError):
    """An archive that breaks off, or is none; `at` is the byte offset where that shows."""

    def __init__(self, at: int, what: str) -> None:
        super().__init__(f"byte {at}: {what}")
        self.at, self.what = at, what


class Member(NamedTuple):
    """One regular file of a tar."""

    name: str
    """Bytes that are not UTF-8 are kept as lone surrogates."""
    header: int
    """Byte offset of its header, or of the first of its headers where a long name comes before it."""
    offset: int
    """Byte offset of its data."""
    size: int
    """Bytes of its data."""


class TarReader:
    """A tar, read in pieces of `window` bytes from the front; going back a little costs nothing."""

    def __init__(self, path: Path, window: int = WINDOW) -> None:
        """Raises: OSError if the file cannot be read."""
        self._most = window
        self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self.size = os.fstat(self._file).st_size
        self._start, self._window = 0, b""

    def __enter__(self) -> TarReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._file)

    def read(self, offset: int, length: int) -> bytes:
        """Return the bytes there; fewer only where the file ends."""
        at = offset - self._start
        if at < 0 or at + length > len(self._window):
            if length >= self._most:
                return self._pread(offset, length)
            self._start, self._window, at = offset, self._pread(offset, self._most), 0
        return self._window[at : at + length]

    def _pread(self, offset: int, length: int) -> bytes:
        pieces = []
        while length > 0 and (piece := os.pread(self._file, length, offset)):
            pieces.append(piece)
            offset, length = offset + len(piece), length - len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def members(self, start: int = 0) -> Iterator[Member]:
        """Yield the regular files from the header at byte `start` on.

        Raises: TarError where the archive breaks off, or is none, after the members before.
        """
        at, first = start, start
        name: str | None = None
        pax: dict[str, str] = {}
        everywhere: dict[str, str] = {}
        while True:
            header = self.read(at, BLOCK)
            if len(header) < BLOCK:
                raise TarError(min(at, self.size), "the file ends without an end-of-archive mark")
            if not header[0] and not any(header):
                if name is not None or pax:
                    raise TarError(at, "a long name without its member")
                return
            kind, size = _kind(header, at), _number(header[124:136], at)
            data, at = at + BLOCK, at + BLOCK
            if kind in (_LONG_NAME, _LONG_LINK, _PAX, _PAX_GLOBAL, _PAX_SOLARIS):
                extension = self._extension(data, size)
                at += _padded(size)
                if kind == _LONG_NAME:
                    name = _text(extension) if name is None else name  # of several the first counts
                elif kind == _PAX_GLOBAL:
                    everywhere |= _pax_records(extension, data)
                elif kind != _LONG_LINK:
                    pax = _pax_records(extension, data) | pax
                    name = pax.get("path") if name is None else name
                continue
            facts = everywhere | pax
            size = _pax_size(facts["size"], data) if "size" in facts else size
            name = facts.get("path", _name(header)) if name is None else name
            if kind == _SPARSE:
                at = self._behind_sparse_map(header, at)
            is_file = kind in _REGULAR and not (kind == 0 and name.endswith("/"))  # so V7 writes folders
            has_data = kind not in _WITHOUT_DATA and (is_file or kind not in _REGULAR)
            if has_data:
                if data + size > self.size:
                    raise TarError(data, f"{name[:200]} ends after {self.size - data} of {size} bytes")
                at += _padded(size)
            if is_file and not any(key.startswith("GNU.sparse.") for key in pax):
                yield Member(name, first, data, size)
            name, pax, first = None, {}, at

    def start_before(self, header: int) -> int:
        """Return the earliest byte nearby from which headers lead to the one at byte `header`; that itself if none does.

        Tars have no way back: a header is what looks like one and whose data end where a later header begins; one that
        lies in another one's data, as those of a tar in a tar do, does not count. Read `members` from there to be sure.
        """
        start = max(0, header - NEARBY)
        nearby = self.read(start, header - start)
        chain = [header]  # ascending
        for at in range(header - BLOCK, start - 1, -BLOCK):
            end = _end(nearby[at - start : at - start + BLOCK], at, chain)
            if end is not None:
                chain = [at, *chain[chain.index(end) :]]
        return chain[0]

    def _extension(self, offset: int, size: int) -> bytes:
        if size > MAX_EXTENSION:
            raise TarError(offset, f"a name of {size} bytes")
        data = self.read(offset, size)
        if len(data) < size:
            raise TarError(offset, f"a long name ends after {len(data)} of {size} bytes")
        return data

    def _behind_sparse_map(self, header: bytes, at: int) -> int:
        extended = header[482]
        while extended:
            block = self.read(at, BLOCK)
            if len(block) < BLOCK:
                raise TarError(at, "the map of a sparse file ends early")
            extended, at = block[504], at + BLOCK
        return at


def _kind(header: bytes, at: int) -> int:
    """Return a header's type flag.

    Raises: TarError if its checksum, of signed or unsigned bytes, is another one.
    """
    stored = _number(header[148:156], at)
    rest = header[:148] + header[156:]
    total = sum(rest) + 8 * ord(" ")
    if stored != total and stored != total - 256 * sum(byte > 127 for byte in rest):
        raise TarError(at, "no tar header: its checksum does not fit")
    return header[156]


def _number(field: bytes, at: int) -> int:
    """Read octal digits, or a big-endian number behind the byte 0x80."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    try:
        return int(field.partition(b"\0")[0].strip() or b"0", 8)
    except ValueError:
        raise TarError(at, f"no tar header: {field!r} is no number") from None


def _end(block: bytes, at: int, ends: Sequence[int]) -> int | None:
    """Return where the data of the header at byte `at` end, if it is one, and they end at one of `ends`."""
    try:
        end = at + BLOCK + (0 if block[156] in _WITHOUT_DATA else _padded(_number(block[124:136], at)))
        return end if end in ends and _kind(block, at) == block[156] else None  # the checksum takes longest
    except TarError:
        return None


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _text(data: bytes) -> str:
    return data.partition(b"\0")[0].decode("utf-8", "surrogateescape")


def _name(header: bytes) -> str:
    prefix = header[345:500] if header[345] and header[257:263] == b"ustar\0" else b""
    return f"{_text(prefix)}/{_text(header[:100])}" if prefix else _text(header[:100])


def _pax_size(value: str, at: int) -> int:
    if not (value.isascii() and value.isdigit()):
        raise TarError(at, f"pax says that a size is {value[:40]!r}")
    return int(value)


def _pax_records(data: bytes, at: int) -> dict[str, str]:
    """Read records of LENGTH, a space, KEY=VALUE and a newline, whose length counts all of the record."""
    records = {}
    while data and data[0]:
        length, _, _ = data.partition(b" ")
        if not length.isdigit() or not len(length) < int(length) <= len(data):
            raise TarError(at, "pax records without their lengths")
        key, _, value = data[len(length) + 1 : int(length) - 1].partition(b"=")
        records[key.decode("utf-8", "surrogateescape")] = value.decode("utf-8", "surrogateescape")
        data = data[int(length) :]
    return records
