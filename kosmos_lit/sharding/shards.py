"""Sharded tensors of a module: broadcast from rank 0, gathered, and checked by checksum.

Both strategies shard a tensor alike: each rank holds one contiguous slice of its elements in row-major order, in the order
of the ranks (FSDP2 shards along the first axis, FSDP1 a flat vector of several tensors). So the number of elements on each
rank gives the whole layout. A tensor that is not sharded is replicated: every rank holds all of it. With HSDP this is
so within each group of ranks that holds the model together; the groups' slices are the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

FSDP1_PREFIX = "_fsdp_wrapped_module."
"""Part of a parameter's name below each FSDP1 unit."""
INTEGER_DTYPES = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integer dtype of an element's bits, by its size in bytes."""
CHECKSUM_CHUNK = 1 << 22
"""Elements that a checksum adds up at a time, which bounds its memory."""


def original_name(name: str) -> str:
    """Return a tensor's name in the unsharded model."""
    return name.replace(FSDP1_PREFIX, "")


def clip_grad_norm(parameters: Iterable[nn.Parameter], limit: float, n_replicas: int = 1) -> Tensor:
    """Scale sharded gradients to a global norm of at most `limit`; return () the norm before. Collective.

    Each element of a gradient must lie on exactly `n_replicas` ranks. On one rank this is torch.nn.utils.clip_grad_norm_.
    """
    grads = [local_shard(parameter.grad) for parameter in parameters if parameter.grad is not None]
    square = nn.utils.get_total_norm(grads).square()  # squares of norms add up over shards
    # Over all ranks, not over those of one replica: the sum has the same bits everywhere, and so replicas stay equal.
    dist.all_reduce(square)
    norm = (square / n_replicas).sqrt()
    # 1e-6 as in torch; at most 1, as clipping never scales up.
    torch._foreach_mul_(grads, (limit / (norm + 1e-6)).clamp(max=1.0))
    return norm


def named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return all parameters and buffers, detached, by their original names."""
    return {original_name(name): tensor.detach() for name, tensor in [*module.named_parameters(), *module.named_buffers()]}


def local_shard(tensor: Tensor) -> Tensor:
    """Return this rank's shard of a tensor as a flat view."""
    part: Tensor = tensor.detach()
    return (part.to_local() if isinstance(part, DTensor) else part).view(-1)


