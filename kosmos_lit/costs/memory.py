"""Bytes that a training step takes on a device, by what they are for, before there is such a device.

    weights, gradients, optimizer state     by counting parameters: what a rank holds of them under its strategy
    everything else                         by running one micro-batch on tensors without storage (see `allocations`)

The figure is the fullest moment of a step that is not the first one, so that the optimizer's state is there, as
`torch.cuda.max_memory_allocated` gives it. What a process needs beside it is `RESERVE`.

Sharded (FSDP), a rank holds its part of weights, gradients and moments, the frozen part of the tower whole, and units that
are gathered: the outermost one in float32, and in the compute dtype the block at work and the next one, or all blocks if
they stay; and the gradients of a block, as it gives them and in float32 as they are summed up.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor

from kosmos_lit.batch import KosmosBatch
from kosmos_lit.config import KosmosConfig
from kosmos_lit.costs.allocations import COPIES, GRADIENTS, Allocations, backward, imagined
from kosmos_lit.costs.fusion import Cut, fused
from kosmos_lit.init_from import freeze as freeze_parameters
from kosmos_lit.model import Kosmos
from kosmos_lit.vision import describe

GB = 1e9
RESERVE = 2.0 * GB
"""Of a GPU's memory that tensors cannot have: CUDA's context, libraries' workspaces, NCCL's buffers."""
SLACK = 0.04
"""Share of the tensors' bytes that the allocator loses to gaps between them."""
AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
"""Compute dtypes beside float32 weights, by Lightning's names; the others compute in the weights' own dtype."""
TRUE = {"bf16-true": torch.bfloat16, "16-true": torch.float16, "64-true": torch.float64}
"""Dtypes of the weights themselves, where they are not float32."""
WEIGHTS, MOMENTS, BATCH, BACKWARD, BUCKETS, UNITS = (
    "weights", "optimizer state", "batch", "backward pass", "gradient buckets", "gathered units",
)  # fmt: skip
PARTS = {"vision": "image tower", "connector": "connector", "decoder": "decoder"}
LOSS = "logits and loss"

