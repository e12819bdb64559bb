"""The other members of a sample in a tar, found from one member's header without reading the archive from its start.

Behind that member, headers say where the next one is. Before it there is no such chain: writers that sort a sample's
members put KEY.json before KEY.png, so a bounded window is searched backwards for headers whose members end just where
the next one begins.
"""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from datamodules.sources.base import read_up_to

BLOCK = 512
"""Bytes of a tar header, and what members are padded to."""
MAX_MEMBERS = 32
"""Headers that are followed behind a member."""
WINDOW = 1 << 16
"""Bytes that are searched before a member."""


class Member(NamedTuple):
    """A file in a tar."""

    name: str
    offset: int
    """First byte of its data."""
    size: int


def siblings(path: Path, header: int, key_of: Callable[[str], str]) -> Iterator[Member]:
    """Yield the members that belong to the sample of the member whose header is at byte `header`, that one first.

    Args:
        path: an uncompressed tar.
        header: byte offset of a member's header.
        key_of: cuts a sample's key out of a member's name; neighbours with the same key are one sample.
    """
    at, key = header, None
    for _ in range(MAX_MEMBERS):
        member = _header(read_up_to(path, at, BLOCK))
        if member is None:
            break
        if member.isreg():
            found = key_of(member.name)
            if key not in (None, found):
                break
            key = found
            yield Member(member.name, at + BLOCK, member.size)
        at += _span(member)
    if key is not None:
        yield from _before(path, header, lambda name: key_of(name) == key)


def _before(path: Path, header: int, belongs: Callable[[str], bool]) -> Iterator[Member]:
    start = max(0, header - WINDOW)
    window = read_up_to(path, start, header - start)
    end = header
    for at in range(header - BLOCK, start - 1, -BLOCK):
        member = _header(window[at - start : at - start + BLOCK])
        if member is None or at + _span(member) != end:
            continue
        if member.isreg():
            if not belongs(member.name):
                return
            yield Member(member.name, at + BLOCK, member.size)
        end = at


def _header(block: bytes) -> tarfile.TarInfo | None:
    if block[257:262] != b"ustar":
        return None
    try:
        return tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError:  # a checksum that does not fit: data that looks like a header
        return None


def _span(member: tarfile.TarInfo) -> int:
    """Return the bytes from a member's header to the next one."""
    return BLOCK + -(-member.size // BLOCK) * BLOCK
