"""Stand-ins for compiled parts of a model, which allocate what torch.compile keeps, without a device.

Forward and backward of a part are written down as one graph, and `min_cut_rematerialization_partition`, which torch.compile
uses, cuts it in two so that the least has to be kept and the rest is recomputed. A stand-in allocates what is kept and what
comes out, and in the backward pass two of the largest products beside the gradients; what a kernel works on in between is
never in memory.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.fx import GraphModule, Node

from kosmos_lit.costs.allocations import AllocationTracker, joint_partition, split_tensors
from kosmos_lit.layers import block
from kosmos_lit.ops.graphs import Compiler
from kosmos_lit.ops.losses import nll_and_gradient

Part = Callable[..., Any]
"""A function of a module and its arguments that is compiled as one graph."""
aten = torch.ops.aten
# Operators whose result lies in the memory of their first argument.
VIEWS = {aten.view.default, aten.permute.default, aten.t.default, aten.alias.default, aten.unsqueeze.default}
VIEWS |= {aten.expand.default, aten.slice.Tensor, aten.squeeze.dim, aten.reshape.default, aten.detach.default}
PRODUCTS = {aten.mm.default, aten.addmm.default, aten.bmm.default, aten._scaled_mm.default}
"""Not fused: their results are in memory."""


@dataclass(frozen=True)
class TensorSpec:
    """A tensor's shape and dtype."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> TensorSpec:
        """Return those of a tensor."""
        return cls(tuple(tensor.shape), tensor.dtype)

    def empty(self, device: torch.device) -> Tensor:
        """Return such a tensor."""
        return torch.empty(self.shape, dtype=self.dtype, device=device)


@dataclass(frozen=True)
class Partition:
    """What a compiled part allocates: results and what is kept in the forward pass, workspace in the backward pass."""

    outputs: list[TensorSpec]
    kept_inputs: list[int]
    weight_copies: list[TensorSpec]
    """In the compute dtype."""
    kept: list[TensorSpec]
    """Neither inputs nor outputs nor copies of weights."""
    workspace: list[TensorSpec]


def stand_ins(tracker: AllocationTracker, partitions: dict[Any, Partition]) -> Compiler:
    """Return what `Kosmos.compile_blocks` takes in place of torch.compile.

    Args:
        tracker: counts their allocations.
        partitions: of parts of models with the same layers and precision; those of new parts are added.
    """

    def stand_in(function: Part, *, dynamic: bool | None = False) -> Part:
        if function is nll_and_gradient:
            # The loss's kernel returns (S,) nats, and a gradient in the shape and dtype of the logits.
            return lambda logits, *_: (logits.new_empty(len(logits), dtype=torch.float32), torch.empty_like(logits))
        if function in (block._recomputed_before, block._recomputed_after):
            return function  # what these two keep is chosen by hand, and torch.compile has nothing left to choose
        return lambda module, *args, **kwargs: _run(function, module, args, kwargs, partitions, tracker)

    return stand_in


def _run(
    part: Part, module: nn.Module, args: Any, kwargs: Any, partitions: dict[Any, Partition], tracker: AllocationTracker
) -> Any:
    """Return what a part does, with gradients from its stand-in."""
    tensors, join = split_tensors((args, kwargs))
    named = dict(module.named_parameters())
    inputs = [*named.values(), *tensors]
    if not (torch.is_grad_enabled() and any(t.requires_grad for t in inputs)):
        return part(module, *args, **kwargs)  # without gradients nothing is kept

    def call(values: list[Tensor]) -> list[Tensor]:
        args, kwargs = join(values[len(named) :])
        # `values` begins with the weights, and goes on with the arguments.
        weights = {f"module.{name}": t for name, t in zip(named, values, strict=False)}
        results = functional_call(_Call(part, module), weights, args, kwargs)
        return list(results) if isinstance(results, tuple) else [results]

    # Layers of one shape share a partition: it takes a second to compute.
    key = (part, type(module), *((TensorSpec.of(t), t.requires_grad) for t in inputs))
    if key not in partitions:
        # Hooks of a layer around the part, as checkpointing sets them, must not see its inner tensors.
        with tracker.disabled(), torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
            partitions[key] = partition_of(call, inputs)
        gc.collect()  # cycles that the partitioner leaves behind hold the part's inputs
    outputs = _StandIn.apply(*inputs, partitions[key], tracker)
    return outputs if len(outputs) > 1 else outputs[0]


