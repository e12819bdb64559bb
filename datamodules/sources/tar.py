"""The byte ranges of the regular files in an uncompressed tar; nothing is unpacked.

Formats: V7, ustar, GNU (long names, sizes in base 256) and pax (`path`, `size`), with every header's checksum verified.
A member's name is a label, never a path to write to or read from. Folders, links, devices and sparse files, whose bytes are
not contiguous, are skipped. A tar ends with a block of zeros: one that merely stops is reported, unlike by `tarfile`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

BLOCK = 512
"""Bytes of a header; data is padded to a multiple."""
WINDOW = 1 << 20
"""Bytes that are read at once, from front to back."""
NEARBY = 1 << 16
"""Bytes before a header that are searched for earlier headers."""
MAX_EXTENSION = 1 << 20
"""Most bytes of a long name or of pax records."""

_REGULAR, _WITHOUT_DATA = frozenset(b"0\x007"), frozenset(b"123456")
_LONG_NAME, _LONG_LINK, _SPARSE = b"LKS"
_PAX, _PAX_GLOBAL, _PAX_SOLARIS = b"xgX"


class TarError(ValueError):
    """A truncated archive, or none at all; `at` is the byte offset of the failure."""

    def __init__(self, at: int, detail: str) -> None:
        super().__init__(f"byte {at}: {detail}")
        self.at, self.detail = at, detail


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
    """A tar, read from the front in windows of `window` bytes; going back within a window costs nothing."""

    def __init__(self, path: Path, window: int = WINDOW) -> None:
        """Raises: OSError if the file cannot be read."""
        self._window_size = window
        self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self.size = os.fstat(self._file).st_size
        self._start, self._window = 0, b""

    def __enter__(self) -> TarReader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        os.close(self._file)

    def read(self, offset: int, length: int) -> bytes:
        """Return `length` bytes from `offset`; fewer only at the end of the file."""
        at = offset - self._start
        if at < 0 or at + length > len(self._window):
            if length >= self._window_size:
                return self._pread(offset, length)
            self._start, self._window, at = offset, self._pread(offset, self._window_size), 0
        return self._window[at : at + length]

    def _pread(self, offset: int, length: int) -> bytes:
        chunks = []
        while length > 0 and (chunk := os.pread(self._file, length, offset)):  # Linux reads at most 2 GiB in one call
            chunks.append(chunk)
            offset, length = offset + len(chunk), length - len(chunk)
        return chunks[0] if len(chunks) == 1 else b"".join(chunks)

    def members(self, start: int = 0) -> Iterator[Member]:
        """Yield the regular files from the header at byte `start` on.

        Raises: TarError where the archive breaks off, after the members before, or if it is none.
        """
        at, first = start, start
        name: str | None = None
        pax: dict[str, str] = {}
        global_pax: dict[str, str] = {}
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
                    name = _text(extension) if name is None else name  # the first of several counts
                elif kind == _PAX_GLOBAL:
                    global_pax |= _pax_records(extension, data)
                elif kind != _LONG_LINK:
                    pax = _pax_records(extension, data) | pax
                    name = pax.get("path") if name is None else name
                continue
            fields = global_pax | pax
            size = _pax_size(fields["size"], data) if "size" in fields else size
            name = fields.get("path", _name(header)) if name is None else name
            if kind == _SPARSE:
                at = self._skip_sparse_map(header, at)
            is_file = kind in _REGULAR and not (kind == 0 and name.endswith("/"))  # V7 marks folders so
            has_data = kind not in _WITHOUT_DATA and (is_file or kind not in _REGULAR)
            if has_data:
                if data + size > self.size:
                    raise TarError(data, f"{name[:200]} ends after {self.size - data} of {size} bytes")
                at += _padded(size)
            if is_file and not any(key.startswith("GNU.sparse.") for key in pax):
                yield Member(name, first, data, size)
            name, pax, first = None, {}, at

    def start_before(self, header: int) -> int:
        """Return the earliest byte nearby from which a chain of headers leads to byte `header`, or else `header`.

        A tar cannot be read backwards. A block counts as a header if it looks like one and its data ends where a later
        header begins; headers inside another member's data, as in a tar in a tar, do not count. The chain is a guess:
        reading `members` from its beginning verifies it.
        """
        start = max(0, header - NEARBY)
        before = self.read(start, header - start)
        chain = [header]  # ascending
        for at in range(header - BLOCK, start - 1, -BLOCK):
            end = _end(before[at - start : at - start + BLOCK], at, chain)
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

    def _skip_sparse_map(self, header: bytes, at: int) -> int:
        extended = header[482]
        while extended:
            block = self.read(at, BLOCK)
            if len(block) < BLOCK:
                raise TarError(at, "the map of a sparse file ends early")
            extended, at = block[504], at + BLOCK
        return at


def _kind(header: bytes, at: int) -> int:
    """Return a header's type flag.

    Raises: TarError if its checksum is wrong.
    """
    stored = _number(header[148:156], at)
    counted = header[:148] + header[156:]
    total = sum(counted) + 8 * ord(" ")  # the checksum's own field counts as blanks
    # Some old writers sum signed bytes.
    if stored != total and stored != total - 256 * sum(byte > 127 for byte in counted):
        raise TarError(at, "no tar header: its checksum does not fit")
    return header[156]


def _number(field: bytes, at: int) -> int:
    """Read octal digits, or a big-endian number after the byte 0x80."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    try:
        return int(field.partition(b"\0")[0].strip() or b"0", 8)
    except ValueError:
        raise TarError(at, f"no tar header: {field!r} is no number") from None


def _end(block: bytes, at: int, ends: Sequence[int]) -> int | None:
    """Return the end of the data of the header at byte `at`; None if it is no header or its end is not one of `ends`."""
    try:
        end = at + BLOCK + (0 if block[156] in _WITHOUT_DATA else _padded(_number(block[124:136], at)))
        return end if end in ends and _kind(block, at) == block[156] else None  # checked last: the checksum takes longest
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
        raise TarError(at, f"pax has the size {value[:40]!r}")
    return int(value)


def _pax_records(data: bytes, at: int) -> dict[str, str]:
    """Read records of the form `LENGTH KEY=VALUE` and a newline; the length counts the whole record."""
    records = {}
    while data and data[0]:
        length, _, _ = data.partition(b" ")
        if not length.isdigit() or not len(length) < int(length) <= len(data):
            raise TarError(at, "pax records without their lengths")
        key, _, value = data[len(length) + 1 : int(length) - 1].partition(b"=")
        records[key.decode("utf-8", "surrogateescape")] = value.decode("utf-8", "surrogateescape")
        data = data[int(length) :]
    return records
