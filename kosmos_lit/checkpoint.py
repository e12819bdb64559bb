"""Checkpoints: written atomically, listed, and compared with a run before they are loaded.

A checkpoint holds tensors and plain Python data only, and is read with `weights_only=True`: a file from elsewhere cannot
run code. Beside weights and optimizer state it holds the model's configuration and the tokenizer. Every read compares each
record with the CRC that was written with it, so that flipped bits are found wherever they are.
"""

from __future__ import annotations

import hashlib
import sys
import zipfile
from collections.abc import Collection
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from kosmos_lit.agreement import check_same, from_rank_zero
from kosmos_lit.config import KosmosConfig
from kosmos_lit.errors import UserError
from kosmos_lit.files import atomic_file, remove_leftovers

SUFFIX = ".ckpt"
BLOCK = 2**22
"""Bytes that are read at a time."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a temporary file, syncs it to disk, then renames it: after a kill or on a full disk, old files are untouched.

    Lightning's own writer stages in the system's temporary folder and copies, which is not atomic across file systems. Of
    several ranks all read the file that rank 0 names, and each checks what it reads.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        target = Path(path)
        remove_leftovers(target.parent)  # first, as a killed writer's file may fill the disk
        try:
            with atomic_file(target) as temporary, temporary.open("wb") as file:
                torch.save(checkpoint, file)
        except (OSError, RuntimeError) as error:  # torch.save turns a failed write into a RuntimeError
            raise UserError(f"cannot write checkpoint {target}: {error}; earlier checkpoints are untouched") from error

    def load_checkpoint(
        self, path: str | Path, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        # Not mapped: optimizer state would stay on a file that may be deleted, which a file server does not wait for.
        return load_agreed(path, mmap=False)


def load_agreed(path: str | Path, *, mmap: bool) -> dict[str, Any]:
    """Read the checkpoint that rank 0 names, on all ranks. Collective: all ranks must call it.

    Args:
        path: of the checkpoint; what other ranks than the first pass does not count.
        mmap: map tensors from disk.

    Raises: UserError if it is missing or damaged, on any rank, or another file on one of them.
    """
    path = from_rank_zero(str(path))
    # Damage is a value too, so that no rank waits for one that has given up.
    try:
        content = content_hash(path)[:12] if Path(path).is_file() else "no file"
    except UserError as error:
        content = str(error)
    check_same({str(path): content}, "Ranks must see one file system: resume when all of them see the same file")
    return load_checkpoint(path, mmap=mmap)


def load_checkpoint(path: str | Path, *, mmap: bool = True) -> dict[str, Any]:
    """Read a checkpoint as plain data, after a check of all its bytes.

    Args:
        path: of the file.
        mmap: map tensors from disk, instead of reading all of them.

    Raises: UserError if there is none, or it is damaged or holds anything but plain data.
    """
    if not Path(path).is_file():
        raise UserError(f"no checkpoint {path}")
    content_hash(path)
    return _read(path, mmap=mmap)


def content_hash(path: str | Path) -> str:
    """Return a hash of a checkpoint's content, after comparing each of its records with the CRC that the file has of it.

    One pass over the file at the speed of the disk; none if this process has checked the same file before.

    Raises: UserError if a record is damaged.
    """
    state = Path(path).stat()
    return _content_hash(Path(path), state.st_ino, state.st_size, state.st_mtime_ns)


@lru_cache
def _content_hash(path: Path, *identity: int) -> str:
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(path) as archive:
            for record in archive.infolist():
                if record.compress_type != zipfile.ZIP_STORED:  # torch compresses nothing; a bomb would
                    raise zipfile.BadZipFile(f"{record.filename} is compressed")
                with archive.open(record) as file:
                    while file.read(BLOCK):  # at the end, zipfile compares the CRC
                        pass
                # Without the name's first part, which is the file's own.
                name = record.filename.partition("/")[2]
                digest.update(f"{name} {record.file_size} {record.CRC:08x}\n".encode())
    except Exception as error:  # what a garbled file makes zipfile raise is anything
        raise _unreadable(path, error) from error
    return digest.hexdigest()


def _read(path: str | Path, *, mmap: bool = True) -> dict[str, Any]:
    """Return a checkpoint's plain data. Raises: UserError if it holds anything else, or cannot be read."""
    try:
        checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # what a garbled pickle makes torch raise is anything
        raise _unreadable(path, error) from error
    # Lightning's key for what `save_hyperparameters` stored.
    hparams = checkpoint.get("hyper_parameters") if isinstance(checkpoint, dict) else None
    if not isinstance(hparams, dict) or "kosmos" not in hparams or not isinstance(checkpoint.get("global_step"), int):
        raise UserError(f"{path} is no checkpoint of kosmos-lit: it does not say which model it holds")
    return checkpoint


def _unreadable(path: str | Path, error: Exception) -> UserError:
    return UserError(f"{path} is no checkpoint that can be read safely: {error or type(error).__name__}")


def find_last(folder: Path) -> Path | None:
    """Return the undamaged checkpoint of a folder with the highest step, or None if there are no checkpoints.

    Damaged ones are listed on stderr.

    Raises: UserError if there are checkpoints but none can be read: a run must not silently start over.
    """
    steps: list[tuple[int, Path]] = []
    damaged, last = [], None
    for path in folder.glob(f"*{SUFFIX}"):
        try:
            # Mapped from disk, so that no tensor is read for a step number.
            steps.append((_read(path)["global_step"], path))
        except UserError as error:
            damaged.append(str(error))
    # By the step in the file, whatever the file is called; only files that are newer than the one that is taken are checked.
    for _, path in sorted(steps, reverse=True):
        try:
            content_hash(path)
        except UserError as error:
            damaged.append(str(error))
        else:
            last = path
            break
    if damaged and last is None:
        raise UserError(f"no checkpoint in {folder} can be read: {'; '.join(damaged)}; delete them to start over")
    for message in damaged:
        print(f"skipped: {message}", file=sys.stderr)
    return last


def check_architecture(
    saved: KosmosConfig, config: KosmosConfig, path: str | Path, *, ignored: Collection[str] = ()
) -> None:
    """Make sure that saved weights are those of the configured model.

    Args:
        saved: the configuration beside the weights.
        config: the run's.
        path: the file or folder of the weights, for the message.
        ignored: fields of `KosmosConfig.architecture` that may differ.

    Raises: UserError naming every other field that differs.
    """
    actual, expected = saved.architecture(), config.architecture()
    wrong = [
        f"{name} is {actual.get(name)!r} in the checkpoint, {value!r} in the run"
        for name, value in expected.items()
        if name not in ignored and actual.get(name) != value
    ]
    if wrong:
        raise UserError(f"{path} holds a model of another architecture: {'; '.join(wrong)}")
