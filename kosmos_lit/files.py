"""Files and folders that are complete under their own name, or absent.

Each is written under a temporary name beside its target, forced to disk and renamed. An exception removes the temporary
one and leaves the target as it was. A killed process leaves `.NAME.RANDOM.tmp`, which `remove_leftovers` deletes.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Container, Iterator
from contextlib import contextmanager
from pathlib import Path
from secrets import token_hex


def _temporary(target: Path) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    # Random, not the process's number: two machines that share a folder may have processes of equal numbers.
    return target.with_name(f".{target.name}.{token_hex(4)}.tmp")


@contextmanager
def atomic_file(target: Path) -> Iterator[Path]:
    """Give the path of a file to write, which replaces `target` once it is on disk."""
    temporary = _temporary(target)
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    sync(target.parent)


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """Give an empty folder to fill, which replaces `target` once its files, not those of its subfolders, are on disk."""
    temporary = _temporary(target)
    try:
        temporary.mkdir()
        yield temporary
        for file in temporary.iterdir():
            sync(file)
        shutil.rmtree(target, ignore_errors=True)  # a rename replaces files and empty folders only
        os.rename(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    sync(target.parent)


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file, and the folders above it."""
    with atomic_file(path) as temporary:
        temporary.write_bytes(data)


def remove_leftovers(folder: Path, names: Container[str] | None = None) -> None:
    """Delete what killed writers left in a folder, of the targets `names` or of all; while no other process writes them."""
    for leftover in folder.glob(".*.tmp"):
        if names is None or leftover.name[1:].rsplit(".", 2)[0] in names:
            shutil.rmtree(leftover, ignore_errors=True) if leftover.is_dir() else leftover.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Force a file, or a folder's entries, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
