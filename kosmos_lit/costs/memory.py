"""An estimate of the bytes that a training step takes on a device, by category, without the device.

    weights, gradients, optimizer state     counted from the parameters: what a rank holds of them under its strategy
    everything else                         from one micro-batch on tensors without storage (`allocations`)

The estimate is the peak of any step but the first, when the optimizer's state exists, as `torch.cuda.max_memory_allocated`
measures it. A process needs `RESERVE` beside it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from kosmos_lit.batch import KosmosBatch
from kosmos_lit.config import KosmosConfig
from kosmos_lit.init_from import freeze as freeze_parameters
from kosmos_lit.model import Kosmos
from kosmos_lit.vision import describe

if TYPE_CHECKING:
    from kosmos_lit.costs.allocations import AllocationTracker
    from kosmos_lit.costs.compiled import Partition

GB = 1e9
RESERVE = 2.0 * GB
"""Bytes of a GPU that tensors cannot have: CUDA's context, libraries' workspaces, NCCL's buffers."""
SLACK = 0.04
"""Share of the tensors' bytes that the allocator loses to gaps between them."""
AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
"""Compute dtypes beside float32 weights, by Lightning's names; other precisions compute in the dtype of the weights."""
TRUE = {"bf16-true": torch.bfloat16, "16-true": torch.float16, "64-true": torch.float64}
"""Dtypes of the weights themselves, where they are not float32."""
WEIGHTS, GRADIENTS, MOMENTS, COPIES, BATCH, BACKWARD, BUCKETS, UNITS, LOSS = (
    "weights",
    "gradients",
    "optimizer state",
    "weights in bfloat16",
    "batch",
    "backward pass",
    "gradient buckets",
    "gathered units",
    "logits and loss",
)
MODULES = {"vision": "image tower", "connector": "connector", "decoder": "decoder"}
"""Categories of what the model's parts allocate in their forward passes."""

