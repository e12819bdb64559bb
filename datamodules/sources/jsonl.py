"""Text as one JSON object a line: .jsonl, .jsonl.gz, .jsonl.zst (also .json and .ndjson, as some corpora call them)."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import zstandard

from datamodules.document import Document, Tally
from datamodules.sources.base import ReadOptions, Source

CHUNK = 1 << 20


class TruncatedError(OSError):
    """A compressed file that ends in the middle."""


class Jsonl(Source):
    """A document per line; its record is the line's number, from 1."""

    format = "jsonl"
    packing = "split"

    def documents(
        self, path: Path, shard: int, options: ReadOptions, tally: Tally, pictures: npt.NDArray[np.void] | None
    ) -> Iterator[Document]:
        number = 0
        try:
            for number, line in enumerate(lines(path), start=1):
                if line.strip():
                    yield from self._document(line, number, path, options, tally)
        except (TruncatedError, OSError, EOFError, zlib.error, zstandard.ZstdError) as error:
            tally.miss("shard cut off or corrupt", f"{path.name}, after line {number}: {error}")

    def _document(
        self, line: bytes, number: int, path: Path, options: ReadOptions, tally: Tally
    ) -> Iterator[Document]:
        place = f"{path.name}, line {number}"
        try:
            record = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except UnicodeDecodeError:
            tally.miss("line is not UTF-8", place)
            return
        except (ValueError, RecursionError):
            tally.miss("line is not JSON", place)
            return
        text = record.get(options.text_field) if isinstance(record, dict) else None
        if not isinstance(text, str):
            tally.miss(f'no text under "{options.text_field}"', place)
        elif not text.strip():
            tally.leave("empty text", place)
        else:
            yield Document(number, (text.strip("\n"),))

    def record_name(self, path: Path, record: int) -> str:
        return f"line {record}"


def lines(path: Path) -> Iterator[bytes]:
    """Yield a file's lines, decompressed by the ending of its name.

    Raises: TruncatedError or the decompressor's error where the file breaks off, after all lines before it.
    """
    rest = b""
    for chunk in _chunks(path):
        *whole, rest = (rest + chunk).split(b"\n")
        yield from whole
    if rest:
        yield rest


def _chunks(path: Path) -> Iterator[bytes]:
    if path.suffix == ".gz":
        with gzip.open(path) as file:
            while chunk := file.read1(CHUNK):
                yield chunk
    elif path.suffix in (".zst", ".zstd"):
        yield from _zstd_chunks(path)
    else:
        with path.open("rb") as file:
            while chunk := file.read(CHUNK):
                yield chunk


def _zstd_chunks(path: Path) -> Iterator[bytes]:
    """Decompress frame after frame; unlike the library's stream reader, notice a frame that does not end."""
    with path.open("rb") as file:
        data = file.read(CHUNK)
        while data:
            frame = zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
            while not frame.eof:
                yield frame.decompress(data)
                data = frame.unused_data or file.read(CHUNK)
                if not data and not frame.eof:
                    raise TruncatedError("the last zstd frame is incomplete")