Strategy = Literal["one", "ddp", "fsdp"]


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """How large the largest micro-batch of a run is."""

    rows: int
    seq_len: int
    n_images: int
    n_targets: int
    """Supervised tokens."""

    def with_rows(self, rows: int) -> MicroBatch:
        """Return one of other rows that are as full."""
        images, targets = (-(-n * rows // self.rows) for n in (self.n_images, self.n_targets))
        return replace(self, rows=rows, n_images=images, n_targets=targets)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What of a run decides its memory, beside the model."""

    batch: MicroBatch
    device: Literal["cuda", "cpu"] = "cuda"
    precision: str = "32-true"
    """Lightning's name."""
    strategy: Strategy = "one"
    world_size: int = 1
    reshards: bool = True
    """Sharded: a block's weights are given up between its forward and its backward pass."""
    sums_every_micro_batch: bool = True
    """Sharded: gradients are summed up over ranks after each micro-batch, not only after the last one of a step."""
    n_micro_batches: int = 1
    """Of a rank in an optimizer step: behind the first one, gradients are there all the time."""
    freeze: tuple[str, ...] = ()
    """`model.freeze`."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank's device at the fullest moment."""

    parts: dict[str, int]

    @property
    def total(self) -> int:
        """Return what `torch.cuda.max_memory_allocated` would say."""
        return sum(self.parts.values())

    @property
    def certain(self) -> int:
        """Return what any batch needs: weights, gradients, optimizer state."""
        return sum(self.parts.get(name, 0) for name in (WEIGHTS, GRADIENTS, MOMENTS, BUCKETS))

    @property
    def needed(self) -> int:
        """Return the memory that a GPU must have."""
        return int(self.total * (1 + SLACK) + RESERVE)


def estimate(config: KosmosConfig, setting: Setting) -> Memory:
    """Return what a step takes of a rank's device."""
    sharded = _is_sharded(setting)
    with torch.random.fork_rng(devices=[]):  # a run that asks draws no other numbers for it
        net = _model(config, setting)
    with imagined(setting.device):
        net.to_empty(device=setting.device)
        allocations = Allocations(setting.device)
        with ExitStack() as stack:
            if net.config.decoder.compile or (net.config.decoder.compile is None and setting.device == "cuda"):
                net.compile_blocks()
                stack.enter_context(fused(allocations, _known_cuts(repr(config), setting.precision)))
            stack.enter_context(allocations)
            allocations.enter_weights(net, WEIGHTS)
            if setting.n_micro_batches > 1 and not sharded:
                _make_gradients(net, allocations)
            _run(net, setting, allocations, keep_gradients=not sharded)
    parts = +allocations.peak
    if sharded:
        return Memory(_ordered(parts | _shards(net, setting)))
    trained = bytes_of(p for p in net.parameters() if p.requires_grad)
    parts[MOMENTS] = 2 * trained
    if setting.strategy == "ddp" and setting.world_size > 1:
        parts[BUCKETS] = trained
    return Memory(_ordered(parts))


@cache
def _known_cuts(config: str, precision: str) -> dict[Any, Cut]:
    """Return what is known of a model's fused parts; to cut one takes a second, and other batches share the tower's."""
    return {}


def skeleton(config: KosmosConfig, freeze: Sequence[str] = ()) -> Kosmos:
    """Return a model on the meta device, without weights and without a download, whose parameters know whether they train.

    Raises: UserError if it cannot be built, or a name in `freeze` is of nothing.
    """
    describe(config.vision)  # what is imported from here on may make tensors of its own: they must not be on meta
    if config.lora is not None:
        import peft  # noqa: F401
    net = Kosmos.on_meta(config)
    freeze_parameters(net, list(freeze))
    return net


def _model(config: KosmosConfig, setting: Setting) -> Kosmos:
    net = skeleton(replace(config, decoder=replace(config.decoder, attention_kernel="sdpa")), setting.freeze)
    if setting.precision in TRUE:
        net.to(TRUE[setting.precision])
    if _is_sharded(setting) and setting.precision in AUTOCAST:
        net.decoder.layers.to(AUTOCAST[setting.precision])  # they are gathered so; autocast copies none of them
    return net.train()


def _is_sharded(setting: Setting) -> bool:
    return setting.strategy == "fsdp" and setting.world_size > 1


def _make_gradients(net: Kosmos, allocations: Allocations) -> None:
    for parameter in net.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
            allocations.enter(parameter.grad, GRADIENTS)


def _run(net: Kosmos, setting: Setting, allocations: Allocations, *, keep_gradients: bool) -> None:
    """Put a micro-batch through the model, forward and backward."""

    def keep(parameter: Tensor) -> None:
        assert parameter.grad is not None
        if keep_gradients:
            allocations.enter(parameter.grad, GRADIENTS)
        else:
            parameter.grad = None

    for parameter in net.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(keep)  # type: ignore[no-untyped-call]
    for name, part in PARTS.items():
        allocations.watch(net.get_submodule(name), part)
    allocations.purpose = BATCH
    batch = _batch(setting, net.config.vision.image_size)
    allocations.purpose = LOSS
    compute = AUTOCAST.get(setting.precision)
    with torch.autocast(setting.device, compute, enabled=compute is not None):
        losses = [net.loss(batch, 1.0)[0]]
    allocations.purpose = BACKWARD
    backward(losses)


def _batch(setting: Setting, side: int) -> KosmosBatch:
    """Return a micro-batch of the sizes asked for, one document a row; what stands in it makes no difference."""
    b = setting.batch

    def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=setting.device)

    B, T, N = b.rows, b.seq_len, b.n_images
    return KosmosBatch(
        tokens=zeros(B, T), targets=zeros(B, T), positions=zeros(B, T), lengths=(T,) * B, loss_at=zeros(b.n_targets),
        images=zeros(N, 3, side, side, dtype=torch.uint8), slots=zeros(N, 2), corpus=zeros(B), n_bytes=zeros(B),
        rows=tuple(range(B)), n_step_targets=1, n_real=B * T,
    )  # fmt: skip


def _shards(net: Kosmos, setting: Setting) -> dict[str, int]:
    """Return what a rank holds of a sharded model, instead of the whole one: see the first lines of this module."""
    named, width = dict(net.named_parameters()), 2 if setting.precision in AUTOCAST else 4
    whole = sum(4 * p.numel() for name, p in named.items() if name.startswith("vision.") and not p.requires_grad)
    trained = sum(4 * p.numel() for p in named.values() if p.requires_grad)
    everything = sum(4 * p.numel() for p in named.values())
    blocks = [sum(p.numel() for p in layer.parameters()) for layer in net.decoder.layers]
    outermost = everything - whole - 4 * sum(blocks)
    gathered = 2 * max(blocks) if setting.reshards else sum(blocks)
    W, sums_late = setting.world_size, setting.n_micro_batches > 1 and not setting.sums_every_micro_batch
    return {
        WEIGHTS: whole + (everything - whole) // W,
        GRADIENTS: trained if sums_late else trained // W,
        MOMENTS: 2 * trained // W,
        UNITS: outermost + width * gathered + (width + 4) * max(blocks),
    }


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Return what tensors take together."""
    return sum(t.numel() * t.element_size() for t in tensors)


def _ordered(parts: Mapping[str, int]) -> dict[str, int]:
    order = (WEIGHTS, GRADIENTS, MOMENTS, BUCKETS, COPIES, UNITS, BATCH, *PARTS.values(), LOSS, BACKWARD)
    assert set(parts) <= set(order), sorted(set(parts) - set(order))
    return {name: parts[name] for name in order if parts.get(name)}
