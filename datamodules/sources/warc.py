"""Interleaved documents from web crawls: .warc and .warc.gz files with pages and their images.

A first pass over all shards lists the images (`list_images`), a second one reads the pages: a page's images may lie in
another shard. Images are not copied: the index holds the byte ranges of their records.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from warcio.archiveiterator import ArchiveIterator
from warcio.exceptions import ArchiveLoadFailed

from datamodules.document import Document, ImageRef, Tally
from datamodules.io.compression import MAX_RECORD
from datamodules.sources.base import (
    CUT_OFF,
    IMAGE_STATUSES,
    LISTED_IMAGE,
    TOO_LARGE,
    Identifiers,
    ReadOptions,
    Source,
    read_at,
)
from datamodules.sources.pages import Link, PageError, document_parts, extract, url_hash
from kosmos_lit.images import ImageError, open_rgb

READ_ERRORS = (ArchiveLoadFailed, OSError, EOFError, zlib.error, ValueError, AttributeError)
"""warcio raises AttributeError if a record's header is cut off."""


class Response(NamedTuple):
    """One successful HTTP response of a crawl."""

    url: str
    mime: str
    charset: str | None
    body: bytes
    offset: int
    length: int


class Warc(Source):
    """One document per page; its record number is the byte offset of the page's WARC record."""

    format = "warc"
    kind = "interleaved"
    needs_image_list = True

    def list_images(self, path: Path, shard: int, options: ReadOptions, tally: Tally) -> npt.NDArray[np.void]:
        rows = []
        for response in _responses(path, "image/", tally):
            status = IMAGE_STATUSES.index(_image_status(response, options, tally))
            rows.append((url_hash(response.url), response.offset, shard, response.length, status))
        return np.array(rows, dtype=LISTED_IMAGE)

    def documents(
        self, path: Path, shard: int, options: ReadOptions, tally: Tally, images: npt.NDArray[np.void] | None
    ) -> Iterator[Document]:
        assert images is not None

        def find(url: str) -> ImageRef | str:
            key = np.uint64(url_hash(url))
            at = int(np.searchsorted(images["url"], key))
            if at == len(images) or images["url"][at] != key:
                return "dead link: image not in the crawl"
            image = images[at]
            if image["status"]:
                return IMAGE_STATUSES[image["status"]]
            return ImageRef(int(image["shard"]), int(image["offset"]), int(image["length"]))

        for response, page in _pages(path, tally):
            parts = document_parts(page, response.url, find, options, tally)
            if parts is not None:
                yield Document(response.offset, parts)

    def texts(self, path: Path, options: ReadOptions, tally: Tally) -> Iterator[str]:
        for _, page in _pages(path, tally):
            yield from (text for text in page if isinstance(text, str))

    def record_name(self, path: Path, record: int) -> str:
        with path.open("rb") as file:
            file.seek(record)
            return str(next(iter(ArchiveIterator(file))).rec_headers.get_header("WARC-Target-URI"))

    def identifiers(self, path: Path, record: int) -> Identifiers:
        url = self.record_name(path, record)
        return Identifiers(url, (url,))

    def image_bytes(self, path: Path, offset: int, length: int) -> bytes:
        return _read(path, offset, length)[1]

    def image_url(self, path: Path, offset: int, length: int) -> str | None:
        return _read(path, offset, length)[0]


def _read(path: Path, offset: int, length: int) -> tuple[str, bytes]:
    """Return a record's URL and payload."""
    try:
        record = next(iter(ArchiveIterator(io.BytesIO(read_at(path, offset, length)))))
        return str(record.rec_headers.get_header("WARC-Target-URI")), _body(record)
    except (ArchiveLoadFailed, StopIteration, zlib.error) as error:
        raise OSError(f"{path}: no WARC record at byte {offset}; it has changed since it was prepared") from error


def _pages(path: Path, tally: Tally) -> Iterator[tuple[Response, list[str | Link]]]:
    for response in _responses(path, "text/html", tally):
        try:
            yield response, extract(response.body, response.url, response.charset)
        except PageError as error:
            tally.count_broken(str(error), response.url)


def _responses(path: Path, mime_prefix: str, tally: Tally) -> Iterator[Response]:
    """Yield the successful responses of one media type; a truncated record counts as broken and ends the shard."""
    with path.open("rb") as file:
        archive = ArchiveIterator(file)
        try:
            for record in archive:
                if record.length is None:
                    raise EOFError("a record without a complete header")
                if record.rec_type != "response" or record.http_headers is None:
                    _skip(archive, record)
                    continue
                mime, _, parameters = (record.http_headers.get_header("Content-Type") or "").lower().partition(";")
                mime = "text/html" if mime.strip() == "application/xhtml+xml" else mime.strip()
                if not mime.startswith(mime_prefix) or record.http_headers.get_statuscode() != "200":
                    _skip(archive, record)
                    continue
                body = _body(record)
                if len(body) > MAX_RECORD:
                    tally.count_broken(TOO_LARGE, str(record.rec_headers.get_header("WARC-Target-URI")), file=path.name)
                    _skip(archive, record)
                    continue
                url = str(record.rec_headers.get_header("WARC-Target-URI"))
                offset, length = archive.get_record_offset(), archive.get_record_length()
                yield Response(url, mime, _charset(parameters), body, offset, length)
            if archive.offset != path.stat().st_size:
                raise EOFError("the file ends in the middle of a record")
        except READ_ERRORS as error:
            tally.count_broken(CUT_OFF, f"after byte {archive.offset}", str(error), file=path.name)


def _body(record: Any) -> bytes:
    """Return the payload, with transfer and content encodings undone; of a larger one one byte more than MAX_RECORD.

    Raises: EOFError if the record is shorter than its header says.
    """
    stream, body = record.content_stream(), b""
    while len(body) <= MAX_RECORD and (data := stream.read(MAX_RECORD + 1 - len(body))):
        body += data
    if len(body) > MAX_RECORD:
        return body
    missing = getattr(record.raw_stream, "limit", 0)  # bytes that warcio still expects
    if missing > 0:
        raise EOFError(f"the record lacks its last {missing} bytes")
    return body


def _skip(archive: Any, record: Any) -> None:
    """Read past a record.

    Raises: EOFError if it is shorter than its header says.
    """
    archive.read_to_end()
    if (missing := getattr(record.raw_stream, "limit", 0)) > 0:
        raise EOFError(f"the record lacks its last {missing} bytes")


def _charset(parameters: str) -> str | None:
    for parameter in parameters.split(";"):
        name, _, value = parameter.strip().partition("=")
        if name == "charset":
            return value.strip("\"' ") or None
    return None


def _image_status(response: Response, options: ReadOptions, tally: Tally) -> str:
    """Return one of `IMAGE_STATUSES` for an image, and count it."""
    # Pillow does not read vector images: they are skipped, not broken.
    if "svg" in response.mime:
        status = "not a raster image"
    else:
        try:
            image = open_rgb(response.body)
        except ImageError as error:
            tally.count_broken(error.reason, response.url, str(error))
            return "broken image"
        if min(image.size) < options.min_image_side:
            status = "image too small"
        elif all(low == high for low, high in image.getextrema()):  # type: ignore[misc]
            status = "image of one colour"
        else:
            tally.documents += 1
            return "usable"
    tally.count_skipped(status, response.url)
    return status
