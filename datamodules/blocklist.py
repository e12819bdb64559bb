"""Documents that must not be learnt, masked where rows are read: shards and indexes stay as they are.

A blocklist is text, plain, .gz or .zst, with one entry a line; blank lines and lines that begin with # are ignored:

    9f86d081884c7d659a2feaa0c55ad015...   64 hexadecimal digits: sha256 of an image's bytes
    098f6bcd4621d373cade4e832627b4f6      32 of them: md5
    https://site.example/cat.jpg          http:// or https://: URL of an image or a page, compared without its #fragment
    000001234                             anything else: a sample's key, as `rows` prints it
    00003.tar:000001234                   the same in shards of this file name only
    c.jsonl.zst:line 17                   a line of text, by its shard and number

A hash is compared with that of the image's bytes in the shard, and with the hashes of the download in img2dataset's
KEY.json; a URL with those of the page, of its images, and in KEY.json. One blocked image blocks its document.

A blocked document keeps its place: its text becomes <pad>, its images black, and none of its tokens is a target. So no
other document moves or changes, and a step's number of targets, by which the loss is divided, stays that of the row plan.

Entries are 64-bit hashes in memory, 8 bytes each. A lookup among n of them is a false match with a chance of n / 2^64:
among 10^7 entries, 10^9 lookups block one document too many with a chance of 5 in 10,000. No entry is ever missed.
"""

from __future__ import annotations

import hashlib
import re
from array import array
from collections.abc import Collection, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np

from datamodules.corpus import IndexedCorpus
from datamodules.io.compression import READ_ERRORS
from datamodules.io.hashing import U64, hash_bytes
from datamodules.io.paths import expand
from datamodules.sources.jsonl import lines
from datamodules.stream import Row
from kosmos_lit.errors import UserError
from kosmos_lit.tokenizer import IGNORE, PAD, SpecialTokens

REASON = "blocked"
"""A ledger's reason for a blocked document."""
# sha256 or md5 in hexadecimal digits.
DIGEST = re.compile(r"[0-9a-fA-F]{64}|[0-9a-fA-F]{32}")
AMBIGUOUS_KEY = re.compile(r"(line|row) \d+")
"""A key that every file of texts has."""

Kind = Literal["digest", "url", "key"]


class Blocklist:
    """Entries of some files. Forked processes share them in memory; an unpickled blocklist reads the files again."""

    def __init__(self, files: Sequence[Path]) -> None:
        """Take the files, which are read when the first document is looked up; `load` reads them at once."""
        self.files = list(files)

    @classmethod
    def load(cls, patterns: Sequence[str]) -> Blocklist:
        """Read the files that the patterns match.

        Raises: UserError naming the pattern that matches nothing, or the file and line that cannot be read.
        """
        blocklist = cls(expand(patterns, "data.blocklist"))
        _ = blocklist._entries  # mistakes in the files must show before training
        return blocklist

    def __len__(self) -> int:
        """Return the number of different entries."""
        return sum(map(len, self._entries.values()))

    def __getstate__(self) -> dict[str, object]:
        return {"files": self.files}

    @cached_property
    def _entries(self) -> dict[Kind, U64]:
        """Per kind the sorted hashes."""
        # array: 8 bytes an entry while files are read, where Python's integers take over 30.
        entries: dict[Kind, array[int]] = {"digest": array("Q"), "url": array("Q"), "key": array("Q")}
        for path in self.files:
            _read(path, entries)
        # np.unique also sorts, as searchsorted requires.
        return {kind: np.unique(np.frombuffer(hashes, dtype=np.uint64)) for kind, hashes in entries.items()}

    def _has(self, kind: Kind, name: str) -> bool:
        entries, entry = self._entries[kind], np.uint64(_hash_entry(kind, name))
        at = int(np.searchsorted(entries, entry))
        # searchsorted gives len(entries) for a hash above all of them.
        return at < len(entries) and bool(entries[at] == entry)

    def match(self, corpus: IndexedCorpus, document: int) -> str | None:
        """Return the entry that matches a document, as text to search the list for; None if none does.

        Reads no more than the list has entries of: without hashes no image, without keys and URLs no name.

        Raises: OSError if a shard is gone or has changed.
        """
        # The cheapest comparisons come first; the images' bytes are read last.
        images = corpus.document_images(document)
        digests: tuple[str, ...] = ()
        if len(self._entries["key"]) or len(self._entries["url"]) or (images and len(self._entries["digest"])):
            shard, identifiers = corpus.identifiers(document)
            digests = identifiers.digests
            for name in (identifiers.key, f"{shard.name}:{identifiers.key}"):
                if self._has("key", name):
                    return f"key {name}"
            for url in identifiers.urls:
                if self._has("url", url):
                    return f"URL {url}"
        if len(self._entries["url"]):
            for url in filter(None, map(corpus.image_url, images)):
                if self._has("url", url):
                    return f"image's URL {url}"
        if len(self._entries["digest"]):
            for digest in digests:
                if self._has("digest", digest):
                    return f"image's hash {digest}"
            for image in images:
                data = corpus.image_bytes(image)
                # usedforsecurity=False: a machine in FIPS mode refuses md5 otherwise.
                for digest in (hashlib.sha256(data).hexdigest(), hashlib.md5(data, usedforsecurity=False).hexdigest()):
                    if self._has("digest", digest):
                        return f"image's hash {digest}"
        return None

    def apply(self, row: Row, corpus: IndexedCorpus, special: SpecialTokens) -> tuple[Row, dict[int, str]]:
        """Return a row without the text of blocked documents, and the entry that blocks each, by its segment's index.

        The images of those documents stay in the row as references: the caller must not decode them.

        Raises: UserError if a shard that must be compared with the list cannot be read.
        """
        try:
            matches = {n: self.match(corpus, segment.document) for n, segment in enumerate(row.segments)}
        except OSError as error:
            # Not skipped: a blocked document might be learnt.
            raise UserError(f"row {row.number}: a document cannot be compared with the blocklist: {error}") from error
        blocked = {n: entry for n, entry in matches.items() if entry is not None}
        return mask_segments(row, blocked, special), blocked


