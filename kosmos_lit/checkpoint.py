"""Checkpoints: written whole or not at all, found again, and compared before they are loaded.

A checkpoint holds tensors and plain Python data only, and is read with `weights_only=True`: a file from elsewhere cannot
run code. Beside weights and optimizer it holds the model's configuration and the tokenizer.
"""

from __future__ import annotations

import os
import pickle
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from kosmos_lit.config import KosmosConfig
from kosmos_lit.errors import UserError
from kosmos_lit.model import Kosmos
from kosmos_lit.tokens import Tokenizer

SUFFIX = ".ckpt"
READ_ERRORS = (OSError, RuntimeError, ValueError, EOFError, KeyError, pickle.UnpicklingError)


class WholeCheckpointIO(TorchCheckpointIO):
    """Writes beside the target, forces it to disk, then renames: a kill or a full disk leaves the old files as they were.

    Lightning's own writer stages in the system's temporary folder and copies, which is not atomic across file systems.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        for stale in target.parent.glob(".*.tmp"):
            stale.unlink(missing_ok=True)
        try:
            with temporary.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
        except (OSError, RuntimeError) as error:  # torch.save turns a failed write into a RuntimeError
            raise UserError(f"cannot write checkpoint {target}: {error}; earlier checkpoints are untouched") from error
        finally:
            temporary.unlink(missing_ok=True)
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


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
    about = checkpoint.get("hyper_parameters") if isinstance(checkpoint, dict) else None
    if not about or "kosmos" not in about or "global_step" not in checkpoint:
        raise UserError(f"{path} is no checkpoint of kosmos-lit: it does not say which model it holds")
    return checkpoint


def find_last(folder: Path) -> Path | None:
    """Return the newest readable checkpoint of a folder by its step, or None if there is none at all.

    What cannot be read is named on stderr.

    Raises: UserError if there are checkpoints but none can be read: a run must not start over without being told to.
    """
    steps: list[tuple[int, Path]] = []
    damaged = []
    for path in folder.glob(f"*{SUFFIX}"):
        try:
            steps.append((int(load_checkpoint(path)["global_step"]), path))
        except UserError as error:
            damaged.append(str(error))
    if damaged and not steps:
        raise UserError(f"no checkpoint in {folder} can be read: {'; '.join(damaged)}; delete them to start over")
    for message in damaged:
        print(f"passed over: {message}", file=sys.stderr)
    return max(steps)[1] if steps else None


def check_architecture(checkpoint: Mapping[str, Any], config: KosmosConfig, path: str | Path) -> None:
    """Make sure that a checkpoint's weights are those of the configured model.

    Raises: UserError naming every field that differs.
    """
    there = KosmosConfig.from_dict(checkpoint["hyper_parameters"]["kosmos"]).architecture()
    here = config.architecture()
    wrong = [f"{k} is {there.get(k)!r} there, {v!r} here" for k, v in here.items() if there.get(k) != v]
    if wrong:
        raise UserError(f"{path} holds a model of another architecture: {'; '.join(wrong)}")


def load_model(path: str | Path) -> tuple[Kosmos, Tokenizer]:
    """Return the model and the tokenizer of a checkpoint.

    Raises: UserError as `load_checkpoint` does, or if weights are missing.
    """
    checkpoint = load_checkpoint(path)
    table = checkpoint["hyper_parameters"]["kosmos"]
    config = KosmosConfig.from_dict(table | {"vision": table["vision"] | {"pretrained": None}})
    model = Kosmos(config)
    weights = {k.removeprefix("net."): v for k, v in checkpoint["state_dict"].items() if k.startswith("net.")}
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(f"{path}: {error}") from error
    return model.eval(), Tokenizer.from_bytes(checkpoint["tokenizer"].numpy().tobytes())
