"""Caption pairs as img2dataset writes them: WebDataset tars of KEY.jpg (or .png, .webp), KEY.txt, KEY.json.

Images are not copied: the index holds the byte range of each inside its tar.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import numpy.typing as npt

from datamodules.document import Document, ImageRef, Tally
from datamodules.io.compression import MAX_RECORD
from datamodules.sources.base import CUT_OFF, TOO_LARGE, Identifiers, ReadOptions, Source
from datamodules.sources.tar import Member, TarError, TarReader
from kosmos_lit.images import ImageError, probe

IMAGES = frozenset({"jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff"})
LOOKUP_WINDOW = 1 << 13
"""Bytes that are read at once to look up one sample: a few headers and a KEY.json."""
MAX_JSON = 1 << 20
"""Most bytes of a KEY.json; a larger one is not read for its URL."""
HEX = re.compile(r"(?:[0-9a-fA-F]{32}){1,2}")

Sample = dict[str, Member]
"""The members of one key, by extension."""


class Img2Dataset(Source):
    """One document per sample: its image, then its caption; its record number is the byte offset of the image's header."""

    format = "img2dataset"
    kind = "caption"

    def documents(
        self, path: Path, shard: int, options: ReadOptions, tally: Tally, images: npt.NDArray[np.void] | None
    ) -> Iterator[Document]:
        try:
            with TarReader(path) as tar:
                for key, sample, is_complete in _samples(tar):
                    # The last sample of a truncated tar may lack members: the truncation is counted, not the sample.
                    document = _document(tar, path.name, key, sample, shard, tally if is_complete else Tally())
                    if document is not None:
                        yield document
        except TarError as error:
            tally.count_broken(CUT_OFF, f"byte {error.at}", error.detail, file=path.name)
        except OSError as error:
            tally.count_broken(CUT_OFF, "", str(error), file=path.name)

    def record_name(self, path: Path, record: int) -> str:
        with TarReader(path, LOOKUP_WINDOW) as tar:
            return _sample_from(tar, path, record)[0]

    def identifiers(self, path: Path, record: int) -> Identifiers:
        """Return the key, and the URL and hashes in KEY.json if it can be read."""
        with TarReader(path, LOOKUP_WINDOW) as tar:
            key, sample = _sample_from(tar, path, record)
            if "json" not in sample:  # writers that sort members put KEY.json before KEY.png
                sample = _sample_around(tar, record)
            if "json" not in sample or sample["json"].size > MAX_JSON:
                return Identifiers(key)
            return Identifiers(key, *_origin(tar.read(sample["json"].offset, sample["json"].size)))


def _sample_from(tar: TarReader, path: Path, record: int) -> tuple[str, Sample]:
    """Return the key and the members of a sample, from its image on.

    Raises: OSError if there is no member at its image's header.
    """
    try:
        key, sample, _ = next(_samples(tar, record))
        return key, sample
    except (TarError, StopIteration) as error:
        raise OSError(f"{path}: no file at byte {record}; it has changed since it was prepared") from error


def _sample_around(tar: TarReader, record: int) -> Sample:
    """Return the members, also before its image, of the sample whose image's header is at byte `record`."""
    with suppress(TarError):  # bytes that look like headers may be none
        for _, sample, _ in _samples(tar, tar.start_before(record)):
            headers = [member.header for member in sample.values()]
            if record in headers:
                return sample
            if headers[0] > record:
                break
    return {}


def _document(tar: TarReader, file: str, key: str, sample: Sample, shard: int, tally: Tally) -> Document | None:
    image = next((sample[e] for e in sample if e in IMAGES), None)
    if image is None:
        tally.count_broken("no image", key, file=file)
        return None
    try:
        caption = _caption(tar, sample)
    except (ValueError, RecursionError) as error:
        tally.count_broken("caption cannot be read", key, str(error), file=file)
        return None
    if caption is None:
        tally.count_broken("no caption", key, file=file)
        return None
    if not caption:
        tally.count_skipped("empty caption", f"{file}, {key}")
        return None
    if image.size > MAX_RECORD:
        tally.count_broken(TOO_LARGE, key, file=file)
        return None
    try:
        probe(tar.read(image.offset, image.size))
    except ImageError as error:
        tally.count_broken(error.reason, key, str(error), file=file)
        return None
    return Document(image.header, (ImageRef(shard, image.offset, image.size), caption))


def _samples(tar: TarReader, start: int = 0) -> Iterator[tuple[str, Sample, bool]]:
    """Group neighbouring members by key, from the header at byte `start` on.

    Yields: the key, the sample, and whether it is complete: False for the last one of a truncated archive.

    Raises: TarError where the archive breaks off, after the samples before it.
    """
    current, sample = "", Sample()
    members = tar.members(start)
    while True:
        try:
            member = next(members, None)
        except TarError:
            if sample:
                yield current, sample, False
            raise
        if member is None:
            break
        key, extension = _key(member.name)
        if key != current or extension in sample:
            if sample:
                yield current, sample, True
            current, sample = key, Sample()
        sample[extension] = member
    if sample:
        yield current, sample, True


def _key(name: str) -> tuple[str, str]:
    """Split a name at the first dot after the last slash, as WebDataset does."""
    folder, _, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return (f"{folder}/{stem}" if folder else stem), extension.lower()


def _caption(tar: TarReader, sample: Sample) -> str | None:
    if "txt" in sample:
        return " ".join(tar.read(sample["txt"].offset, sample["txt"].size).decode("utf-8").split())
    if "json" in sample:
        fields = json.loads(tar.read(sample["json"].offset, sample["json"].size))
        caption = fields.get("caption") if isinstance(fields, dict) else None
        return " ".join(caption.split()) if isinstance(caption, str) else None
    return None


def _origin(data: bytes) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the URLs and hashes of an image in a KEY.json."""
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError):
        return (), ()
    if not isinstance(fields, dict):
        return (), ()
    url = fields.get("url")
    hashes = [fields[name] for name in ("sha256", "md5") if isinstance(fields.get(name), str)]
    return (url,) if isinstance(url, str) else (), tuple(h for h in hashes if HEX.fullmatch(h))
