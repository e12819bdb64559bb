"""Counts of each block of a row plan: computed once, in processes, and stored beside the index.

    DIR/plans/KEY.npz              the counts of all blocks; KEY is a hash of everything they depend on
    DIR/plans/KEY.parts/N.npz      those of some blocks, while the others are computed: an interrupted run goes on from there

Where the index's folder cannot be written or locked, the user's cache takes their place: kosmos-lit/plans/HASH in
$XDG_CACHE_HOME or ~/.cache, HASH being one of DIR. Where that cannot be written either, nothing is stored. A file that
cannot be read is computed again.
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
"""Blocks that are counted and stored together: some ten seconds' work."""


class CountableBlocks(Protocol):
    """Blocks that other processes can count: `row_plan.Blocks`."""

    @property
    def key(self) -> str: ...

    @property
    def n_blocks(self) -> int: ...

    @property
    def corpus(self) -> Any: ...

    def count(self, block: int) -> tuple[Counts, int]:
        """Return the counts of a block, (1,), and its number of documents."""


def count_parts(blocks: CountableBlocks, title: str, workers: int) -> Counts:
    """Return the counts of each block, (n_blocks,): the stored ones if there are any."""
    n, file, index = blocks.n_blocks, f"{blocks.key}.npz", Path(blocks.corpus.folder)
    folders = [index / "plans", *_cache_folder(index)] if index.is_dir() else []
    for folder in folders:
        # Without a lock: files are written atomically, complete or absent.
        if (counts := _read(folder / file, n)) is not None:
            return counts
    with ExitStack() as locks:
        store = next((folder for folder in folders if _try_lock(folder, locks)), None)
        if store is None:
            # For the parts, by which the processes hand over their counts.
            temporary = locks.enter_context(tempfile.TemporaryDirectory())
            return _count_all(blocks, Path(temporary), title, workers)
        if store != folders[0]:
            print(f"the index in {index} cannot be written or locked: its row counts are stored in {store}", file=sys.stderr)
        if (counts := _read(store / file, n)) is None:  # else the process that held the lock before has counted
            parts = store / f"{blocks.key}.parts"
            counts = _count_all(blocks, parts, title, workers)
            _write(store / file, counts)
            shutil.rmtree(parts)  # only now: until then, an interrupted run goes on from them
        return counts


def _cache_folder(index: Path) -> list[Path]:
    """Return the folder for the counts of an index in the user's cache; none if the cache has no absolute path."""
    # `~` stays where there is no home; XDG ignores paths that are not absolute.
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    # realpath: an index has one folder, by whatever link it is opened.
    name = f"{hash_key(os.path.realpath(index)):016x}"
    return [Path(cache) / "kosmos-lit" / "plans" / name] if os.path.isabs(cache) else []


def _try_lock(folder: Path, locks: ExitStack) -> bool:
    """Lock a folder until `locks` is left; return False if it cannot be written or locked."""
    try:
        locks.enter_context(locked(folder))
    except (OSError, LockError):
        return False
    return os.access(folder, os.W_OK)  # a lock file may be writable in a folder that is not


def _count_all(blocks: CountableBlocks, folder: Path, title: str, workers: int) -> Counts:
    """Count all blocks, part by part, except for the parts that `folder` has already."""
    n = blocks.n_blocks
    tasks = [(blocks, first, min(first + PART, n), folder / f"{first}.npz") for first in range(0, n, PART)]
    run_all(_count, [t for t in tasks if _read(t[3], t[2] - t[1]) is None], workers, title, "documents", "part")
    # From the files, also of parts that were just counted.
    parts = [part for _, first, stop, path in tasks if (part := _read(path, stop - first)) is not None]
    counts = np.concatenate(parts)
    assert len(counts) == n, (len(counts), n)
    return counts


def _count(task: tuple[CountableBlocks, int, int, Path], progress: Progress) -> None:
    blocks, first, stop, path = task
    counts = []
    for block in range(first, stop):
        count, n_documents = blocks.count(block)
        counts.append(count)
        progress(n_documents)
    _write(path, np.concatenate(counts))


def _write(path: Path, counts: Counts) -> None:
    # In memory: np.savez would add .npz to the temporary name.
    data = io.BytesIO()
    np.savez(data, counts=counts)  # a zip file, so with a checksum
    write_atomically(path, data.getvalue())


def _read(path: Path, n: int) -> Counts | None:
    """Return stored counts of `n` blocks, or None if there are none that can be read."""
    try:
        with np.load(path) as file:
            counts = file["counts"]
    # np.load: no file, not a zip file, an empty one, one without `counts`, a damaged one.
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile):
        return None
    # A part's file may have been written with another PART.
    return counts if len(counts) == n else None
