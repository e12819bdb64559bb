"""What is known of each block of a plan: computed once, in processes, and kept beside the index.

    DIR/plans/KEY.npz              the counts of all blocks; KEY is a hash of everything they depend on
    DIR/plans/KEY.parts/N.npz      of some blocks, while they are being computed: an interrupted run goes on from there

Where the index's folder cannot be written or locked, the same is kept in the user's cache, $XDG_CACHE_HOME or ~/.cache, in
kosmos-lit/plans/ and a folder named by a hash of DIR; where that cannot either, nothing is. A file that cannot be read is
computed again.
"""

from __future__ import annotations

import io
import os
import shutil
import sys
import tempfile
import zipfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from datamodules.io.hashing import hash_key
from datamodules.io.locks import LockError, locked
from datamodules.io.pool import Progress, run_all
from kosmos_lit.files import write_atomically

Counts = npt.NDArray[Any]
PART = 32
"""Blocks that are counted and kept together: some ten seconds' work."""


class Counted(Protocol):
    """Something in blocks, which processes can be handed."""

    @property
    def key(self) -> str: ...

    @property
    def n_blocks(self) -> int: ...

    @property
    def corpus(self) -> Any: ...

    def count(self, block: int) -> tuple[Counts, int]:
        """Return what is known of a block, (1,), and its number of documents."""


def count_parts(blocks: Counted, title: str, workers: int) -> Counts:
    """Return what is known of each block, (n_blocks,), from where it is kept if it is there."""
    n, file, index = blocks.n_blocks, f"{blocks.key}.npz", Path(blocks.corpus.folder)
    folders = [index / "plans", *_cached(index)] if index.is_dir() else []
    for folder in folders:
        if (counts := _read(folder / file, n)) is not None:
            return counts
    with ExitStack() as held:
        place = next((folder for folder in folders if _taken(folder, held)), None)
        if place is None:
            passing = held.enter_context(tempfile.TemporaryDirectory())
            return _count_all(blocks, Path(passing), title, workers)
        if place != folders[0]:
            print(f"the index in {index} cannot be written or locked: its row counts are kept in {place}", file=sys.stderr)
        if (counts := _read(place / file, n)) is None:  # else it was counted by the process that was waited for
            parts = place / f"{blocks.key}.parts"
            counts = _count_all(blocks, parts, title, workers)
            _write(place / file, counts)
            shutil.rmtree(parts)
        return counts


def _cached(index: Path) -> list[Path]:
    """Return the user's own folder for the counts of an index, if there is a place for it."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    name = f"{hash_key(os.path.realpath(index)):016x}"
    return [Path(cache) / "kosmos-lit" / "plans" / name] if os.path.isabs(cache) else []


def _taken(folder: Path, held: ExitStack) -> bool:
    """Lock a folder until `held` is left, or say that it cannot be written or locked."""
    try:
        held.enter_context(locked(folder))
    except (OSError, LockError):
        return False
    return os.access(folder, os.W_OK)


def _count_all(blocks: Counted, folder: Path, title: str, workers: int) -> Counts:
    """Count all blocks, part by part, but for the parts that `folder` has already."""
    n = blocks.n_blocks
    tasks = [(blocks, first, min(first + PART, n), folder / f"{first}.npz") for first in range(0, n, PART)]
    run_all(_count, [t for t in tasks if _read(t[3], t[2] - t[1]) is None], workers, title, "documents", "part")
    found = [part for _, first, stop, path in tasks if (part := _read(path, stop - first)) is not None]
    counts = np.concatenate(found)
    assert len(counts) == n, (len(counts), n)
    return counts


def _count(task: tuple[Counted, int, int, Path], progress: Progress) -> None:
    blocks, first, stop, path = task
    counts = []
    for block in range(first, stop):
        found, n_documents = blocks.count(block)
        counts.append(found)
        progress(n_documents)
    _write(path, np.concatenate(counts))


def _write(path: Path, counts: Counts) -> None:
    data = io.BytesIO()
    np.savez(data, counts=counts)  # with a checksum
    write_atomically(path, data.getvalue())


def _read(path: Path, n: int) -> Counts | None:
    """Return kept counts of `n` blocks, or None if there are none that can be read."""
    try:
        with np.load(path) as file:
            counts = file["counts"]
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile):
        return None
    return counts if len(counts) == n else None
