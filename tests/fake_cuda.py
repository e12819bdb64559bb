"""A CUDA device that does not exist: code runs on it as on a GPU, on tensors that have a device and no elements.

`kosmos_lit.costs.allocations.fake_device` makes the tensors and walks the autograd graph; what Lightning and the project ask
`torch.cuda` is answered by the functions of this file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import cycle
from types import SimpleNamespace
from typing import Any
from unittest import mock

import lightning as L
import torch
from torch import Tensor, nn

from kosmos_lit.batch import KosmosBatch
from kosmos_lit.costs.allocations import backward, fake_device
from kosmos_lit.lit import KosmosLit
from kosmos_lit.tokenizer import Tokenizer

DEVICE = torch.device("cuda", 0)


@contextmanager
def fake_cuda(memory: float = 80e9, name: str = "NVIDIA H100 80GB HBM3", n_devices: int = 1) -> Iterator[None]:
    """Run a block as on a machine with GPUs, whose tensors have no elements."""
    answers: dict[str, Any] = {
        "device_count": n_devices, "current_device": 0, "set_device": None, "empty_cache": None, "synchronize": None,
        "get_device_name": name, "get_device_properties": SimpleNamespace(total_memory=int(memory), name=name),
        "max_memory_allocated": 0, "max_memory_reserved": 0, "manual_seed_all": None,
    }  # fmt: skip
    with fake_device("cuda"), mock.patch.multiple(torch.cuda, **{k: mock.Mock(return_value=v) for k, v in answers.items()}):
        patch = mock.patch.object
        pins = patch(Tensor, "pin_memory", _pin_memory)
        # Whether documents see one another is read from losses, which have no value.
        leaks = patch(KosmosLit, "_check_leaks", lambda self: None)
        # The engine has a thread for each device, and would start one.
        walk = patch(KosmosLit, "backward", lambda self, loss: backward([loss]))
        with pins, leaks, walk, patch(nn.Module, "_apply", _apply):
            yield


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
