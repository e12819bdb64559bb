"""What is known of each block of a plan: computed once, in processes, and kept beside the index.

    DIR/plans/KEY.npz              the counts of all blocks; KEY is a hash of everything they depend on
    DIR/plans/KEY.parts/N.npz      of some blocks, while they are being computed: an interrupted run goes on from there

Where the index's folder cannot be written, nothing is kept. A file that cannot be read is computed again.
"""

from __future__ import annotations

import fcntl
import io
import os
import shutil
import tempfile
import zipfile
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from datamodules.prepare.files import write_whole
from datamodules.prepare.pool import Progress, run_all

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
    """Return what is known of each block, (n_blocks,), from the index's folder if it is there."""
    n = blocks.n_blocks
    folder = Path(blocks.corpus.folder) / "plans"
    kept, parts = folder / f"{blocks.key}.npz", folder / f"{blocks.key}.parts"
    if (counts := _read(kept, n)) is not None:
        return counts
    if not _writable(folder):
        with tempfile.TemporaryDirectory() as passing:
            return _count_all(blocks, Path(passing), title, workers)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (counts := _read(kept, n)) is None:  # else counted by the process that was waited for
            counts = _count_all(blocks, parts, title, workers)
            _write(kept, counts)
            shutil.rmtree(parts)
        return counts


def _writable(folder: Path) -> bool:
    try:
        folder.mkdir(exist_ok=True)
    except OSError:
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
    write_whole(path, data.getvalue())


def _read(path: Path, n: int) -> Counts | None:
    """Return kept counts of `n` blocks, or None if there are none that can be read."""
    try:
        with np.load(path) as file:
            counts = file["counts"]
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile):
        return None
    return counts if len(counts) == n else None
