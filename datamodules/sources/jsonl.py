"""Text as one JSON object per line: .jsonl, .jsonl.gz, .jsonl.zst (and .json, .ndjson, as some corpora name them)."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from datamodules.document import Document, Tally
from datamodules.io.compression import MAX_RECORD, READ_ERRORS, open_compressed
from datamodules.sources.base import CUT_OFF, TOO_LARGE, ReadOptions, Source

CHUNK = 1 << 20


class RecordError(ValueError):
    """A record that yields no document; `reason` is a short phrase to count it under."""

    def __init__(self, reason: str, detail: str = "", *, is_broken: bool = True) -> None:
        super().__init__(detail)
        self.reason, self.is_broken = reason, is_broken


class JsonLines(Source):
    """One document per line; its record number is the line number, from 1."""

    def documents(
        self, path: Path, shard: int, options: ReadOptions, tally: Tally, images: npt.NDArray[np.void] | None
    ) -> Iterator[Document]:
        number = 0
        try:
            for number, line in enumerate(lines(path), start=1):
                if line is None:
                    tally.count_broken(TOO_LARGE, f"line {number}", file=path.name)
                elif line.strip():
                    try:
                        yield self.read(_parsed(line, number), number, path.parent, shard, options)
                    except RecordError as error:
                        if error.is_broken:
                            tally.count_broken(error.reason, f"line {number}", str(error), file=path.name)
                        else:
                            tally.count_skipped(error.reason, f"{path.name}, line {number}")
        except READ_ERRORS as error:
            tally.count_broken(CUT_OFF, f"after line {number}", str(error), file=path.name)

    @abstractmethod
    def read(self, record: dict[str, Any], number: int, folder: Path, shard: int, options: ReadOptions) -> Document:
        """Return the document of line `number` of a file in `folder`.

        Raises: RecordError if the record yields none.
        """

    def record_name(self, path: Path, record: int) -> str:
        return f"line {record}"


class Jsonl(JsonLines):
    """One text per line."""

    format = "jsonl"
    kind = "text"
    packing = "split"

    def read(self, record: dict[str, Any], number: int, folder: Path, shard: int, options: ReadOptions) -> Document:
        text = record.get(options.text_field)
        if not isinstance(text, str):
            raise RecordError(f'no text under "{options.text_field}"')
        if not text.strip():
            raise RecordError("empty text", is_broken=False)
        return Document(number, (text.strip("\n"),))


def _parsed(line: bytes, number: int) -> dict[str, Any]:
    try:
        record = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))  # Windows writes a mark in front
    except UnicodeDecodeError as error:
        raise RecordError("line is not UTF-8") from error
    except (ValueError, RecursionError) as error:
        hint = "a JSON array; `jq -c '.[]'` makes lines of it" if line.lstrip().startswith(b"[") else ""
        raise RecordError("line is not JSON", hint) from error
    if not isinstance(record, dict):
        raise RecordError("line is no JSON object")
    return record


def lines(path: Path) -> Iterator[bytes | None]:
    """Yield a file's lines, decompressed by the ending of its name; None for one of more than MAX_RECORD bytes.

    Raises: one of READ_ERRORS where the file breaks off, after all lines before it.
    """
    pending: list[bytes] = []  # the beginning of a line, joined once: adding to bytes would be quadratic in long lines
    size = 0
    with open_compressed(path) as file:
        while chunk := file.read1(CHUNK):  # type: ignore[attr-defined]
            first, *others = chunk.split(b"\n")
            size += len(first)
            if size <= MAX_RECORD:
                pending.append(first)
            if others:
                yield b"".join(pending) if size <= MAX_RECORD else None
                yield from others[:-1]
                pending, size = others[-1:], len(others[-1])
    if size:
        yield b"".join(pending) if size <= MAX_RECORD else None
