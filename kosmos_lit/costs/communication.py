"""What an optimizer step sends over a device's links, how long that takes, and how much of it computing does not hide.

Bytes are those that each device sends, and as many arrive meanwhile. For N bytes and g ranks the usual ring algorithms send

    all-gather, reduce-scatter      (g - 1) / g N
    all-reduce                      2 (g - 1) / g N         a reduce-scatter, then an all-gather

(Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms for clusters of workstations", 2009; PERFORMANCE.md of
nccl-tests). What is sent, with float32 gradients and n micro-batches a step on each rank; s ranks hold the model together:

    DDP     all-reduce of all gradients, once
    FSDP    of the blocks: all-gather of the weights in the compute dtype in each forward pass, and in each backward pass if
            they are resharded; reduce-scatter of the gradients, n times or once. Of the root, in float32: both once (FSDP2),
            or n times (FSDP1)
    HSDP    the same among the s ranks of a replica; and all-reduce over replicas of a rank's 1/s of the gradients, once

Overlap: what concerns the blocks is hidden behind the blocks' own operations, pass by pass, as far as these last long
enough: a forward pass's gathers behind that pass, a third of their time; what belongs to a backward pass behind the other
two thirds; sums that happen once a step behind the last backward pass. Nothing hides what concerns the root: its weights are
needed first, and its gradients complete last, as embedding and output matrix are one. Transfers within a node and between
nodes are added up. Neither latency nor other jobs' traffic is counted: real networks need more.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kosmos_lit.costs.memory import AUTOCAST, Setting
from kosmos_lit.model import Kosmos


@dataclass(frozen=True, kw_only=True)
class Links:
    """A device's bandwidths, in bytes a second in each direction."""

    within_node: float
    between_nodes: float
    devices_per_node: int

    def in_one_node(self, n_ranks: int, stride: int = 1) -> bool:
        """Return whether each group of ranks `stride` apart lies in one node; ranks are numbered node by node."""
        # A group and those between its ranks start at a multiple of their number: if that divides a node, they lie in it.
        return self.devices_per_node % (n_ranks * stride) == 0


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Numbers of parameters."""

    blocks: int
    """Of the decoder's layers."""
    blocks_trained: int
    root: int
    """Of everything else but the tower's frozen part, which is never sent."""
    root_trained: int

    @classmethod
    def of(cls, net: Kosmos) -> Sizes:
        """Return those of a model."""
        layers = list(net.decoder.layers.parameters())
        frozen_tower = sum(p.numel() for p in net.vision.parameters() if not p.requires_grad)
        blocks = sum(p.numel() for p in layers)
        blocks_trained = sum(p.numel() for p in layers if p.requires_grad)
        return cls(
            blocks=blocks,
            blocks_trained=blocks_trained,
            root=sum(p.numel() for p in net.parameters()) - blocks - frozen_tower,
            root_trained=sum(p.numel() for p in net.parameters() if p.requires_grad) - blocks_trained,
        )


@dataclass(frozen=True, kw_only=True)
class Communication:
    """What a device sends in an optimizer step."""

    within_node: float
    """Bytes."""
    between_nodes: float
    """Bytes."""
    seconds: float
    exposed_seconds: float
    """Those that are not hidden behind the blocks' operations."""

    @property
    def total(self) -> float:
        """Return the bytes that a device sends."""
        return self.within_node + self.between_nodes


def all_gather(n_bytes: float, n_ranks: int) -> float:
    """Return the bytes that each rank sends in an all-gather to, or a reduce-scatter of, `n_bytes`."""
    return (n_ranks - 1) / n_ranks * n_bytes


def all_reduce(n_bytes: float, n_ranks: int) -> float:
    """Return the bytes that each rank sends in an all-reduce of `n_bytes`."""
    return 2 * all_gather(n_bytes, n_ranks)


def communication(
    sizes: Sizes, setting: Setting, links: Links, block_seconds: float, *, root_every_micro_batch: bool = False
) -> Communication:
    """Return what a device sends in a step of a run.

    Args:
        sizes: of the model.
        setting: of the run.
        links: of each device.
        block_seconds: time that the layers' operations of one micro-batch take, forward and backward.
        root_every_micro_batch: whether the root is gathered and reduced for each micro-batch (FSDP1).
    """
    W, n = setting.world_size, setting.n_micro_batches
    s = (setting.ranks_per_replica or W) if setting.strategy == "fsdp" else 1
    forward, backward = block_seconds / 3, block_seconds * 2 / 3
    sent = {True: 0.0, False: 0.0}  # within a node, and between nodes

    def time(
        collective: Callable[[float, int], float], n_bytes: float, n_ranks: int, stride: int = 1, times: int = 1
    ) -> float:
        """Count a transfer that happens `times` times a step, and return how long it takes once."""
        one, within = collective(n_bytes, n_ranks), links.in_one_node(n_ranks, stride)
        sent[within] += times * one
        return one / (links.within_node if within else links.between_nodes)

    itemsize = 2 if setting.precision in AUTOCAST else 4
    n_gathers, n_sums = n * (1 + setting.reshards), n if setting.sums_every_micro_batch else 1
    n_root = n if root_every_micro_batch else 1
    # With one rank a replica, as under DDP, there is nothing to gather or scatter: these send nothing.
    gather = time(all_gather, itemsize * sizes.blocks, s, times=n_gathers)
    scatter = time(all_gather, 4 * sizes.blocks_trained, s, times=n_sums)
    root = time(all_gather, 4 * sizes.root, s, times=n_root) + time(all_gather, 4 * sizes.root_trained, s, times=n_root)
    # Over replicas, which are the ranks themselves under DDP.
    reduce = time(all_reduce, 4 * sizes.blocks_trained / s, W // s, stride=s)
    reduce_root = time(all_reduce, 4 * sizes.root_trained / s, W // s, stride=s)

    def exposed(seconds: float, hidden_behind: float) -> float:
        return max(0.0, seconds - hidden_behind)

    again = gather if setting.reshards else 0.0
    others = again + (scatter if setting.sums_every_micro_batch else 0.0)
    shown = n * exposed(gather, forward) + (n - 1) * exposed(others, backward)
    shown += exposed(again + scatter + reduce, backward) + n_root * root + reduce_root
    seconds = n_gathers * gather + n_sums * scatter + n_root * root + reduce + reduce_root
    return Communication(within_node=sent[True], between_nodes=sent[False], seconds=seconds, exposed_seconds=shown)
