"""Locks on folders: for one process alone, or for the different parts of one preparation.

A lock is on a byte of `DIR/.lock`; the kernel frees it when its process ends, however it ends. Locks hold between machines
if the shared file system supports POSIX locks (NFS; Lustre mounted with `flock`).
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
"""Bytes: for the folder as a whole, for a section that one process at a time may be in, and from there on for each part."""

Exclusive = Callable[[], AbstractContextManager[None]]
"""Returns a context that one part at a time may be in."""


class LockError(UserError):
    """A file system without locks."""


@contextmanager
def locked(output: Path, part: tuple[int, int] = (1, 1)) -> Iterator[Exclusive]:
    """Hold the lock of part i of n of a corpus; part 1 of 1 excludes all others.

    Raises: LockError; OSError if the folder cannot be made or written.
    """
    output.mkdir(parents=True, exist_ok=True)
    number, n_parts = part
    # Opened for writing, as exclusive POSIX locks require; appending leaves the file as it is.
    with (output / ".lock").open("a+b") as file:
        _lock(file, _FOLDER, fcntl.LOCK_EX if n_parts == 1 else fcntl.LOCK_SH, output)
        _lock(file, _PARTS + number, fcntl.LOCK_EX, output)

        @contextmanager
        def exclusive() -> Iterator[None]:
            _lock(file, _SECTION, fcntl.LOCK_EX, output, announce=False)
            try:
                yield
            finally:
                fcntl.lockf(file, fcntl.LOCK_UN, 1, _SECTION)

        yield exclusive


def _lock(file: IO[bytes], byte: int, kind: int, output: Path, *, announce: bool = True) -> None:
    """Take a byte's lock; wait if another process holds it, with a message if `announce`."""
    try:
        try:
            fcntl.lockf(file, kind | fcntl.LOCK_NB, 1, byte)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise
            if announce:
                print(f"waiting for another process that prepares {output}", file=sys.stderr)
            fcntl.lockf(file, kind, 1, byte)
    except OSError as error:
        raise LockError(
            f"{output}: its file system cannot keep other processes out ({error}); choose a folder on another one, or mount "
            "it with locks (Lustre: with the option flock)"
        ) from error
