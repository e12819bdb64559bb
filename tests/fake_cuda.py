"""A CUDA device that does not exist: code runs on it as on a GPU, on tensors that have a device and no elements.

`kosmos_lit.costs.allocations.fake_device` makes the tensors and walks the autograd graph; what Lightning and the project ask
`torch.cuda` is answered by the functions of this file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import cycle
from types import SimpleNamespace
from typing import Any
from unittest import mock

import lightning as L
import torch
import torch.distributed as dist
import torch.nn.parallel.distributed
from lightning.fabric.strategies.model_parallel import _setup_device_mesh
from lightning.pytorch.strategies import DDPStrategy, Strategy, model_parallel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule

from kosmos_lit.batch import KosmosBatch
from kosmos_lit.costs.allocations import backward, fake_device, patched
from kosmos_lit.lit import KosmosLit
from kosmos_lit.sharding import strategy as sharded
from kosmos_lit.sharding.fsdp import Fsdp2Strategy
from kosmos_lit.tokenizer import Tokenizer

STRATEGIES = DDPStrategy, Fsdp2Strategy
DDP_FUNCTIONS = "_verify_param_shape_across_processes", "_sync_module_states"
DEVICE = torch.device("cuda", 0)


@dataclass(frozen=True, kw_only=True)
class FakeGpu:
    """What a device answers."""

    name: str = "NVIDIA H100 80GB HBM3"
    memory: float = 80e9
    """Bytes."""
    has_bf16: bool = True


@contextmanager
def fake_cuda(gpu: FakeGpu = FakeGpu()) -> Iterator[None]:
    """Run a block as on a machine with a GPU, whose tensors have no elements."""
    answers: dict[str, Any] = {
        "device_count": 1,
        "current_device": 0,
        "set_device": None,
        "empty_cache": None,
        "synchronize": None,
        "get_device_name": gpu.name,
        "is_bf16_supported": gpu.has_bf16,
        "get_device_properties": SimpleNamespace(total_memory=int(gpu.memory), name=gpu.name),
        "max_memory_allocated": 0,
        "max_memory_reserved": 0,
        "manual_seed_all": None,
        "is_current_stream_capturing": False,
    }
    replacements: list[tuple[Any, str, Any]] = [
        *((torch.cuda, question, mock.Mock(return_value=answer)) for question, answer in answers.items()),
        *((torch.cuda, name, mock.MagicMock()) for name in ("Stream", "Event", "current_stream")),
        (torch.cuda, "stream", nullcontext),
        # Fake tensors can be neither pinned nor swapped in place.
        (Tensor, "pin_memory", _pin_memory),
        (nn.Module, "_apply", _apply),
        # Whether documents see one another is read from losses, which have no value.
        (KosmosLit, "_check_leaks", lambda self: None),
        # The engine has a thread for each device, and would start one.
        (KosmosLit, "backward", _backward),
        # With one rank, what all ranks have is what this one has.
        *((owner, name, _own) for owner in STRATEGIES for name in ("broadcast", "reduce_boolean_decision")),
        # DDP's parts in C++ read addresses, which fake tensors do not have.
        *((torch.nn.parallel.distributed, name, mock.MagicMock()) for name in DDP_FUNCTIONS),
        *((dist, name, mock.MagicMock()) for name in ("Reducer", "Logger")),
        # FSDP: the mesh is a tensor whose values are read; weights that are no numbers are neither broadcast nor compared.
        (model_parallel, "_setup_device_mesh", _real_device_mesh),
        (sharded, "build_on_rank_zero", lambda build: build()),
        (sharded, "ShardedTensors", mock.MagicMock()),
    ]
    with fake_device("cuda"), patched(*replacements):
        yield


def _backward(lit: KosmosLit, loss: Tensor) -> None:
    units = [module for module in lit.modules() if isinstance(module, FSDPModule)]
    if not units:
        backward([loss])
        return
    # FSDP2's hooks are called by the engine alone: the gradients of the shards without the way to them.
    for unit in units:
        unit.reshard()
    for parameter in lit.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)


def _real_device_mesh(*arguments: Any) -> DeviceMesh:
    with unset_fake_temporarily():
        return _setup_device_mesh(*arguments)


def _own(strategy: Strategy, value: Any, *_: Any, **__: Any) -> Any:
    return value


def _pin_memory(tensor: Tensor) -> Tensor:
    pinned = torch.empty_like(tensor)  # without elements, also where those of `tensor` are known
    pinned.is_fake_pinned = True  # type: ignore[attr-defined]
    return pinned


def _apply(module: nn.Module, move: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """Move a module by new parameters: fake tensors cannot be swapped in place."""
    for child in module.children() if recurse else ():
        child._apply(move)
    for name, parameter in module._parameters.items():
        if parameter is not None:
            module._parameters[name] = nn.Parameter(move(parameter.detach()), parameter.requires_grad)
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = move(buffer)
    return module


class FakeData(L.LightningDataModule):
    """A data module of the sizes that a run asks for, and batches that are made of nothing."""

    def __init__(self, batches: list[KosmosBatch], tokenizer: Tokenizer, micro_batches: int = 1) -> None:
        super().__init__()
        self.batches, self.tokenizer = batches, tokenizer
        rows, self.seq_len = batches[0].tokens.shape
        self.micro_batch_rows, self.global_batch_rows = rows, rows * micro_batches
        self.kinds = {"text": 0, "caption": 1, "interleaved": 2}

    def largest_micro_batch(self) -> tuple[int, int]:
        return max(len(b.images) for b in self.batches), max(len(b.loss_at) for b in self.batches)

    def train_dataloader(self) -> Loader:
        return Loader(self.batches)


class Loader:
    """Yields batches, as often as the run asks."""

    def __init__(self, batches: list[KosmosBatch]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[KosmosBatch]:
        return (batch.pin_memory() for batch in cycle(self.batches))
