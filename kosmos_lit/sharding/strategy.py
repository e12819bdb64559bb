"""Training whose weights, gradients and optimizer state are shared out among ranks (ZeRO-3 or ZeRO-2).

Units, in both strategies: one for each decoder block, and the root, which is everything else that trains. A unit's weights
come together for its forward and its backward pass; the root's stay together from one to the other. The tied embedding is
used at both ends, and how often a rank calls tower and connector depends on its images: in the root, no such call is a
collective that other ranks would have to make too. Frozen tensors of the tower stay whole on each rank.

Weights: the first rank builds the model as a single process does; the others build its outline on the meta device. Units are
cut while they are empty, then each rank gets its piece of the first one's tensors. So initial weights are those of a single
process bit by bit, whatever the strategy and the number of ranks, and only one rank reads files or draws numbers.

Arithmetic in bf16-mixed: master weights, optimizer state, the sum of gradients over ranks and micro-batches and the residual
stream are float32, matrices work in bfloat16, as autocast has it in a single process. Blocks' weights travel in bfloat16:
those of their LayerNorms are rounded too, which is the one difference. On CPUs a block takes bfloat16 (`fsdp.py`).

Checkpoints are single files, as a single process writes them: each can be resumed on any number of ranks, sharded or not.
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

from kosmos_lit.checkpoint import load_checkpoint
from kosmos_lit.errors import UserError
from kosmos_lit.sharding.shards import ShardedTensors, plain, tensors_of

if TYPE_CHECKING:
    from kosmos_lit.model import Kosmos

NET = "net."
"""Where the model lies in the LightningModule."""


class Sharded(ParallelStrategy):
    """What the two strategies share: sending weights out, and checkpoints."""

    yaml: ClassVar[str]
    """The config that chooses it."""
    net: Kosmos

    def distribute(self, build: Callable[[], Kosmos], outline: Callable[[], Kosmos]) -> Kosmos:
        """Return the model with its weights shared out: all ranks must call it.

        Args:
            build: makes the whole model; the first rank calls it.
            outline: makes the same model on the meta device.

        Raises: whatever `build` raises, on all ranks; UserError if weights are not finite or the precision is not one that
        keeps float32 weights; RuntimeError if a rank does not get what the first one sends.
        """
        check_precision(self.precision_plugin.precision, self.yaml)
        self._outline = outline
        source = build_on_rank_zero(build)
        self.net = net = outline()
        self._shapes = {name: tensor.shape for name, tensor in tensors_of(net).items()}
        self._saved = list(net.state_dict())
        self._cut(net)
        shards = ShardedTensors(net, self._shapes, self.root_device)
        self._wanted: Tensor | None = shards.fill(source)
        return net

    def setup(self, trainer: L.Trainer) -> None:
        super().setup(trainer)
        self._settle()
        self._shards = ShardedTensors(self.net, self._shapes, self.root_device)
        if self._wanted is not None:
            self._shards.check(self._wanted, f"{self.yaml}, after the weights were sent out")
            self._wanted = None  # from now on they train

    @abstractmethod
    def _cut(self, net: Kosmos) -> None:
        """Share out an outline's tensors, and give them memory."""

    def _settle(self) -> None:
        """Free what a pass without gradient has left together."""

    def whole(self) -> Kosmos:
        """Return a copy of the model, in evaluation mode, whole on every rank: all of them must ask.

        Its parts can be called by each rank on its own; writing answers takes a rank as many calls as its longest one.
        """
        self._settle()
        copy, here = self._outline().to_empty(device=self.root_device), tensors_of(self.net)
        for name, tensor in tensors_of(copy).items():
            tensor.copy_(self._shards.gather(name, here[name]))
        return copy.requires_grad_(False).eval()

    # ---- checkpoints

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return the whole weights on the first rank, and nothing on others: all of them must ask."""
        self._settle()
        here, state = tensors_of(self.net), {}
        for name in self._saved:
            whole = self._shards.gather(name, here[name])
            if self.is_global_zero:
                state[NET + name] = whole.cpu()
        return state

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return the whole state on the first rank as a single process has it, and nothing on others: all must ask."""
        optimizer = getattr(optimizer, "optimizer", optimizer)  # out of Lightning's wrapper
        found, state = optimizer.state_dict(), {}
        for index, (name, _) in enumerate(self._trained(optimizer)):
            wholes = {k: self._shards.gather(name, v) if v.ndim else v for k, v in found["state"].get(index, {}).items()}
            if self.is_global_zero and wholes:
                state[index] = {key: whole.cpu() for key, whole in wholes.items()}
        return {"state": state, "param_groups": found["param_groups"]} if self.is_global_zero else {}

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        ParallelStrategy.save_checkpoint(self, checkpoint, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint as a window on its file, of which each rank then reads its own pieces."""
        return load_checkpoint(checkpoint_path)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Raises: UserError naming tensors that are missing, surplus, or of another shape."""
        self._settle()
        state = {name.removeprefix(NET): tensor for name, tensor in checkpoint["state_dict"].items()}
        there, here = {n: t.shape for n, t in state.items()}, {n: self._shapes[n] for n in self._saved}
        if wrong := sorted(n for n in there.keys() | here.keys() if there.get(n) != here.get(n)):
            raise UserError(f"the checkpoint's tensors are not this model's: {len(wrong)} differ, {wrong[0]} for one")
        self._shards.load(state)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            trained = list(self._trained(optimizer))
            state = {
                index: {key: self._piece(trained[index], whole) for key, whole in wholes.items()}
                for index, wholes in saved["state"].items()
            }
            optimizer.load_state_dict(saved | {"state": state})

    def _trained(self, optimizer: Optimizer) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the parameters of an optimizer with their names, in its order."""
        names = {id(parameter): plain(name) for name, parameter in self.net.named_parameters()}
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                yield names[id(parameter)], parameter

    def _piece(self, trained: tuple[str, nn.Parameter], whole: Tensor) -> Tensor:
        name, parameter = trained
        if not whole.ndim:  # a number of steps
            return whole
        piece = self._shards.own(name, whole).to(self.root_device, copy=True)
        if not isinstance(parameter, DTensor):
            return piece.view(parameter.shape)
        piece = piece.view(parameter.to_local().shape)
        mesh, placements = parameter.device_mesh, parameter.placements
        return DTensor.from_local(piece, mesh, placements, shape=parameter.shape, stride=parameter.stride())


def check_precision(precision: Any, yaml: str) -> None:
    """Raises: UserError if it is none that keeps float32 weights and needs no scaling of the loss."""
    if precision not in (None, 32, "32", "32-true", "bf16", "bf16-mixed"):
        raise UserError(f"trainer.precision is {precision}, but {yaml} needs 32-true, or bf16-mixed: float32 master weights")


def build_on_rank_zero(build: Callable[[], Kosmos]) -> dict[str, Tensor] | None:
    """Return the tensors of a model that the first rank builds, there; None on others. All of them end if it cannot."""
    source: dict[str, Tensor] | None = None
    told: list[tuple[str, bool] | None] = [None]
    try:
        if dist.get_rank() == 0:
            source = tensors_of(build())
            _check_finite(source)
    finally:  # an error too is told to the others, who would wait for weights
        problem = sys.exc_info()[1]
        if problem is not None:
            told = [(str(problem), isinstance(problem, UserError))]
        dist.broadcast_object_list(told, src=0)
    for message, is_mistake in filter(None, told):
        if is_mistake:
            sys.exit(2)  # the first rank says why
        raise RuntimeError(f"the first rank could not build the model: {message}")
    return source


def _check_finite(tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise UserError(f"the initial weights are not finite: {name} holds NaN or infinity; look at model.init_from")
