"""Checkpoints: written atomically, listed, and compared with a run before they are loaded.

A checkpoint holds tensors and plain Python data only, and is read with `weights_only=True`: a file from elsewhere cannot
run code. Beside weights and optimizer state it holds the model's configuration and the tokenizer.
"""

from __future__ import annotations

import pickle
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from kosmos_lit.config import KosmosConfig
from kosmos_lit.errors import UserError
from kosmos_lit.files import atomic_file, remove_leftovers

SUFFIX = ".ckpt"
# What torch.load raises for truncated, damaged and foreign files, and for pickles that it refuses to run.
READ_ERRORS = (OSError, RuntimeError, ValueError, EOFError, KeyError, pickle.UnpicklingError)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a temporary file, syncs it to disk, then renames it: after a kill or on a full disk, old files are untouched.

    Lightning's own writer stages in the system's temporary folder and copies, which is not atomic across file systems.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        target = Path(path)
        remove_leftovers(target.parent)  # first, as a killed writer's file may fill the disk
        try:
            with atomic_file(target) as temporary, temporary.open("wb") as file:
                torch.save(checkpoint, file)
        except (OSError, RuntimeError) as error:  # torch.save turns a failed write into a RuntimeError
            raise UserError(f"cannot write checkpoint {target}: {error}; earlier checkpoints are untouched") from error


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint as plain data, tensors mapped from disk.

    Raises: UserError if there is none, or it is damaged or holds anything but plain data.
    """
    if not Path(path).is_file():
        raise UserError(f"no checkpoint {path}")
    try:
        checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except READ_ERRORS as error:
        raise UserError(f"{path} is no checkpoint that can be read safely: {error}") from error
    # Lightning's key for what `save_hyperparameters` stored.
    hparams = checkpoint.get("hyper_parameters") if isinstance(checkpoint, dict) else None
    if not hparams or "kosmos" not in hparams or "global_step" not in checkpoint:
        raise UserError(f"{path} is no checkpoint of kosmos-lit: it does not say which model it holds")
    return checkpoint


def find_last(folder: Path) -> Path | None:
    """Return the readable checkpoint of a folder with the highest step, or None if there are no checkpoints.

    Damaged ones are listed on stderr.

    Raises: UserError if there are checkpoints but none can be read: a run must not silently start over.
    """
    steps: list[tuple[int, Path]] = []
    damaged = []
    for path in folder.glob(f"*{SUFFIX}"):
        try:
            # Mapped from disk, so that no tensor is read for a step number.
            steps.append((int(load_checkpoint(path)["global_step"]), path))
        except UserError as error:
            damaged.append(str(error))
    if damaged and not steps:
        raise UserError(f"no checkpoint in {folder} can be read: {'; '.join(damaged)}; delete them to start over")
    for message in damaged:
        print(f"skipped: {message}", file=sys.stderr)
    # By the step in the file, whatever the file is called.
    return max(steps)[1] if steps else None


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
