"""Training with weights, gradients and optimizer state sharded over ranks (ZeRO-3 or ZeRO-2).

Units, in both strategies: each decoder block, and the root with everything else that trains. A block's weights are gathered
for its forward and for its backward pass; the root's stay gathered from one to the other, with FSDP2 even for all
micro-batches of a step, after which its gradients are reduced. The tied embedding is used at both ends, and the number of a
rank's calls of tower and connector depends on its images: in the root, no such call is a collective. Frozen tensors of the
tower are replicated. With HSDP a group of ranks holds all units together, and is a replica of every other group.

Weights: rank 0 builds the model as a single process does, the others build it on the meta device. The units are sharded
while they are empty; then rank 0 broadcasts its tensors. So initial weights equal a single process's bit by bit for any
strategy and world size, and only rank 0 reads files or draws random numbers.

Arithmetic in bf16-mixed: master weights, optimizer state, the sum of gradients over ranks and micro-batches and the residual
stream are float32; matrix products are bfloat16, as under autocast in a single process. Blocks' weights are gathered in
bfloat16, which rounds those of their LayerNorms too: the one difference. On CPUs a block's input is bfloat16 (`fsdp.py`).

Checkpoints are the single files that a single process writes; any number of ranks resumes them, sharded or not.
"""

from __future__ import annotations

import sys
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import lightning as L
import torch.distributed as dist
from lightning.pytorch.strategies.parallel import ParallelStrategy
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from kosmos_lit.checkpoint import load_agreed
from kosmos_lit.errors import UserError
from kosmos_lit.sharding.shards import ShardedTensors, named_tensors, original_name

if TYPE_CHECKING:
    from kosmos_lit.model import Kosmos

NET = "net."
"""Prefix of the model's tensors in the LightningModule's state dict."""