def partition_of(call: Callable[[list[Tensor]], list[Tensor]], inputs: list[Tensor]) -> Partition:
    """Return what a compiled function of tensors allocates."""
    forward, backward, n_outputs = joint_partition(call, inputs)
    return _read(forward, backward, n_outputs, len(inputs))


class _Call(nn.Module):
    """A function of a module as a module, for `functional_call`."""

    def __init__(self, part: Part, module: nn.Module) -> None:
        super().__init__()
        self.part, self.module = part, module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.part(self.module, *args, **kwargs)


def _read(forward: GraphModule, backward: GraphModule, n_outputs: int, n_inputs: int) -> Partition:
    """Return what a part's two graphs allocate."""
    inputs = {node: i for i, node in enumerate(n for n in forward.graph.nodes if n.op == "placeholder")}
    (output,) = (node for node in forward.graph.nodes if node.op == "output")
    outputs = [_base(node) for node in output.args[0][:n_outputs]]
    # Views of one tensor keep it once, so bases count; sizes among what is kept are numbers.
    kept = dict.fromkeys(_base(n) for n in output.args[0][n_outputs:] if isinstance(n.meta.get("val"), Tensor))
    inside = [node for node in kept if node not in inputs and node not in outputs]
    copies = [n for n in inside if _is_copy(n, inputs)]
    products = sorted((n for n in backward.graph.nodes if n.target in PRODUCTS), key=lambda n: -n.meta["val"].nbytes)
    return Partition(
        outputs=[TensorSpec.of(node.meta["val"]) for node in output.args[0][:n_outputs]],
        # Placeholders behind the inputs are gradients of the outputs.
        kept_inputs=[inputs[node] for node in kept if inputs.get(node, n_inputs) < n_inputs],
        weight_copies=[TensorSpec.of(node.meta["val"]) for node in copies],
        kept=[TensorSpec.of(node.meta["val"]) for node in inside if node not in copies],
        workspace=[TensorSpec.of(node.meta["val"]) for node in products[:2]],
    )


def _base(node: Node) -> Node:
    """Return the node whose memory a view looks into."""
    while node.target in VIEWS and isinstance(node.args[0], Node):
        node = node.args[0]
    return node


def _is_copy(node: Node, inputs: dict[Node, int]) -> bool:
    """Whether a node is a matrix among the inputs in another dtype, and nothing else: a copy of a weight."""
    source = node.args[0] if node.args and "convert_element_type" in str(node.target) else None
    return isinstance(source, Node) and _base(source) in inputs and node.meta["val"].ndim == 2


class _StandIn(torch.autograd.Function):
    """Allocates what a compiled part does."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
        *inputs, partition, tracker = args
        device = inputs[0].device
        copies = [spec.empty(device) for spec in partition.weight_copies]
        for copy in copies:
            tracker.add(copy, tracker.weight_copies)
        kept = [spec.empty(device) for spec in partition.kept]
        ctx.partition = partition
        ctx.inputs = [(TensorSpec.of(t), needs) for t, needs in zip(inputs, ctx.needs_input_grad, strict=False)]
        ctx.save_for_backward(*(inputs[i] for i in partition.kept_inputs), *copies, *kept)
        return tuple(spec.empty(device) for spec in partition.outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        device = next(g for g in grads if g is not None).device
        workspace = [spec.empty(device) for spec in ctx.partition.workspace]
        gradients = [spec.empty(device) if needs else None for spec, needs in ctx.inputs]
        del workspace  # only now: it is in memory beside the gradients
        return *gradients, None, None
