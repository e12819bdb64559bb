"""What a run asks of its device, said before the first step."""

from __future__ import annotations

import lightning as L
import torch

from kosmos_lit.checks.cpu import settle
from kosmos_lit.config import DecoderConfig
from kosmos_lit.ops.fp8 import check_fp8
from kosmos_lit.ops.kernels import check_kernel


def computed_in(precision: object) -> torch.dtype:
    """Return what matrices and attention are computed in under a trainer's precision."""
    found = {"bf16": torch.bfloat16, "16": torch.float16, "64": torch.float64}
    return found.get(str(precision).split("-")[0], torch.float32)


def check_device(trainer: L.Trainer, config: DecoderConfig, row_len: int, *, trains: bool) -> None:
    """Make sure that the run's device can do what the config asks for, and share out a CPU's cores.

    Raises: UserError saying what a kernel or 8 bits lack there, and what would work.
    """
    device, dtype = trainer.strategy.root_device, computed_in(trainer.precision)
    check_kernel(config.attention_kernel, device, dtype, config.head_dim, config.attention_dropout_rate if trains else 0.0)
    if config.fp8 and trains:
        check_fp8(device, dtype, {"decoder.dim": config.dim, "decoder.ffn_dim": config.ffn_dim}, row_len)
    if device.type == "cpu":
        settle(trainer.num_devices, dtype)


def fuses(config: DecoderConfig, device: torch.device) -> bool:
    """Return whether torch.compile is to fuse the layers of a run on that device."""
    return device.type == "cuda" if config.compile is None else config.compile
