"""Which documents are for training and which for validation: a question about any of them, never a list of all."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from fnmatch import translate
from functools import cached_property, lru_cache
from typing import Literal

import numpy as np
import numpy.typing as npt

from datamodules.corpus import PLACE_BITS, IndexedCorpus
from datamodules.io.hashing import hash_key, hash_numbers
from datamodules.io.paths import matches
from kosmos_lit.errors import UserError

CHUNK = 1 << 16
"""Documents that are looked at together."""
IDENTITY = ("format", "tokenizer", "options", "documents", "tokens", "images")
"""What of an index's manifest decides its documents, beside the shards."""

Array = npt.NDArray[np.int64]
Part = Literal["train", "val"]


class Split:
    """Says which documents are for training and which for validation, without a list of them."""

    def __init__(self, corpus: IndexedCorpus, val_share: float, val_input: Sequence[str] | None) -> None:
        """Hold out the documents of the files that `val_input` names, or a share of all.

        Each document of a share is drawn by its number alone, so that neither seed nor mixture moves a document across,
        nor does a corpus that grows.

        Raises: UserError if `val_input` names none of the corpus's files.
        """
        self.corpus, self.val_share = corpus, val_share
        self._below = np.uint64(min(val_share * 2.0**64, 2.0**64 - 2048))
        self._held_out = None if val_input is None else _named_shards(corpus, val_input)

    @cached_property
    def key(self) -> str:
        """A hash of the corpus's documents and of which are held out, wherever the files lie."""
        manifest = self.corpus.manifest
        assert manifest is not None
        about = json.dumps([manifest[name] for name in IDENTITY], sort_keys=True)
        shards = "".join(f"{shard['path'].rpartition('/')[2]} {shard['bytes']}\n" for shard in manifest["shards"])
        held_out = self.val_share if self._held_out is None else np.packbits(self._held_out).tobytes().hex()
        return f"{hash_key(about, shards, str(held_out)):016x}"

    def share(self, part: Part) -> float:
        """Return the share of the corpus's documents that are of `part`, as asked for or as it is."""
        held_out = self.val_share
        if self._held_out is not None:
            held_out = sum(stop - first for first, stop in self._spans("val")) / max(1, self.corpus.n_documents)
        return held_out if part == "val" else 1 - held_out

    def documents(self, first: int, stop: int, part: Part) -> Array:
        """Return the numbers of the documents of `part` among [first, stop), ascending."""
        found = [np.zeros(0, dtype=np.int64)]
        for begin in range(first, stop, CHUNK):
            numbers = np.arange(begin, min(begin + CHUNK, stop))
            if self._held_out is None:
                is_val = hash_numbers(numbers, hash_key("validation")) < self._below
            else:
                records = self.corpus.records[begin : begin + len(numbers)]
                is_val = self._held_out[(records >> np.uint64(PLACE_BITS)).astype(np.int64)]
            found.append(numbers[is_val if part == "val" else ~is_val])
        return np.concatenate(found)

    def first(self, part: Part, most: int) -> Array:
        """Return the first documents of `part`, `most` at most, without a look at those behind them."""
        found = np.zeros(0, dtype=np.int64)
        for documents in self.chunks(part):
            found = np.append(found, documents)[:most]
            if len(found) == most:
                break
        return found

    def chunks(self, part: Part) -> Iterator[Array]:
        """Yield the numbers of the documents of `part`, ascending, some at a time, without a look at files without any."""
        for first, stop in self._spans(part):
            for begin in range(first, stop, CHUNK):
                yield self.documents(begin, min(begin + CHUNK, stop), part)

    def _spans(self, part: Part) -> list[tuple[int, int]]:
        """Return stretches of documents outside of which there is none of `part`."""
        if self._held_out is None:
            return [(0, self.corpus.n_documents)] if self.share(part) else []
        return [(first, stop) for first, stop, is_val in self._stretches if is_val == (part == "val")]

    @cached_property
    def _stretches(self) -> list[tuple[int, int, bool]]:
        """First document, end, and whether they are held out, of neighbouring files that either are or are not."""
        assert self._held_out is not None
        changes = np.flatnonzero(np.diff(self._held_out)) + 1
        firsts = np.array([0, *changes, len(self._held_out)], dtype=np.uint64)  # shards, in whose order documents lie
        documents = np.searchsorted(self.corpus.records, firsts << np.uint64(PLACE_BITS)).tolist()
        return list(zip(documents[:-1], documents[1:], self._held_out[firsts[:-1].astype(np.int64)].tolist(), strict=True))


def _named_shards(corpus: IndexedCorpus, val_input: Sequence[str]) -> npt.NDArray[np.bool_]:
    patterns = [translate(os.path.abspath(os.path.expanduser(pattern))) for pattern in val_input]
    fits = re.compile("|".join(patterns)).match
    named = {os.path.realpath(path) for path in matches(val_input)}
    paths = [os.path.abspath(path) for path in corpus.shards]

    def held_out(real: Callable[[str], str]) -> npt.NDArray[np.bool_]:
        return np.array([real(path) in named or fits(path) is not None for path in paths], dtype=np.bool_)

    folder = lru_cache(os.path.realpath)
    found = held_out(lambda path: os.path.join(folder(os.path.dirname(path)), os.path.basename(path)))
    if found.sum() < len(named):  # shards may be links: it takes 20 s to follow 200,000 of them
        found = held_out(os.path.realpath)
    if not found.any():
        raise UserError(f"{corpus.folder}: val_input {list(val_input)} names none of the files that were prepared")
    return found
