"""Who may work in a folder at the same time: one process alone, or different parts of one preparation.

Locks are on bytes of `DIR/.lock`, which the kernel frees when their process ends, however it ends. They hold between
machines where the shared file system knows POSIX locks (NFS, Lustre mounted with `flock`).
"""

from __future__ import annotations

import errno
import fcntl
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import IO

from kosmos_lit.errors import UserError

_FOLDER, _SECTION, _PARTS = 0, 1, 2
"""Bytes: the folder as a whole, what one process at a time may do, and the first of one byte for each part."""

Alone = Callable[[], AbstractContextManager[None]]
"""Gives a stretch that no other part is in."""


class LockError(UserError):
    """A file system on which processes cannot exclude one another."""


@contextmanager
def locked(output: Path, part: tuple[int, int] = (1, 1)) -> Iterator[Alone]:
    """Let one process at a time work on part i of n of a corpus, and none beside the only part 1 of 1.

    Raises: LockError; OSError if the folder cannot be made or written.
    """
    output.mkdir(parents=True, exist_ok=True)
    number, n_parts = part
    with (output / ".lock").open("a+b") as file:
        _lock(file, _FOLDER, fcntl.LOCK_EX if n_parts == 1 else fcntl.LOCK_SH, output)
        _lock(file, _PARTS + number, fcntl.LOCK_EX, output)

        @contextmanager
        def alone() -> Iterator[None]:
            _lock(file, _SECTION, fcntl.LOCK_EX, output, told=False)
            try:
                yield
            finally:
                fcntl.lockf(file, fcntl.LOCK_UN, 1, _SECTION)

        yield alone


def _lock(file: IO[bytes], byte: int, kind: int, output: Path, *, told: bool = True) -> None:
    """Take a byte's lock; if another process has it, say so if that is to be `told`, and wait."""
    try:
        try:
            fcntl.lockf(file, kind | fcntl.LOCK_NB, 1, byte)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise
            if told:
                print(f"waiting for another process that prepares {output}", file=sys.stderr)
            fcntl.lockf(file, kind, 1, byte)
    except OSError as error:
        raise LockError(
            f"{output}: its file system cannot keep other processes out ({error}); choose a folder on another one, or mount "
            "it with locks (Lustre: with the option flock)"
        ) from error
