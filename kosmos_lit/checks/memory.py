"""Whether a training step fits its device, and which changes would make it fit; checked before the first step."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Protocol, get_args

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn

from kosmos_lit.config import KosmosConfig, Recompute
from kosmos_lit.costs.memory import GB, EstimateError, MicroBatch, Setting, bytes_of, estimate, meta_model
from kosmos_lit.errors import UserError
from kosmos_lit.sharding.strategy import ShardedStrategy
from kosmos_lit.terminal import program
from kosmos_lit.trainer_internals import has_bucket_views

WORLD_SIZES = (2, 4, 8, 16, 32, 64)
"""World sizes that are suggested for sharding."""


class BatchSizes(Protocol):
    """Batch sizes of a data module."""

    seq_len: int
    """Positions in a row."""
    global_batch_rows: int
    micro_batch_rows: int

    def largest_micro_batch(self) -> tuple[int, int]:
        """Return estimates of the most images and supervised tokens in a micro-batch."""


def check_step_memory(trainer: L.Trainer, data: BatchSizes, config: KosmosConfig, freeze: Sequence[str]) -> None:
    """Make sure that a step of a run fits its device, before anything is allocated.

    Raises: UserError as `check_memory` does.
    """
    strategy = trainer.strategy
    device = strategy.root_device
    images, targets = data.largest_micro_batch()
    setting = Setting(
        batch=MicroBatch(rows=data.micro_batch_rows, seq_len=data.seq_len, n_images=images, n_targets=targets),
        device="cuda" if device.type == "cuda" else "cpu",
        precision=str(trainer.precision),
        strategy="fsdp" if isinstance(strategy, ShardedStrategy) else "ddp" if trainer.world_size > 1 else "one",
        world_size=trainer.world_size,
        n_micro_batches=trainer.accumulate_grad_batches,
        freeze=tuple(freeze),
        ranks_per_replica=getattr(strategy, "ranks_per_replica", None),
        reshards=getattr(strategy, "reshard_after_forward", True),
        sums_every_micro_batch=getattr(strategy, "sync_every_micro_batch", True),
        has_bucket_views=has_bucket_views(trainer),
    )
    check_memory(config, setting, device_memory(device), data.global_batch_rows // trainer.world_size)


def device_memory(device: torch.device) -> float:
    """Return a GPU's memory in bytes, or that of this machine for any other device."""
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def remedies(config: KosmosConfig, setting: Setting, needed: float, available: float, rows: int) -> list[str]:
    """Return changes with which a step would fit into `available` bytes, the least costly first.

    Args:
        config: the model.
        setting: of the run whose step does not fit.
        needed: bytes that its step takes.
        available: bytes of a device.
        rows: rows of a step on one rank; micro-batches must divide them.
    """
    m, slope = setting.batch.rows, 0.0
    # Memory is linear in the rows of a micro-batch, so two estimates give all smaller ones without running each.
    smaller = [n for n in range(m - 1, 0, -1) if rows % n == 0]  # largest first
    if smaller:
        least = _needed(config, replace(setting, batch=setting.batch.with_rows(smaller[-1])))
        # Bytes of a row.
        slope = (needed - least) / (m - smaller[-1])
    suggestions, has_recompute = [], False
    for change, model, changed in _alternatives(config, setting):
        recomputes = model.decoder.recompute != config.decoder.recompute
        if recomputes and has_recompute:
            continue  # the cheaper kind of recompute is enough
        unreduced = _needed(model, changed) if change else needed  # at the run's own micro-batch
        if unreduced <= available:
            suggestions.append(change)
            break  # the next alternatives cost more, and each estimate takes seconds
        if fits := next((n for n in smaller if unreduced - slope * (m - n) <= available), None):
            suggestions.append(f"micro_batch_rows {fits}" + (f" with {change}" if change else ""))
            has_recompute = recomputes
    return suggestions


def _needed(config: KosmosConfig, setting: Setting) -> float:
    """Return the bytes that a step needs; infinity where their estimate fails, so that nothing unknown is suggested."""
    try:
        return estimate(config, setting).needed
    except EstimateError:
        return math.inf


def _alternatives(config: KosmosConfig, setting: Setting) -> Iterator[tuple[str, KosmosConfig, Setting]]:
    """Yield alternatives beside smaller micro-batches: description, model and setting; first the unchanged run."""
    yield "", config, setting
    choices = get_args(Recompute)  # from none to full
    for recompute in choices[choices.index(config.decoder.recompute) + 1 :]:
        decoder = replace(config.decoder, recompute=recompute)
        yield f"decoder.recompute {recompute}", replace(config, decoder=decoder), setting
    if setting.strategy != "fsdp":
        W = next((n for n in WORLD_SIZES if n >= setting.world_size), setting.world_size)
        yield f"configs/trainer/fsdp.yaml on {W} devices", config, replace(setting, strategy="fsdp", world_size=W)


def check_memory(config: KosmosConfig, setting: Setting, available: float, rows: int) -> None:
    """Make sure that a step fits a device: on a GPU all of it; on a CPU, which can swap, the weights and their state.

    A GPU whose memory holds a step's tensors, but not the allocator's estimated loss beside them, gives a warning.

    Args:
        config: the model.
        setting: of the run.
        available: bytes of a device.
        rows: rows of a step on one rank.

    Raises: UserError naming the bytes needed, the bytes available, and changes that would fit.
    """
    if setting.device == "cpu":
        net = meta_model(config, setting.freeze)
        # Weights, and for what trains a gradient and AdamW's two moments.
        needed = bytes_of(net.parameters()) + 3 * bytes_of(p for p in net.parameters() if p.requires_grad)
        if needed > available:
            raise UserError(
                f"weights, gradients and optimizer state take {needed / GB:.1f} GB, but this machine has "
                f"{available / GB:.1f} GB: choose a smaller model, or train less of it (model.freeze, lora)"
            )
        return
    try:
        memory = estimate(config, setting)
    except EstimateError as error:
        rank_zero_warn(str(error))
        return
    if memory.needed <= available:
        return
    batch = setting.batch
    shortfall = (
        f"a step needs {memory.needed / GB:.1f} GB of a device that has {available / GB:.1f} GB "
        f"(micro-batches of {batch.rows} rows of {batch.seq_len} positions with up to {batch.n_images} images)"
    )
    if memory.total <= available:  # only the reserve beside the tensors, itself an estimate, does not fit
        rank_zero_warn(f"{shortfall}: it may run out of memory; `{program()} plan` shows the parts")
        return
    changes = "; or ".join(remedies(config, setting, memory.needed, available, rows)) or "a smaller model, or more devices"
    raise UserError(f"{shortfall}; what would fit: {changes}")
