"""Lightning's FSDP2 and FSDP1 strategies with this model's units."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from lightning.pytorch.accelerators import CUDAAccelerator
from lightning.pytorch.plugins import FSDPPrecision, MixedPrecision, Precision
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy, Strategy
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    FullyShardedDataParallel,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.fsdp import MixedPrecision as Fsdp1Precision

from kosmos_lit.errors import UserError
from kosmos_lit.sharding.strategy import ShardedStrategy, check_precision

if TYPE_CHECKING:
    from kosmos_lit.model import Kosmos

FORWARD_METHODS = ("loss", "nll")
"""Methods of the model that all ranks call together and that gather its weights as `forward` does."""


class Fsdp2Strategy(ShardedStrategy, ModelParallelStrategy):
    """FSDP2 on Lightning's ModelParallelStrategy; all ranks are data-parallel. With `shard_size`, HSDP."""

    config_file = "configs/trainer/fsdp.yaml"

    def __init__(
        self,
        reshard_after_forward: bool = True,
        sync_every_micro_batch: bool = True,
        shard_size: int | Literal["node"] | None = None,
    ) -> None:
        """Choose between memory and traffic.

        Args:
            reshard_after_forward: Whether a block's weights are freed between forward and backward pass (ZeRO-3) and
                gathered twice a micro-batch, or stay gathered (ZeRO-2).
            sync_every_micro_batch: Whether gradients are reduced over ranks after each micro-batch of a step, or only
                after the last one: less traffic, but until then each rank holds the full float32 gradient.
            shard_size: How many consecutive ranks hold the model together, `node` for those of a node (HSDP): every such
                group holds all of it, and sums its gradients with the others' once a step. None: all ranks.
        """
        # A checkpoint is one file, as without sharding.
        super().__init__(save_distributed_checkpoint=False)
        self.reshard_after_forward, self.sync_every_micro_batch = reshard_after_forward, sync_every_micro_batch
        self.shard_size = shard_size

    @property
    def ranks_per_replica(self) -> int:
        """Return how many ranks hold the model together.

        Raises: UserError if `shard_size` does not fit the number of ranks.
        """
        return ranks_per_replica(self.shard_size, self.num_processes, self.num_nodes * self.num_processes)

    def setup_environment(self) -> None:
        self.n_replicas = self.num_nodes * self.num_processes // self.ranks_per_replica
        # Lightning's default makes each node one tensor-parallel group.
        self._data_parallel_size, self._tensor_parallel_size = self.num_nodes * self.num_processes, 1
        super().setup_environment()

    def _apply_fsdp(self, net: Kosmos) -> None:
        mesh = self._mesh()
        # Blocks first: the root's unit takes the parameters that no other unit holds.
        for block in net.decoder.layers:
            fully_shard(block, mesh=mesh, reshard_after_forward=self.reshard_after_forward, mp_policy=self._policy())
        # No policy: the root's weights stay float32, and autocast casts its products.
        fully_shard(net, mesh=mesh, reshard_after_forward=False, ignored_params=frozen_tower_parameters(net))
        for method in FORWARD_METHODS:
            register_fsdp_forward_method(net, method)
        # After sharding, so that a full model never takes up memory.
        net.to_empty(device=self.root_device)

    def _mesh(self) -> DeviceMesh:
        """Return all ranks, or for HSDP (groups that hold a replica, ranks of a group)."""
        if self.n_replicas == 1:
            return self.device_mesh["data_parallel"]
        shape, names = (self.n_replicas, self.ranks_per_replica), ("replicate", "shard")
        mesh = init_device_mesh(self.root_device.type, shape, mesh_dim_names=names)
        self._shard_group = mesh.get_group("shard")
        return mesh

    def _policy(self) -> MixedPrecisionPolicy:
        if self.precision_plugin.precision != "bf16-mixed":
            return MixedPrecisionPolicy()
        # Weights are gathered in bfloat16, gradients reduced in float32.
        return MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=_casts_inputs(self.root_device))

    def _units(self) -> list[FSDPModule]:
        return [module for module in self.net.modules() if isinstance(module, FSDPModule)]

    def _reshard(self) -> None:
        for unit in self._units():
            unit.reshard()

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Leave out what only a step's last micro-batch must do.

        That is to reduce the blocks' gradients, unless `sync_every_micro_batch`, and to sum them over replicas. The root
        stays gathered and its gradients stay whole until then: it is needed from a micro-batch's beginning to its end, where
        its gradient is complete, so that between micro-batches it costs memory that they take anyway.
        """
        root = cast(FSDPModule, self.net)
        root.set_requires_all_reduce(False)
        root.set_requires_gradient_sync(self.sync_every_micro_batch)
        root.set_requires_gradient_sync(False, recurse=False)
        root.set_reshard_after_backward(False, recurse=False)
        try:
            yield
        finally:
            # On again for the last micro-batch, which runs outside this context.
            root.set_requires_all_reduce(True)
            root.set_requires_gradient_sync(True)
            root.set_reshard_after_backward(True, recurse=False)


class Fsdp1Strategy(ShardedStrategy, FSDPStrategy):
    """FSDP1 on Lightning's FSDPStrategy, extended to CPUs."""

    config_file = "configs/trainer/fsdp1.yaml"

    def __init__(self, reshard_after_forward: bool = True) -> None:
        """Choose between memory and traffic.

        Args:
            reshard_after_forward: Whether a block's weights are freed between forward and backward pass (FULL_SHARD), or
                stay gathered (SHARD_GRAD_OP).
        """
        super().__init__(sharding_strategy="FULL_SHARD" if reshard_after_forward else "SHARD_GRAD_OP")
        self._root: FullyShardedDataParallel | None = None
        self._is_in_root = False  # whether the root's forward is running, with its weights gathered

    @property  # type: ignore[override]
    def precision_plugin(self) -> Precision:
        """The plugin of a single process: Lightning's own for FSDP supports GPUs only, and refuses to clip by norm."""
        return self._precision_plugin or Precision()

    @precision_plugin.setter
    def precision_plugin(self, plugin: Precision | None) -> None:
        if isinstance(plugin, FSDPPrecision):
            check_precision(plugin.precision, self.config_file)
            device = "cuda" if isinstance(self.accelerator, CUDAAccelerator) else "cpu"
            plugin = Precision() if plugin.precision == "32-true" else MixedPrecision("bf16-mixed", device)
        self._precision_plugin = plugin

    def _unit(self, module: nn.Module, **kwargs: Any) -> FullyShardedDataParallel:
        gpu = self.root_device.index if self.root_device.type == "cuda" else self.root_device
        return FullyShardedDataParallel(
            # `use_orig_params`: parameters keep their names, and a unit may hold frozen ones beside others.
            module,
            sharding_strategy=self.sharding_strategy,
            device_id=gpu,
            use_orig_params=True,
            param_init_fn=partial(_materialise, device=self.root_device),
            **kwargs,
        )

    def _apply_fsdp(self, net: Kosmos) -> None:
        """Shard the blocks. The root is the LightningModule, whose steps Lightning runs through its forward."""
        mixed = None
        if self.precision_plugin.precision == "bf16-mixed":
            mixed = Fsdp1Precision(torch.bfloat16, torch.float32, cast_forward_inputs=_casts_inputs(self.root_device))
        for index, block in enumerate(net.decoder.layers):
            net.decoder.layers[index] = self._unit(block, mixed_precision=mixed)
        # The root is sharded in `setup` only; until then each rank holds all of its tensors.
        for module in net.modules():
            if any(t.is_meta for t in [*module.parameters(recurse=False), *module.buffers(recurse=False)]):
                _materialise(module, self.root_device)

        for method in FORWARD_METHODS:
            # On the instance, in place of the class's method.
            setattr(net, method, self._through_root(getattr(net, method)))

    def _through_root(self, method: Callable[..., Any]) -> Callable[..., Any]:
        """Return a method of the model that gathers the root's weights if no forward of the root is running."""

        def call(*args: Any) -> Any:
            if self._is_in_root or self._root is None:
                return method(*args)
            module = cast(nn.Module, self.lightning_module)
            # FSDP1 gathers in `forward` alone: the root's forward is this method for one call.
            module.forward = method
            try:
                return self._root(*args)
            finally:
                del module.forward  # the class's own comes back

        return call

    def _enter(self, *_: Any) -> None:
        self._is_in_root = True

    def _leave(self, *_: Any) -> None:
        self._is_in_root = False

    def _setup_model(self, model: nn.Module) -> nn.Module:
        if self._root is None or self._root.module is not model:
            model.to(self.root_device)  # buffers of the metrics
            model.register_forward_pre_hook(self._enter)
            # `always_call`: also after a forward that raises.
            model.register_forward_hook(self._leave, always_call=True)
            self._root = self._unit(model, ignored_states=frozen_tower_parameters(self.net))
        return self._root


