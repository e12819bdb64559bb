"""The one exception that stands for a user's mistake, and the names that a misspelt one may stand for."""

from __future__ import annotations

import errno
import re
import resource
import shutil
import tempfile
from collections.abc import Iterable
from difflib import SequenceMatcher
from pathlib import Path

CLOSE = 0.6
"""Names that are at least so similar are taken for a misspelling of one another (difflib's own default)."""


class UserError(ValueError):
    """A mistake in a config, a command or an input; its message says where, which values, and what to do.

    The command line prints it as one message without a traceback and exits with code 2.
    """


def describe_os_error(error: OSError) -> str | None:
    """Return a sentence on what the system refuses and what to do; None if the error names neither a file nor a limit."""
    path = str(error.filename) if error.filename is not None else None
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        places = [path] if path else [".", tempfile.gettempdir()]
        free = ", ".join(f"{_free_bytes(place):,} bytes at {place}" for place in places)
        return f"no space left{f' to write {path}' if path else ''}: free are {free}. Make room, or write elsewhere"
    if error.errno in (errno.EMFILE, errno.ENFILE):
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        return (
            f"too many open files (this process may open {limit:,}): raise the limit with `ulimit -n`, or use fewer workers"
        )
    if error.errno == errno.EROFS:
        return f"{path or 'a file'} is on a read-only file system: write elsewhere"
    if error.errno in (errno.EACCES, errno.EPERM) and path:
        return f"no permission for {path}: choose another path, or change its owner or mode"
    return f"{path}: {error.strerror}" if path and error.strerror else None


def _free_bytes(place: str) -> int:
    """Return the free bytes of the disk of a path, which need not exist."""
    path = Path(place).absolute()
    return shutil.disk_usage(next(p for p in (path, *path.parents) if p.exists())).free


def nearest(name: str, names: Iterable[str]) -> list[str]:
    """Return the names, those most similar to `name` first."""
    return sorted(names, key=lambda other: (-_similarity(name, other), other))


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """Return "; did you mean X?" with the most similar name, empty if none is close."""
    close = [other for other in nearest(name, names)[:1] if _similarity(name, other) >= CLOSE]
    return f"; did you mean {close[0]}?" if close else ""


def _similarity(name: str, other: str) -> float:
    """Return how similar two names are, from 0 to 1; `name` may also stand for the last part of the other one."""
    last = re.split(r"[./]", other)[-1]
    # A little less for a part: the whole name, where it is there too, is meant.
    return max(_ratio(name, other), 0.99 * _ratio(name.removeprefix("--"), last))


def _ratio(one: str, other: str) -> float:
    return SequenceMatcher(None, one, other, autojunk=False).ratio()
