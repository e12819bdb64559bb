"""Whether a step fits a device, and what would: said before the first one."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Protocol, get_args

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn

from kosmos_lit.config import KosmosConfig, Recompute
from kosmos_lit.costs.memory import GB, MicroBatch, Setting, bytes_of, estimate, skeleton
from kosmos_lit.errors import UserError
from kosmos_lit.sharding.strategy import Sharded

WORLDS = (2, 4, 8, 16, 32, 64)
"""Numbers of ranks among which one is looked for that is enough."""


class Rows(Protocol):
    """What a data module knows of its micro-batches."""

    seq_len: int
    """Positions in a row."""
    global_batch_rows: int
    micro_batch_rows: int

    def largest_micro_batch(self) -> tuple[int, int]:
        """Return about how many images and supervised tokens a micro-batch holds at most."""


def check_trainer(trainer: L.Trainer, data: Rows, config: KosmosConfig, freeze: Sequence[str]) -> None:
    """Raises: UserError if no step of a run fits its devices, before anything is allocated."""
    strategy = trainer.strategy
    device = strategy.root_device
    images, targets = data.largest_micro_batch()
    setting = Setting(
        batch=MicroBatch(rows=data.micro_batch_rows, seq_len=data.seq_len, n_images=images, n_targets=targets),
        device="cuda" if device.type == "cuda" else "cpu", precision=str(trainer.precision),
        strategy="fsdp" if isinstance(strategy, Sharded) else "ddp" if trainer.world_size > 1 else "one",
        world_size=trainer.world_size, n_micro_batches=trainer.accumulate_grad_batches, freeze=tuple(freeze),
        reshards=getattr(strategy, "reshard_after_forward", True),
        sums_every_micro_batch=getattr(strategy, "sync_every_micro_batch", True),
    )  # fmt: skip
    check_fits(config, setting, memory_of(device), data.global_batch_rows // trainer.world_size)


def memory_of(device: torch.device) -> float:
    """Return the bytes of a device, or of this machine."""
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def fitting(config: KosmosConfig, setting: Setting, needed: float, available: float, rows: int) -> list[str]:
    """Return what could be changed for a step to fit into `available` bytes: one thing if one is enough, else several.

    Args:
        config: the model.
        setting: that does not fit.
        needed: bytes that it takes.
        available: bytes of a device.
        rows: of a step on one rank: micro-batches must divide it.
    """
    m, slope = setting.batch.rows, 0.0
    smaller = [n for n in range(m - 1, 0, -1) if rows % n == 0]
    if smaller:
        least = estimate(config, replace(setting, batch=setting.batch.with_rows(smaller[-1]))).needed
        slope = (needed - least) / (m - smaller[-1])
    found, recomputes = [], False
    for change, model, changed in _changes(config, setting):
        again = model.decoder.recompute != config.decoder.recompute
        if again and recomputes:
            continue  # to compute less again is enough
        whole = estimate(model, changed).needed if change else needed
        if whole <= available:
            found.append(change)
            break  # each of the next costs more, and seconds to try
        if fits := next((n for n in smaller if whole - slope * (m - n) <= available), None):
            found.append(f"micro_batch_rows {fits}" + (f" with {change}" if change else ""))
            recomputes = again
    return found


def _changes(config: KosmosConfig, setting: Setting) -> Iterator[tuple[str, KosmosConfig, Setting]]:
    """Yield what may help beside smaller micro-batches, and what it makes of model and setting; first nothing at all."""
    yield "", config, setting
    choices = get_args(Recompute)  # from none to full
    for recompute in choices[choices.index(config.decoder.recompute) + 1 :]:
        decoder = replace(config.decoder, recompute=recompute)
        yield f"decoder.recompute {recompute}", replace(config, decoder=decoder), setting
    if setting.strategy != "fsdp":
        W = next((n for n in WORLDS if n >= setting.world_size), setting.world_size)
        yield f"configs/trainer/fsdp.yaml on {W} devices", config, replace(setting, strategy="fsdp", world_size=W)


def check_fits(config: KosmosConfig, setting: Setting, available: float, rows: int) -> None:
    """Make sure that a step fits a device: on a GPU all of it; on a CPU, which can swap, what any batch needs.

    A GPU that holds a step's tensors, but not what an allocator loses beside them, gets a warning.

    Args:
        config: the model.
        setting: of the run.
        available: bytes of a device.
        rows: of a step on one rank.

    Raises: UserError saying what is needed, what is there, and what would fit.
    """
    if setting.device == "cpu":
        net = skeleton(config, setting.freeze)
        needed = bytes_of(net.parameters()) + 3 * bytes_of(p for p in net.parameters() if p.requires_grad)
        if needed > available:
            raise UserError(
                f"weights, gradients and optimizer state take {needed / GB:.1f} GB, but this machine has "
                f"{available / GB:.1f} GB: choose a smaller model, or train less of it (model.freeze, lora)"
            )
        return
    memory = estimate(config, setting)
    if memory.needed <= available:
        return
    batch = setting.batch
    what = (
        f"a step needs {memory.needed / GB:.1f} GB of a device that has {available / GB:.1f} GB "
        f"(micro-batches of {batch.rows} rows of {batch.seq_len} positions with up to {batch.n_images} images)"
    )
    if memory.total <= available:  # what it has to spare is an estimate too
        rank_zero_warn(f"{what}: it may run out of memory; `main.py plan` says more")
        return
    ways = "; or ".join(fitting(config, setting, memory.needed, available, rows)) or "a smaller model, or more devices"
    raise UserError(f"{what}; what would fit: {ways}")