class ShardedStrategy(ParallelStrategy):
    """Base of both strategies: broadcast of initial weights, and checkpoints."""

    config_file: ClassVar[str]
    """Path of the overlay that selects the strategy."""
    net: Kosmos
    n_replicas: int = 1
    """Groups of ranks that hold the whole model each."""
    _shard_group: dist.ProcessGroup | None = None
    """The ranks that hold the model together with this one; None: all."""

    def shard_model(self, build: Callable[[], Kosmos], outline: Callable[[], Kosmos]) -> Kosmos:
        """Return the model with its weights sharded. Collective: all ranks must call it.

        Args:
            build: makes the full model; called on rank 0.
            outline: makes the same model on the meta device.

        Raises: UserError or RuntimeError on all ranks if `build` fails; UserError if weights are not finite, or if the
        precision keeps no float32 weights.
        """
        check_precision(self.precision_plugin.precision, self.config_file)
        self._outline = outline
        # First, so that a failure ends all ranks before any of them waits for weights.
        full_tensors = build_on_rank_zero(build)
        self.net = net = outline()
        # Before sharding, which changes shapes and, with FSDP1, names.
        self._shapes = {name: tensor.shape for name, tensor in named_tensors(net).items()}
        self._state_names = list(net.state_dict())
        self._apply_fsdp(net)
        shards = ShardedTensors(net, self._shapes, self.root_device, self._shard_group)
        self._expected_checksums: Tensor | None = shards.broadcast(full_tensors)
        return net

    def setup(self, trainer: L.Trainer) -> None:
        super().setup(trainer)
        self._reshard()
        # Anew: FSDP1 shards the root in `setup`.
        self._shards = ShardedTensors(self.net, self._shapes, self.root_device, self._shard_group)
        if self._expected_checksums is not None:
            self._shards.check(self._expected_checksums, f"{self.config_file}, after the broadcast of the weights")
            self._expected_checksums = None  # training changes the weights; a second setup must not compare

    @abstractmethod
    def _apply_fsdp(self, net: Kosmos) -> None:
        """Shard a model on the meta device, and allocate its shards."""

    def _reshard(self) -> None:
        """Free weights that a pass without gradient has left gathered."""

    def gather_model(self) -> Kosmos:
        """Return a full copy of the model on every rank, in evaluation mode. Collective: all ranks must call it.

        Each rank can call the copy on its own: generation takes ranks different numbers of forward passes.
        """
        self._reshard()
        # The copy is uninitialised until the loop fills it.
        copy, sharded = self._outline().to_empty(device=self.root_device), self._named_tensors()
        for name, tensor in named_tensors(copy).items():
            tensor.copy_(self._shards.gather(name, sharded[name]))
        return copy.requires_grad_(False).eval()

    def _named_tensors(self) -> dict[str, Tensor]:
        """Return the model's tensors, those of the tower that are rounded as they were before."""
        return named_tensors(self.net) | {f"vision.{name}": tensor for name, tensor in self.net.vision.originals.items()}

    # ---- checkpoints

    @property
    def lightning_restore_optimizer(self) -> bool:
        # Lightning's FSDP strategies load it in `load_checkpoint`, which this class replaces.
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return the full weights on rank 0, and nothing on other ranks. Collective: all ranks must call it."""
        self._reshard()
        tensors, state = self._named_tensors(), {}
        for name in self._state_names:
            full = self._shards.gather(name, tensors[name])
            if self.is_global_zero:
                state[NET + name] = full.cpu()  # one tensor at a time is full on the device
        return state

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return the full state on rank 0 as a single process has it, and nothing on other ranks. Collective."""
        optimizer = getattr(optimizer, "optimizer", optimizer)  # LightningOptimizer wraps torch's
        sharded, state = optimizer.state_dict(), {}
        for index, (name, _) in enumerate(self._trained(optimizer)):
            values = sharded["state"].get(index, {})
            # A value without axes is AdamW's step count, which every rank has.
            full = {key: self._shards.gather(name, value) if value.ndim else value for key, value in values.items()}
            if self.is_global_zero and full:
                state[index] = {key: value.cpu() for key, value in full.items()}
        return {"state": state, "param_groups": sharded["param_groups"]} if self.is_global_zero else {}

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        # Past Lightning's sharded strategies, which may write a folder of shards instead of one file.
        ParallelStrategy.save_checkpoint(self, checkpoint, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Return a checkpoint whose tensors are mapped from its file, so that each rank reads its own slices only."""
        return load_agreed(checkpoint_path, mmap=True)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Raises: UserError naming tensors that are missing, surplus, or of another shape."""
        self._reshard()
        state = {name.removeprefix(NET): tensor for name, tensor in checkpoint["state_dict"].items()}
        actual = {name: tensor.shape for name, tensor in state.items()}
        expected = {name: self._shapes[name] for name in self._state_names}
        # A tensor that one side lacks has no shape on that side, and so differs.
        if wrong := sorted(n for n in actual.keys() | expected.keys() if actual.get(n) != expected.get(n)):
            raise UserError(f"the checkpoint's tensors are not this model's: {len(wrong)} differ, {wrong[0]} for one")
        self._shards.load(state)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            trained = list(self._trained(optimizer))
            # Values by the parameter's index, as torch stores them.
            state = {
                index: {key: self._shard_like(trained[index], value) for key, value in values.items()}
                for index, values in saved["state"].items()
            }
            optimizer.load_state_dict(saved | {"state": state})

    def _trained(self, optimizer: Optimizer) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the names and parameters of an optimizer, in its order."""
        names = {id(parameter): original_name(name) for name, parameter in self.net.named_parameters()}
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                yield names[id(parameter)], parameter

    def _shard_like(self, trained: tuple[str, nn.Parameter], full: Tensor) -> Tensor:
        """Return this rank's shard of an optimizer's value, in the form of its parameter."""
        name, parameter = trained
        if not full.ndim:  # AdamW's step count
            return full
        # A copy: the slice is a view of the checkpoint's mapped file.
        shard = self._shards.local_slice(name, full).to(self.root_device, copy=True)
        if not isinstance(parameter, DTensor):  # FSDP1
            return shard.view(parameter.shape)
        shard = shard.view(parameter.to_local().shape)
        mesh, placements = parameter.device_mesh, parameter.placements
        return DTensor.from_local(shard, mesh, placements, shape=parameter.shape, stride=parameter.stride())


def check_precision(precision: Any, config_file: str) -> None:
    """Raises: UserError unless the precision keeps float32 weights and needs no loss scaling."""
    if precision not in (None, 32, "32", "32-true", "bf16", "bf16-mixed"):
        raise UserError(
            f"trainer.precision is {precision}, but {config_file} needs 32-true, or bf16-mixed: float32 master weights"
        )


def build_on_rank_zero(build: Callable[[], Kosmos]) -> dict[str, Tensor] | None:
    """Return the tensors of a model that rank 0 builds, on rank 0; None on other ranks. All ranks end if it fails."""
    full_tensors: dict[str, Tensor] | None = None
    errors: list[tuple[str, bool] | None] = [None]
    try:
        if dist.get_rank() == 0:
            full_tensors = named_tensors(build())
            _check_finite(full_tensors)
    finally:  # `finally`, as the other ranks would wait for the broadcast of the weights forever
        error = sys.exc_info()[1]  # None unless an exception is on its way out
        if error is not None:
            errors = [(str(error), isinstance(error, UserError))]
        dist.broadcast_object_list(errors, src=0)
    # Rank 0 does not reach this loop with an error, as its own exception goes on.
    for message, is_user_error in filter(None, errors):
        if is_user_error:
            sys.exit(2)  # rank 0 prints the message
        raise RuntimeError(f"rank 0 could not build the model: {message}")
    return full_tensors


def _check_finite(tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise UserError(f"the initial weights are not finite: {name} holds NaN or infinity; look at model.init_from")
