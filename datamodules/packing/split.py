"""Which documents are for training and which for validation: a test of any document, never a list of all."""

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
"""Documents that are tested together."""
IDENTITY = ("format", "tokenizer", "options", "documents", "tokens", "images")
"""Fields of an index's manifest that decide its documents, beside the shards."""

Array = npt.NDArray[np.int64]
Part = Literal["train", "val"]


class Split:
    """The split of a corpus into training and validation documents, without a list of them."""

    def __init__(self, corpus: IndexedCorpus, val_share: float, val_input: Sequence[str] | None) -> None:
        """Hold out the documents of the files that `val_input` names, or a share of all.

        A share is drawn by document number alone, so that no document changes sides with the seed, the mixture, or as
        the corpus grows.

        Raises: UserError if `val_input` names none of the corpus's files.
        """
        self.corpus, self.val_share = corpus, val_share
        # The largest float below 2 ** 64: a share of just under 1 must not overflow.
        self._below = np.uint64(min(val_share * 2.0**64, 2.0**64 - 2048))
        self._held_out = None if val_input is None else _named_shards(corpus, val_input)

    @cached_property
    def key(self) -> str:
        """A hash of the corpus's documents and of which are held out; it does not depend on where the files lie."""
        manifest = self.corpus.manifest
        assert manifest is not None
        identity = json.dumps([manifest[name] for name in IDENTITY], sort_keys=True)
        # Names without folders: corpora may move.
        shards = "".join(f"{shard['path'].rpartition('/')[2]} {shard['bytes']}\n" for shard in manifest["shards"])
        # As bits, 8 shards a byte.
        held_out = self.val_share if self._held_out is None else np.packbits(self._held_out).tobytes().hex()
        return f"{hash_key(identity, shards, str(held_out)):016x}"

    def share(self, part: Part) -> float:
        """Return the share of the documents that are of `part`: the configured one, or that of the files held out."""
        held_out = self.val_share
        if self._held_out is not None:
            held_out = sum(stop - first for first, stop in self._spans("val")) / max(1, self.corpus.n_documents)
        return held_out if part == "val" else 1 - held_out

    def documents(self, first: int, stop: int, part: Part) -> Array:
        """Return the numbers of the documents of `part` among [first, stop), ascending."""
        chunks = [np.zeros(0, dtype=np.int64)]
        for begin in range(first, stop, CHUNK):
            numbers = np.arange(begin, min(begin + CHUNK, stop))
            if self._held_out is None:
                # Hashes are uniform below 2 ** 64.
                is_val = hash_numbers(numbers, hash_key("validation")) < self._below
            else:
                records = self.corpus.records[begin : begin + len(numbers)]
                # By the shard, the high bits of a record's place.
                is_val = self._held_out[(records >> np.uint64(PLACE_BITS)).astype(np.int64)]
            chunks.append(numbers[is_val if part == "val" else ~is_val])
        return np.concatenate(chunks)

    def first(self, part: Part, n: int) -> Array:
        """Return the first documents of `part`, at most `n`, without testing those behind them."""
        first = np.zeros(0, dtype=np.int64)
        for documents in self.chunks(part):
            first = np.append(first, documents)[:n]
            if len(first) == n:
                break
        return first

    def chunks(self, part: Part) -> Iterator[Array]:
        """Yield the numbers of the documents of `part`, ascending, in chunks; files without any are not tested."""
        for first, stop in self._spans(part):
            for begin in range(first, stop, CHUNK):
                yield self.documents(begin, min(begin + CHUNK, stop), part)

    def _spans(self, part: Part) -> list[tuple[int, int]]:
        """Return spans of documents [first, stop) outside of which there is none of `part`."""
        if self._held_out is None:
            return [(0, self.corpus.n_documents)] if self.share(part) else []
        return [(first, stop) for first, stop, is_val in self._shard_spans if is_val == (part == "val")]

    @cached_property
    def _shard_spans(self) -> list[tuple[int, int, bool]]:
        """(first document, end, whether held out) of each run of neighbouring files on the same side of the split."""
        assert self._held_out is not None
        changes = np.flatnonzero(np.diff(self._held_out)) + 1  # np.diff of booleans is their inequality
        firsts = np.array([0, *changes, len(self._held_out)], dtype=np.uint64)  # shards, in whose order documents lie
        # Records ascend: each shard's first document is where its place 0 would be.
        documents = np.searchsorted(self.corpus.records, firsts << np.uint64(PLACE_BITS)).tolist()
        return list(zip(documents[:-1], documents[1:], self._held_out[firsts[:-1].astype(np.int64)].tolist(), strict=True))


def _named_shards(corpus: IndexedCorpus, val_input: Sequence[str]) -> npt.NDArray[np.bool_]:
    # Text may be used without its files: then the patterns match the paths that the index stores.
    patterns = [translate(os.path.abspath(os.path.expanduser(pattern))) for pattern in val_input]
    fits = re.compile("|".join(patterns)).match
    # Files that exist are compared without regard to links.
    named = {os.path.realpath(path) for path in matches(val_input)}
    paths = [os.path.abspath(path) for path in corpus.shards]

    def held_out(real: Callable[[str], str]) -> npt.NDArray[np.bool_]:
        return np.array([real(path) in named or fits(path) is not None for path in paths], dtype=np.bool_)

    # Shards share few folders, so that resolving those alone is fast.
    folder = lru_cache(os.path.realpath)
    is_held_out = held_out(lambda path: os.path.join(folder(os.path.dirname(path)), os.path.basename(path)))
    if is_held_out.sum() < len(named):  # shards may be links themselves, and following 200,000 of them takes 20 s
        is_held_out = held_out(os.path.realpath)
    if not is_held_out.any():
        raise UserError(f"{corpus.folder}: val_input {list(val_input)} names none of the files that were prepared")
    return is_held_out