def mask_segments(row: Row, segments: Collection[int], special: SpecialTokens) -> Row:
    """Return a row with <pad> instead of the text of some segments, and without their targets; slots stay.

    Args:
        row: a row as it is in the stream.
        segments: indexes into its segments.
        special: ids of images' marks.
    """
    if not segments:
        return row
    tokens, targets = row.tokens.copy(), row.targets.copy()
    for n in segments:
        place = slice(row.segments[n].position, row.segments[n].position + row.segments[n].length)
        # <image>, the slots, which repeat its id, and </image> stay: the batch's slots are checked against them.
        marks = (tokens[place] == special.image) | (tokens[place] == special.image_end)
        tokens[place] = np.where(marks, tokens[place], PAD)
        targets[place] = IGNORE
    return replace(row, tokens=tokens, targets=targets)


def _hash_entry(kind: Kind, name: str) -> int:
    match kind:
        case "digest":
            return int(name[:16], 16)  # a hash already: its first 64 bits
        case "url":
            name = name.strip().partition("#")[0]
    # surrogatepass: keys of tars may hold lone surrogates.
    return hash_bytes(name.encode("utf-8", "surrogatepass"))


def _read(path: Path, entries: dict[Kind, array[int]]) -> None:
    """Add a file's entries to `entries`.

    Raises: UserError naming the line.
    """
    number = 0  # for the message, if the file cannot be opened at all
    try:
        for number, line in enumerate(lines(path), start=1):
            if line is None:
                raise UserError(f"blocklist {path}, line {number}: it is too long; give one entry a line")
            entry = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()  # a byte order mark may come first
            if not entry or entry.startswith("#"):
                continue
            if entry.startswith(("http://", "https://")):
                kind: Kind = "url"
            elif len(entry) in (32, 64) and DIGEST.fullmatch(entry):
                kind = "digest"
            elif AMBIGUOUS_KEY.fullmatch(entry):
                raise UserError(
                    f"blocklist {path}, line {number}: every file has a {entry!r}; say of which shard, as in "
                    f"'some.jsonl.zst:{entry}'"
                )
            else:
                kind = "key"
            entries[kind].append(_hash_entry(kind, entry))
    except UnicodeDecodeError as error:
        raise UserError(
            f"blocklist {path}, line {number}: it is not UTF-8 ({error.reason}); give text, .gz or .zst, one entry a line"
        ) from error
    # Compressed files that end early or are damaged raise any of these.
    except READ_ERRORS as error:
        raise UserError(f"blocklist {path} cannot be read after line {number}: {error}") from error
