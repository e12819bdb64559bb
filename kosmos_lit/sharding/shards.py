"""Tensors of a module that ranks share out among them: sent from the first rank, gathered, and checked.

Every kind of sharding here cuts a tensor in the same way: each rank holds one run of its elements in row-major order, and
the runs follow one another as the ranks do (FSDP2 cuts along the first axis, FSDP1 a flat vector of several tensors). So one
table of lengths tells who holds what. What is not cut is whole on every rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

WRAPPER = "_fsdp_wrapped_module."
"""What FSDP1 puts into the names below a unit."""
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""By bytes of an element: how its bits are read as a number."""
SUMMED = 1 << 22
"""Elements that are summed up at a time."""


def plain(name: str) -> str:
    """Return a tensor's name as it is without sharding."""
    return name.replace(WRAPPER, "")


def clip_grad_norm(parameters: Iterable[nn.Parameter], limit: float) -> Tensor:
    """Scale gradients, each element of which lies on one rank, to a norm of at most `limit`; return () their norm before.

    One number travels among ranks; all of them must ask. The same as torch.nn.utils.clip_grad_norm_ for one rank.
    """
    grads = [local(parameter.grad) for parameter in parameters if parameter.grad is not None]
    square = nn.utils.get_total_norm(grads).square()
    dist.all_reduce(square)
    norm = square.sqrt()
    torch._foreach_mul_(grads, (limit / (norm + 1e-6)).clamp(max=1.0))
    return norm


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Return all parameters and buffers by their plain names."""
    return {plain(name): tensor.detach() for name, tensor in [*module.named_parameters(), *module.named_buffers()]}


def local(tensor: Tensor) -> Tensor:
    """Return what this rank holds of a tensor, flat; writing into it writes into the tensor."""
    part: Tensor = tensor.detach()
    return (part.to_local() if isinstance(part, DTensor) else part).view(-1)


class ShardedTensors:
    """Which run of each tensor of a sharded module this rank holds."""

    def __init__(self, module: nn.Module, shapes: Mapping[str, torch.Size], device: torch.device) -> None:
        """Let the ranks tell one another how much they hold: all of them must ask.

        Args:
            module: sharded.
            shapes: of the whole tensors, by plain name.
            device: of the tensors.

        Raises: RuntimeError if some of a tensor is missing, or was left on the meta device.
        """
        self.module, self.shapes, self.device = module, shapes, device
        here = tensors_of(module)
        held = [0 if here[name].is_meta else local(here[name]).numel() for name in shapes]
        table = torch.empty(dist.get_world_size() * len(held), dtype=torch.int64, device=device)
        dist.all_gather_into_tensor(table, torch.tensor(held, device=device))
        counts = table.view(-1, len(held)).T.tolist()  # one list for each tensor: how much each rank holds
        self._counts: dict[str, list[int]] = dict(zip(shapes, counts, strict=True))
        for name, shape in shapes.items():
            n, parts = shape.numel(), self._counts[name]
            if sum(parts) != n and any(part != n for part in parts):
                raise RuntimeError(f"{name} has {n} elements, but the ranks hold {parts} of them")

    def _is_cut(self, name: str) -> bool:
        return sum(self._counts[name]) == self.shapes[name].numel()

    def _start(self, name: str) -> int:
        return sum(self._counts[name][: dist.get_rank()]) if self._is_cut(name) else 0

    def own(self, name: str, whole: Tensor) -> Tensor:
        """Return this rank's run of a whole tensor, flat."""
        start = self._start(name)
        return whole.reshape(-1)[start : start + self._counts[name][dist.get_rank()]]

    @torch.no_grad()
    def fill(self, source: Mapping[str, Tensor] | None) -> Tensor:
        """Send out the first rank's tensors, one at a time whole on each device: all ranks take part.

        Return (n,) checksums of what the first rank sent, for `check`.
        """
        here, sums = tensors_of(self.module), torch.zeros(len(self.shapes), dtype=torch.int64, device=self.device)
        for number, (name, shape) in enumerate(self.shapes.items()):
            whole = torch.empty(shape, dtype=here[name].dtype, device=self.device)
            if source is not None:
                sums[number] = checksum(whole.copy_(source[name]).view(-1))
            dist.broadcast(whole, src=0)
            local(here[name]).copy_(self.own(name, whole))
        dist.broadcast(sums, src=0)
        return sums

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take this rank's runs out of whole tensors that every rank can read."""
        here = tensors_of(self.module)
        for name, whole in state.items():
            local(here[name]).copy_(self.own(name, whole))

    @torch.no_grad()
    def gather(self, name: str, part: Tensor) -> Tensor:
        """Return the whole of a tensor that is cut as `name` is, on every rank: all of them must ask."""
        part, counts = local(part), self._counts[name]
        if not self._is_cut(name):
            return part.view(self.shapes[name])
        longest = max(counts)
        padded = part.new_zeros(longest)
        padded[: len(part)] = part
        runs = part.new_empty(len(counts), longest)
        dist.all_gather_into_tensor(runs.view(-1), padded)
        return torch.cat([run[:n] for run, n in zip(runs, counts, strict=True)]).view(self.shapes[name])

    @torch.no_grad()
    def sums(self) -> Tensor:
        """Return (n,) checksums, one for each tensor, the same however it is cut: all ranks must ask."""
        here = tensors_of(self.module)
        mine = torch.stack([checksum(local(here[name]), self._start(name)) for name in self.shapes])
        cut = torch.tensor([self._is_cut(name) for name in self.shapes], device=self.device)
        added = mine.clone()
        dist.all_reduce(added)
        return torch.where(cut, added, mine)

    def check(self, wanted: Tensor, what: str) -> None:
        """Make sure that every rank holds what it should.

        Args:
            wanted: (n,) checksums of the whole tensors, the same on every rank.
            what: names the moment in the error's message.

        Raises: RuntimeError on every rank, naming the first tensor that differs on any.
        """
        wrong = (self.sums() != wanted).int()
        dist.all_reduce(wrong, dist.ReduceOp.MAX)
        if bad := [name for name, differs in zip(self.shapes, wrong.tolist(), strict=True) if differs]:
            raise RuntimeError(f"{what}: {len(bad)} of {len(wrong)} tensors are not the first rank's, {bad[0]} for one")


def checksum(flat: Tensor, start: int = 0) -> Tensor:
    """Return a sum over an (n,) tensor's bits, each weighted by its place: exact modulo 2^64, and so additive over runs.

    Args:
        flat: (n,) elements of any type.
        start: place of the first one.
    """
    bits, total = flat.contiguous().view(INTEGERS[flat.element_size()]), flat.new_zeros((), dtype=torch.int64)
    for first in range(0, len(bits), SUMMED):
        part = bits[first : first + SUMMED].long()
        total += (part * torch.arange(start + first + 1, start + first + 1 + len(part), device=part.device)).sum()
    return total
