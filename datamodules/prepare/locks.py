"""Who may work on a corpus folder at the same time: one process alone, or different parts of one preparation.

Locks are on bytes of `DIR/.lock`, which the kernel frees when their process ends, however it ends. They hold between
machines where the shared file system knows POSIX locks (NFS, Lustre mounted with `flock`).
"""

from __future__ import annotations

import fcntl
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import IO

_FOLDER, _SECTION, _PARTS = 0, 1, 2
"""Bytes: the folder as a whole, what one process at a time may do, and the first of one byte for each part."""

Alone = Callable[[], AbstractContextManager[None]]
"""Gives a stretch that no other part is in."""


@contextmanager
def locked(output: Path, part: tuple[int, int]) -> Iterator[Alone]:
    """Let one process at a time work on part i of n of a corpus, and none beside the only part 1 of 1."""
    output.mkdir(parents=True, exist_ok=True)
    number, n_parts = part
    with (output / ".lock").open("a+b") as file:
        _lock(file, _FOLDER, fcntl.LOCK_EX if n_parts == 1 else fcntl.LOCK_SH, output)
        _lock(file, _PARTS + number, fcntl.LOCK_EX, output)

        @contextmanager
        def alone() -> Iterator[None]:
            fcntl.lockf(file, fcntl.LOCK_EX, 1, _SECTION)
            try:
                yield
            finally:
                fcntl.lockf(file, fcntl.LOCK_UN, 1, _SECTION)

        yield alone


def _lock(file: IO[bytes], byte: int, kind: int, output: Path) -> None:
    try:
        fcntl.lockf(file, kind | fcntl.LOCK_NB, 1, byte)
    except OSError:
        print(f"waiting for another process that prepares {output}", file=sys.stderr)
        fcntl.lockf(file, kind, 1, byte)
