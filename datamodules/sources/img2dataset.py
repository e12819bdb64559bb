"""Caption pairs as img2dataset writes them: WebDataset tars of KEY.jpg (or .png, .webp), KEY.txt, KEY.json.

Pictures stay where they are: the index remembers the byte range of each inside its tar.
"""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from datamodules.document import Document, ImageRef, Tally
from datamodules.sources.base import Labels, ReadOptions, Source, read_at
from datamodules.sources.siblings import siblings
from kosmos_lit.images import ImageError, probe

PICTURES = frozenset({"jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff"})
MAX_JSON = 1 << 20
"""Bytes of a KEY.json that is read for its URL."""
HEX = re.compile(r"(?:[0-9a-fA-F]{32}){1,2}")
BLOCK = 512
"""Bytes of a tar header; a member's data starts right behind its header."""

Sample = dict[str, tarfile.TarInfo]
"""The members of one key, by extension."""


class Img2Dataset(Source):
    """A document per sample: its picture, then its caption; its record is the byte offset of the picture's tar header."""

    format = "img2dataset"
    kind = "caption"

    def documents(
        self, path: Path, shard: int, options: ReadOptions, tally: Tally, pictures: npt.NDArray[np.void] | None
    ) -> Iterator[Document]:
        try:
            with tarfile.open(path, "r:") as tar:
                for key, sample in _samples(tar):
                    yield from self._document(tar, f"{path.name}, {key}", sample, shard, tally)
                if not _is_marked_end(path, tar.offset):
                    raise tarfile.ReadError(f"no end-of-archive mark at byte {tar.offset}")
        except (tarfile.TarError, OSError, EOFError) as error:
            tally.miss("shard cut off or corrupt", f"{path.name}: {error}")

    def _document(
        self, tar: tarfile.TarFile, place: str, sample: Sample, shard: int, tally: Tally
    ) -> Iterator[Document]:
        picture = next((sample[e] for e in sample if e in PICTURES), None)
        if picture is None:
            tally.miss("no picture", place)
            return
        try:
            caption = _caption(tar, sample)
        except (ValueError, RecursionError) as error:
            tally.miss("caption cannot be read", f"{place}: {error}")
            return
        if caption is None:
            tally.miss("no caption", place)
            return
        if not caption:
            tally.leave("empty caption", place)
            return
        try:
            probe(_read(tar, picture))
        except ImageError as error:
            tally.miss(error.reason, f"{place}: {error}")
            return
        ref = ImageRef(shard, picture.offset_data, picture.size)
        yield Document(picture.offset_data - BLOCK, (ref, caption))

    def record_name(self, path: Path, record: int) -> str:
        header = read_at(path, record, BLOCK)
        return _key(tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape").name)[0]

    def labels(self, path: Path, record: int) -> Labels:
        """Return the key, and URL and hash out of KEY.json; one that cannot be read says nothing."""
        for name, offset, size in siblings(path, record, lambda name: _key(name)[0]):
            key, extension = _key(name)
            if extension == "json" and size <= MAX_JSON:
                return Labels(key, *_origin(read_at(path, offset, size)))
        return super().labels(path, record)


def _samples(tar: tarfile.TarFile) -> Iterator[tuple[str, Sample]]:
    """Group neighbouring members by key. A member's name is a label only, never a path to write to or read from.

    Raises: tarfile.TarError where the archive breaks off, after the samples before it.
    """
    current, sample = "", Sample()
    broken: tarfile.TarError | None = None
    while True:
        try:
            member = tar.next()
        except tarfile.TarError as error:
            member, broken = None, error
        if member is None:
            break
        tar.members.clear()  # type: ignore[attr-defined]  # else tarfile keeps every header of the shard
        if not member.isreg():
            continue
        key, extension = _key(member.name)
        if key != current or extension in sample:
            if sample:
                yield current, sample
            current, sample = key, Sample()
        sample[extension] = member
    if sample:
        yield current, sample
    if broken is not None:
        raise broken


def _key(name: str) -> tuple[str, str]:
    """Split at the first dot behind the last slash, as WebDataset does."""
    folder, _, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return (f"{folder}/{stem}" if folder else stem), extension.lower()


def _read(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    data = file.read() if file else b""
    if len(data) != member.size:
        raise tarfile.ReadError(f"{member.name} ends after {len(data)} of {member.size} bytes")
    return data


def _caption(tar: tarfile.TarFile, sample: Sample) -> str | None:
    if "txt" in sample:
        return " ".join(_read(tar, sample["txt"]).decode("utf-8").split())
    if "json" in sample:
        fields = json.loads(_read(tar, sample["json"]))
        caption = fields.get("caption") if isinstance(fields, dict) else None
        return " ".join(caption.split()) if isinstance(caption, str) else None
    return None


def _origin(data: bytes) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the URLs and the hashes of a picture that a KEY.json names."""
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError):
        return (), ()
    if not isinstance(fields, dict):
        return (), ()
    url = fields.get("url")
    hashes = [fields[name] for name in ("sha256", "md5") if isinstance(fields.get(name), str)]
    return (url,) if isinstance(url, str) else (), tuple(h for h in hashes if HEX.fullmatch(h))


def _is_marked_end(path: Path, at: int) -> bool:
    """Tell whether a zero block ends the archive: tarfile itself takes a file that merely stops for a whole one."""
    return not any(read_at(path, at, BLOCK))