class ShardedTensors:
    """The parameters and buffers of a sharded module, and the slice of each that every rank holds."""

    def __init__(
        self,
        module: nn.Module,
        shapes: Mapping[str, torch.Size],
        device: torch.device,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        """Exchange the sizes of all shards. Collective: all ranks must call it.

        Args:
            module: the sharded module.
            shapes: shapes of the full tensors, by original name.
            device: of the tensors.
            group: ranks that hold the tensors together; None: all.

        Raises: RuntimeError if elements of a tensor are missing, or were left on the meta device.
        """
        self.module, self.shapes, self.device, self._group = module, shapes, device, group
        self._rank = dist.get_rank(group)
        tensors = named_tensors(module)
        # What is still on the meta device counts as missing.
        local_sizes = [0 if tensors[name].is_meta else local_shard(tensors[name]).numel() for name in shapes]
        table = torch.empty(dist.get_world_size(group) * len(local_sizes), dtype=torch.int64, device=device)
        dist.all_gather_into_tensor(table, torch.tensor(local_sizes, device=device), group=group)
        counts = table.view(-1, len(local_sizes)).T.tolist()  # one list for each tensor: elements on each rank
        self._counts: dict[str, list[int]] = dict(zip(shapes, counts, strict=True))
        for name, shape in shapes.items():
            n, sizes = shape.numel(), self._counts[name]
            if sum(sizes) != n and any(size != n for size in sizes):  # neither sharded nor replicated
                raise RuntimeError(f"{name} has {n} elements, but the ranks hold {sizes} of them")

    def _is_sharded(self, name: str) -> bool:
        return sum(self._counts[name]) == self.shapes[name].numel()

    def _start(self, name: str) -> int:
        return sum(self._counts[name][: self._rank]) if self._is_sharded(name) else 0

    def local_slice(self, name: str, full: Tensor) -> Tensor:
        """Return this rank's slice of a full tensor, flat."""
        start = self._start(name)
        return full.reshape(-1)[start : start + self._counts[name][self._rank]]

    @torch.no_grad()
    def broadcast(self, full_tensors: Mapping[str, Tensor] | None) -> Tensor:
        """Copy rank 0's tensors into the module's shards. Collective: all ranks must call it.

        Args:
            full_tensors: by original name on rank 0, None on other ranks. One at a time is full on each device.

        Returns: (n,) checksums of rank 0's tensors, for `check`.
        """
        tensors, checksums = named_tensors(self.module), torch.zeros(len(self.shapes), dtype=torch.int64, device=self.device)
        for number, (name, shape) in enumerate(self.shapes.items()):
            full = torch.empty(shape, dtype=tensors[name].dtype, device=self.device)  # one tensor at a time
            if full_tensors is not None:
                checksums[number] = checksum(full.copy_(full_tensors[name]).view(-1))
            dist.broadcast(full, src=0)
            local_shard(tensors[name]).copy_(self.local_slice(name, full))
        dist.broadcast(checksums, src=0)
        return checksums

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Copy this rank's slices of full tensors, which every rank can read, into the module."""
        tensors = named_tensors(self.module)
        for name, full in state.items():
            local_shard(tensors[name]).copy_(self.local_slice(name, full))

    @torch.no_grad()
    def gather(self, name: str, tensor: Tensor) -> Tensor:
        """Return the full tensor of one that is sharded as `name` is, on every rank. Collective."""
        shard, counts = local_shard(tensor), self._counts[name]
        if not self._is_sharded(name):
            return shard.view(self.shapes[name])
        longest = max(counts)
        # all_gather_into_tensor needs equal sizes on all ranks.
        padded = shard.new_zeros(longest)
        padded[: len(shard)] = shard
        shards = shard.new_empty(len(counts), longest)
        dist.all_gather_into_tensor(shards.view(-1), padded, group=self._group)
        # Without each rank's padding.
        return torch.cat([row[:n] for row, n in zip(shards, counts, strict=True)]).view(self.shapes[name])

    @torch.no_grad()
    def checksums(self) -> Tensor:
        """Return (n,) checksums of the full tensors, equal for every sharding. Collective: all ranks must call it."""
        tensors = named_tensors(self.module)
        of_shards = torch.stack([checksum(local_shard(tensors[name]), self._start(name)) for name in self.shapes])
        is_sharded = torch.tensor([self._is_sharded(name) for name in self.shapes], device=self.device)
        totals = of_shards.clone()
        dist.all_reduce(totals, group=self._group)
        # A replicated tensor was summed once for each rank.
        return torch.where(is_sharded, totals, of_shards)

    def check(self, expected: Tensor, moment: str) -> None:
        """Compare the tensors of all ranks with checksums. Collective: all ranks must call it.

        Args:
            expected: (n,) checksums of the full tensors, equal on every rank.
            moment: when they are compared, for the error's message.

        Raises: RuntimeError on every rank, naming the first tensor that differs on any.
        """
        differs = (self.checksums() != expected).int()
        dist.all_reduce(differs, dist.ReduceOp.MAX)  # all ranks raise, or none: one alone would leave the others waiting
        if names := [name for name, is_wrong in zip(self.shapes, differs.tolist(), strict=True) if is_wrong]:
            raise RuntimeError(f"{moment}: {len(names)} of {len(differs)} tensors differ from rank 0's, {names[0]} for one")


def checksum(flat: Tensor, start: int = 0) -> Tensor:
    """Return the sum of an (n,) tensor's elements as integers, each times its index from 1 on, modulo 2^64.

    Integer sums are exact, so checksums of consecutive slices add up to that of the full tensor.

    Args:
        flat: (n,) elements of any dtype.
        start: index of the first one in the full tensor.
    """
    # Bits, not values: NaN equals itself, and -0 differs from 0.
    bits, total = flat.contiguous().view(INTEGER_DTYPES[flat.element_size()]), flat.new_zeros((), dtype=torch.int64)
    for first in range(0, len(bits), CHECKSUM_CHUNK):
        part = bits[first : first + CHECKSUM_CHUNK].long()
        # Times the index, so that elements in another order differ.
        total += (part * torch.arange(start + first + 1, start + first + 1 + len(part), device=part.device)).sum()
    return total
