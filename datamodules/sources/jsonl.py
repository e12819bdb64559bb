"""Text as one JSON object a line: .jsonl, .jsonl.gz, .jsonl.zst (also .json and .ndjson, as some corpora call them)."""

from __future__ import annotations

import gzip
import json
import zlib
from abc import abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import zstandard

from datamodules.document import Document, Tally
from datamodules.sources.base import CUT_OFF, ReadOptions, Source

CHUNK = 1 << 20


class TruncatedError(OSError):
    """A compressed file that ends in the middle."""


class RecordError(ValueError):
    """A record that makes no document; `reason` is a short phrase for counting."""

    def __init__(self, reason: str, detail: str = "", *, is_bad: bool = True) -> None:
        super().__init__(detail)
        self.reason, self.is_bad = reason, is_bad


class JsonLines(Source):
    """A document per line; its record is the line's number, from 1."""

    def documents(
        self, path: Path, shard: int, options: ReadOptions, tally: Tally, images: npt.NDArray[np.void] | None
    ) -> Iterator[Document]:
        number = 0
        try:
            for number, line in enumerate(lines(path), start=1):
                if line.strip():
                    try:
                        yield self.read(_parsed(line, number), number, path.parent, shard, options)
                    except RecordError as error:
                        if error.is_bad:
                            tally.count_broken(error.reason, f"line {number}", str(error), file=path.name)
                        else:
                            tally.count_skipped(error.reason, f"{path.name}, line {number}")
        except (TruncatedError, OSError, EOFError, zlib.error, zstandard.ZstdError) as error:
            tally.count_broken(CUT_OFF, f"after line {number}", str(error), file=path.name)

    @abstractmethod
    def read(self, record: dict[str, Any], number: int, folder: Path, shard: int, options: ReadOptions) -> Document:
        """Return the document of line `number` of a file in `folder`.

        Raises: RecordError if the record makes none.
        """

    def record_name(self, path: Path, record: int) -> str:
        return f"line {record}"


class Jsonl(JsonLines):
    """A text per line."""

    format = "jsonl"
    kind = "text"
    packing = "split"

    def read(self, record: dict[str, Any], number: int, folder: Path, shard: int, options: ReadOptions) -> Document:
        text = record.get(options.text_field)
        if not isinstance(text, str):
            raise RecordError(f'no text under "{options.text_field}"')
        if not text.strip():
            raise RecordError("empty text", is_bad=False)
        return Document(number, (text.strip("\n"),))


def _parsed(line: bytes, number: int) -> dict[str, Any]:
    try:
        record = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
    except UnicodeDecodeError as error:
        raise RecordError("line is not UTF-8") from error
    except (ValueError, RecursionError) as error:
        hint = "a JSON array; `jq -c '.[]'` makes lines of it" if line.lstrip().startswith(b"[") else ""
        raise RecordError("line is not JSON", hint) from error
    if not isinstance(record, dict):
        raise RecordError("line is no JSON object")
    return record


def lines(path: Path) -> Iterator[bytes]:
    """Yield a file's lines, decompressed by the ending of its name.

    Raises: TruncatedError or the decompressor's error where the file breaks off, after all lines before it.
    """
    rest: list[bytes] = []
    for chunk in _chunks(path):
        head, *whole = chunk.split(b"\n")
        rest.append(head)
        if whole:
            yield b"".join(rest)
            yield from whole[:-1]
            rest = whole[-1:]
    if last := b"".join(rest):
        yield last


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