def ranks_per_replica(shard_size: int | str | None, devices_per_node: int, world_size: int) -> int:
    """Return how many ranks hold the model together.

    Args:
        shard_size: of `Fsdp2Strategy`.
        devices_per_node: ranks of a node.
        world_size: number of ranks.

    Raises: UserError if they do not divide the ranks, or one rank would hold all of it.
    """
    size = {None: world_size, "node": devices_per_node}.get(shard_size, shard_size)  # type: ignore[arg-type]
    assert isinstance(size, int)
    setting = f"trainer.strategy.init_args.shard_size is {shard_size}" + (f" ({size} ranks)" if shard_size == "node" else "")
    if size < 1 or world_size % size:
        divisors = [n for n in range(2, world_size + 1) if world_size % n == 0]
        raise UserError(f"{setting}, which does not divide {world_size} ranks; these would: {', '.join(map(str, divisors))}")
    if size == 1 < world_size:
        raise UserError(f"{setting}, so that no weight is sharded; use -c configs/trainer/ddp.yaml, or a larger shard_size")
    return size


def check_strategy(strategy: Strategy | str | None) -> None:
    """Refuse Lightning's own sharded strategies, which do not know this model's units.

    Args:
        strategy: a strategy, its name, or its class's path.

    Raises: UserError naming the overlays to use instead.
    """
    # A class's path, as YAML has it, ends in the class's name.
    name = strategy.rpartition(".")[2] if isinstance(strategy, str) else type(strategy).__name__
    # Lightning registers the names "fsdp" and "fsdp_cpu_offload".
    is_lightnings = name.startswith("fsdp") or name in (FSDPStrategy.__name__, ModelParallelStrategy.__name__)
    if is_lightnings or (
        isinstance(strategy, FSDPStrategy | ModelParallelStrategy) and not isinstance(strategy, ShardedStrategy)
    ):
        raise UserError(
            f"trainer.strategy: {name} does not know this model's units; use -c {Fsdp2Strategy.config_file}, or "
            f"-c {Fsdp1Strategy.config_file}"
        )


def frozen_tower_parameters(net: Kosmos) -> set[nn.Parameter]:
    """Return the tower's frozen parameters, which are replicated on every rank."""
    return {parameter for parameter in net.vision.parameters() if not parameter.requires_grad}


def _casts_inputs(device: torch.device) -> bool:
    """Return whether a block's input is cast to its weights' dtype."""
    # A CPU's LayerNorm takes one dtype for input and weights.
    return device.type == "cpu"


def _materialise(module: nn.Module, device: torch.device) -> None:
    """Allocate a module's own tensors on a device, uninitialised."""
    module.to_empty(device=device, recurse=False)