Strategy = Literal["one", "ddp", "fsdp"]


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """The sizes of a run's largest micro-batch."""

    rows: int
    seq_len: int
    n_images: int
    n_targets: int
    """Supervised tokens."""

    def with_rows(self, rows: int) -> MicroBatch:
        """Return the sizes with another number of rows that are as full."""
        images, targets = (-(-n * rows // self.rows) for n in (self.n_images, self.n_targets))  # rounded up
        return replace(self, rows=rows, n_images=images, n_targets=targets)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What decides a run's memory beside the model."""

    batch: MicroBatch
    device: Literal["cuda", "cpu"] = "cuda"
    precision: str = "32-true"
    """Lightning's name."""
    strategy: Strategy = "one"
    world_size: int = 1
    ranks_per_replica: int | None = None
    """Sharded: ranks that hold the model together; None: all."""
    reshards: bool = True
    """Sharded: a block's gathered weights are freed between its forward and its backward pass."""
    sums_every_micro_batch: bool = True
    """Sharded: gradients are reduced over ranks after each micro-batch, not only after the last one of a step."""
    has_bucket_views: bool = False
    """DDP: gradients are views of the buckets that are summed over ranks, which exist all the time."""
    n_micro_batches: int = 1
    """Of a rank in an optimizer step; from the second one on, gradients are resident."""
    freeze: tuple[str, ...] = ()
    """`model.freeze`."""


class EstimateError(Exception):
    """A step's memory could not be estimated: no reason to end a run or a plan."""


@dataclass(frozen=True)
class Memory:
    """Peak bytes of one rank's device by category."""

    parts: dict[str, int]

    @property
    def total(self) -> int:
        """Return what `torch.cuda.max_memory_allocated` returns."""
        return sum(self.parts.values())

    @property
    def needed(self) -> int:
        """Return the memory that a GPU must have."""
        return int(self.total * (1 + SLACK) + RESERVE)


def estimate(config: KosmosConfig, setting: Setting) -> Memory:
    """Return the peak memory of a step on a rank's device.

    Raises:
        UserError: if the model cannot be built.
        EstimateError: if anything else fails. Callers should warn and go on: the estimate depends on private parts of
            PyTorch, which another version may change.
    """
    with torch.random.fork_rng(devices=[]):  # a run's own random numbers must not depend on whether it is estimated
        net = training_model(config, setting)
    try:
        # By `repr`: a tower's architecture may be a table, which cannot be hashed.
        parts = _micro_batch_peak(net, setting, _partitions(repr(config), setting.precision))
    except Exception as error:  # private parts of another PyTorch may raise anything
        reason = f"{type(error).__name__}: {error}".strip().partition("\n")[0]  # PyTorch's messages go on for many lines
        raise EstimateError(f"the memory of a step is unknown, as its estimate failed: {reason}") from error
    if _is_sharded(setting):
        return Memory(_ordered(parts | _shards(net, setting)))
    trained = bytes_of(p for p in net.parameters() if p.requires_grad)
    parts[MOMENTS] = 2 * trained  # AdamW's two
    if setting.strategy == "ddp" and setting.world_size > 1 and not setting.has_bucket_views:
        parts[BUCKETS] = trained  # DDP copies gradients into buckets for its sums
    return Memory(_ordered(parts))


@cache
def _partitions(config: str, precision: str) -> dict[Any, Partition]:
    """Return the partitions of a model's compiled parts so far: each takes a second, and estimates share many."""
    return {}


def meta_model(config: KosmosConfig, freeze: Sequence[str] = ()) -> Kosmos:
    """Return a model without weights, on the meta device, whose parameters know whether they train; nothing is downloaded.

    Raises: UserError if it cannot be built, or if a pattern in `freeze` matches nothing.
    """
    # Modules that are imported for the first time may create tensors, which must not be on the meta device.
    describe(config.vision)
    if config.lora is not None:
        import peft  # noqa: F401
    net = Kosmos.on_meta(config)
    freeze_parameters(net, list(freeze))
    return net


def training_model(config: KosmosConfig, setting: Setting) -> Kosmos:
    """Return a model on the meta device whose weights have the dtypes that they have in training."""
    # sdpa: the kernel that `fake_device` stands in for.
    net = meta_model(replace(config, decoder=replace(config.decoder, attention_kernel="sdpa")), setting.freeze)
    if setting.precision in TRUE:
        net.to(TRUE[setting.precision])
    if setting.precision == "bf16-mixed":
        for matrix in net.vision.frozen_matrices().values():
            matrix.data = matrix.data.bfloat16()  # `round_frozen`; its originals are in host memory
    if _is_sharded(setting) and setting.precision in AUTOCAST:
        # Blocks are gathered in the compute dtype, so that autocast copies none of their weights.
        net.decoder.layers.to(AUTOCAST[setting.precision])
    return net.train()


def _is_sharded(setting: Setting) -> bool:
    return setting.strategy == "fsdp" and setting.world_size > 1


def _micro_batch_peak(net: Kosmos, setting: Setting, partitions: dict[Any, Partition]) -> dict[str, int]:
    """Return the peak bytes by category while a micro-batch goes through the model, forward and backward."""
    # Imported here so that a PyTorch without the private parts that these files use fails an estimate, and not a run.
    from kosmos_lit.costs.allocations import AllocationTracker, fake_device
    from kosmos_lit.costs.compiled import stand_ins

    is_sharded, compiles = _is_sharded(setting), net.config.decoder.compile
    with fake_device(setting.device):
        net.to_empty(device=setting.device)
        tracker = AllocationTracker(setting.device, BATCH, COPIES)
        if compiles or (compiles is None and setting.device == "cuda"):  # null: on CUDA
            net.compile_blocks(stand_ins(tracker, partitions))
        with tracker:
            tracker.add_weights(net, WEIGHTS)
            # The peak is that of a later micro-batch, which starts with the gradients of those before it.
            if (setting.n_micro_batches > 1 or setting.has_bucket_views) and not is_sharded:
                _allocate_gradients(net, tracker)
            _run(net, setting, tracker, keep_gradients=not is_sharded)
    return +tracker.peak  # positive counts only


def _allocate_gradients(net: Kosmos, tracker: AllocationTracker) -> None:
    for parameter in net.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
            tracker.add(parameter.grad, GRADIENTS)


def _run(net: Kosmos, setting: Setting, tracker: AllocationTracker, *, keep_gradients: bool) -> None:
    """Put a micro-batch through the model, forward and backward."""
    from kosmos_lit.costs.allocations import backward

    def keep(parameter: Tensor) -> None:
        assert parameter.grad is not None
        if keep_gradients:
            tracker.add(parameter.grad, GRADIENTS)
        else:
            parameter.grad = None  # `_shards` counts what a rank holds of it

    for parameter in net.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(keep)  # type: ignore[no-untyped-call]
    for name, category in MODULES.items():
        tracker.track_module(net.get_submodule(name), category)
    batch = dummy_batch(setting, net.config.vision.image_size)
    tracker.category = LOSS
    compute = AUTOCAST.get(setting.precision)
    with torch.autocast(setting.device, compute, enabled=compute is not None):
        losses = [net.loss(batch, 1.0)[0]]  # in a list, which `backward` empties: the graph has no other owner
    tracker.category = BACKWARD
    backward(losses)


def dummy_batch(setting: Setting, image_size: int) -> KosmosBatch:
    """Return a micro-batch of zeros with the setting's sizes, one document a row."""
    b = setting.batch

    def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=setting.device)

    B, T, N = b.rows, b.seq_len, b.n_images
    return KosmosBatch(
        tokens=zeros(B, T),
        targets=zeros(B, T),
        positions=zeros(B, T),
        lengths=(T,) * B,
        loss_at=zeros(b.n_targets),
        images=zeros(N, 3, image_size, image_size, dtype=torch.uint8),
        slots=zeros(N, 2),
        corpus=zeros(B),
        n_bytes=zeros(B),
        rows=tuple(range(B)),
        n_step_targets=1,
        n_real=B * T,
    )


def _shards(net: Kosmos, setting: Setting) -> dict[str, int]:
    """Return what a rank holds of a sharded model (FSDP) instead of the model: its shards, and the gathered units.

    Gathered are the root in float32 with its gradients, and in the compute dtype the current block and the next one, or
    all blocks unless they are resharded; beside them a block's gradients, in the compute dtype and in float32 for their
    reduction. The frozen part of the tower is not sharded.
    """
    parameters, itemsize = dict(net.named_parameters()), 2 if setting.precision in AUTOCAST else 4
    replicated = [p for name, p in parameters.items() if name.startswith("vision.") and not p.requires_grad]
    frozen = bytes_of(replicated)
    trained = bytes_of_trained(net)
    sharded = 4 * (sum(p.numel() for p in parameters.values()) - sum(p.numel() for p in replicated))
    blocks = [sum(p.numel() for p in layer.parameters()) for layer in net.decoder.layers]
    root = sharded - 4 * sum(blocks)  # what is in no block: embeddings, connector, trained parts of the tower
    root_trained = trained - bytes_of_trained(net.decoder.layers)
    gathered = 2 * max(blocks) if setting.reshards else sum(blocks)
    W = setting.ranks_per_replica or setting.world_size
    keeps_gradients = setting.n_micro_batches > 1 and not setting.sums_every_micro_batch
    return {
        WEIGHTS: frozen + sharded // W,
        GRADIENTS: trained if keeps_gradients else trained // W,
        MOMENTS: 2 * trained // W,
        UNITS: root + (0 if keeps_gradients else root_trained) + itemsize * gathered + (itemsize + 4) * max(blocks),
    }


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of tensors together."""
    return sum(t.numel() * t.element_size() for t in tensors)


def bytes_of_trained(module: nn.Module) -> int:
    """Return the bytes of a module's trained parameters in float32."""
    return sum(4 * p.numel() for p in module.parameters() if p.requires_grad)


def _ordered(parts: Mapping[str, int]) -> dict[str, int]:
    order = (WEIGHTS, GRADIENTS, MOMENTS, BUCKETS, COPIES, UNITS, BATCH, *MODULES.values(), LOSS, BACKWARD)
    assert set(parts) <= set(order), sorted(set(parts) - set(order))
    return {name: parts[name] for name in order if parts.get(name)}
