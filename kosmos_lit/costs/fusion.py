"""What torch.compile keeps of a fused part for its backward pass, asked of PyTorch's own partitioner, without a device.

Forward and backward of the part are written down as one graph; `min_cut_rematerialization_partition`, which torch.compile
uses, cuts it in two so that least has to be kept, and the rest is computed again. In an estimate (`memory`), a stand-in
of the part allocates what is kept, what comes out, and in the backward pass two of the largest products beside the
gradients; what a kernel works on in between is never in memory.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from functorch.compile import min_cut_rematerialization_partition  # type: ignore[import-untyped]
from torch import Tensor, nn
from torch._inductor.decomposition import select_decomp_table
from torch.func import functional_call
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_flatten, tree_unflatten

from kosmos_lit import vision
from kosmos_lit.costs.allocations import COPIES, Allocations, backward
from kosmos_lit.layers import block
from kosmos_lit.ops import losses

Part = Callable[..., Any]
aten = torch.ops.aten
VIEWS = {aten.view.default, aten.permute.default, aten.t.default, aten.alias.default, aten.unsqueeze.default}
VIEWS |= {aten.expand.default, aten.slice.Tensor, aten.squeeze.dim, aten.reshape.default, aten.detach.default}
PRODUCTS = {aten.mm.default, aten.addmm.default, aten.bmm.default}


@dataclass(frozen=True)
class Meta:
    """A tensor's shape and dtype."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> Meta:
        """Read them."""
        return cls(tuple(tensor.shape), tensor.dtype)

    def empty(self, device: torch.device) -> Tensor:
        """Return such a tensor."""
        return torch.empty(self.shape, dtype=self.dtype, device=device)


@dataclass(frozen=True)
class Cut:
    """A part in two: what comes out of its forward pass, what is kept, and what its backward pass works in."""

    outputs: list[Meta]
    inputs_kept: list[int]
    copies: list[Meta]
    """Of weights, in the compute dtype."""
    kept: list[Meta]
    workspace: list[Meta]


@contextmanager
def fused(allocations: Allocations, cuts: dict[Any, Cut]) -> Iterator[None]:
    """Let what a model has fused be what it is under torch.compile, as far as memory goes.

    Args:
        allocations: where parts are entered.
        cuts: of parts that were asked about before, in a model of the same layers and precision; new ones are added.
    """

    def of_block(part: Part) -> Part:
        # What is chosen by hand to be computed again is so without a cut.
        chosen = part in (block._before_again, block._after_again)
        return part if chosen else lambda module, *args, **kwargs: _run(part, module, args, kwargs, cuts, allocations)

    def of_tower() -> Part:
        return lambda module, *args, **kwargs: _run(vision._eager, module, args, kwargs, cuts, allocations)

    def of_loss() -> Part:
        return lambda logits, *_: (logits.new_empty(len(logits), dtype=torch.float32), torch.empty_like(logits))

    with ExitStack() as stack:
        for module, stand_in in ((block, of_block), (vision, of_tower), (losses, of_loss)):
            stack.enter_context(mock.patch.object(module, "_compiled", stand_in))
        yield


def _run(part: Part, module: nn.Module, args: Any, kwargs: Any, cuts: dict[Any, Cut], allocations: Allocations) -> Any:
    flat, spec = tree_flatten((args, kwargs))
    at = [i for i, value in enumerate(flat) if isinstance(value, Tensor)]
    named = dict(module.named_parameters())
    inputs = [*named.values(), *(flat[i] for i in at)]
    if not (torch.is_grad_enabled() and any(t.requires_grad for t in inputs)):
        return part(module, *args, **kwargs)

    def call(tensors: list[Tensor]) -> Any:
        values = list(flat)
        for i, tensor in zip(at, tensors[len(named) :], strict=True):
            values[i] = tensor
        args, kwargs = tree_unflatten(values, spec)
        weights = {f"module.{name}": t for name, t in zip(named, tensors, strict=False)}
        return functional_call(_Call(part, module), weights, args, kwargs)

    key = (part, type(module), *((Meta.of(t), t.requires_grad) for t in inputs))
    if key not in cuts:
        # What a layer around the part does with what it keeps is no matter of the part's.
        with allocations.paused(), torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
            cuts[key] = _cut(call, inputs)
        gc.collect()  # what the cut leaves behind in cycles holds the part's inputs
    outputs = _Stands.apply(*inputs, cuts[key], allocations)
    return outputs if len(outputs) > 1 else outputs[0]


class _Call(nn.Module):
    """A function of a module as a module."""

    def __init__(self, part: Part, module: nn.Module) -> None:
        super().__init__()
        self.part, self.module = part, module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.part(self.module, *args, **kwargs)


def _cut(call: Callable[[list[Tensor]], Any], inputs: list[Tensor]) -> Cut:
    """Write a part down, forward and backward, and cut it in two."""
    trains = [t.requires_grad for t in inputs]
    with torch.no_grad():
        results = call([t.detach() for t in inputs])
    results = list(results) if isinstance(results, tuple) else [results]

    def both(primals: list[Tensor], tangents: list[Tensor]) -> list[Any]:
        leaves = [t.detach().requires_grad_(needs) for t, needs in zip(primals, trains, strict=True)]
        with torch.enable_grad():
            outs = call(leaves)
        outs = list(outs) if isinstance(outs, tuple) else [outs]
        given = [out.detach() for out in outs]
        device = inputs[0].device.type
        with torch.autocast(device, enabled=False):
            backward(outs, tangents)
        return [*given, *(leaf.grad for leaf in leaves)]

    graph = make_fx(both, decomposition_table=select_decomp_table())(
        [t.detach() for t in inputs], [torch.empty_like(t) for t in results]
    )
    first, second = min_cut_rematerialization_partition(graph, None, num_fwd_outputs=len(results))
    return _read(first, second, len(results), len(inputs))


def _read(first: GraphModule, second: GraphModule, n_outputs: int, n_inputs: int) -> Cut:
    places = {node: i for i, node in enumerate(n for n in first.graph.nodes if n.op == "placeholder")}
    (output,) = (node for node in first.graph.nodes if node.op == "output")
    given = [_base(node) for node in output.args[0][:n_outputs]]
    kept = dict.fromkeys(_base(n) for n in output.args[0][n_outputs:] if isinstance(n.meta.get("val"), Tensor))
    inside = [node for node in kept if node not in places and node not in given]
    copies = [n for n in inside if _is_copy(n, places)]
    products = sorted((n for n in second.graph.nodes if n.target in PRODUCTS), key=lambda n: -n.meta["val"].nbytes)
    return Cut(
        outputs=[Meta.of(node.meta["val"]) for node in output.args[0][:n_outputs]],
        inputs_kept=[places[node] for node in kept if places.get(node, n_inputs) < n_inputs],
        copies=[Meta.of(node.meta["val"]) for node in copies],
        kept=[Meta.of(node.meta["val"]) for node in inside if node not in copies],
        workspace=[Meta.of(node.meta["val"]) for node in products[:2]],
    )


def _base(node: Node) -> Node:
    """Return the node whose memory a view looks into."""
    while node.target in VIEWS and isinstance(node.args[0], Node):
        node = node.args[0]
    return node


def _is_copy(node: Node, places: dict[Node, int]) -> bool:
    """Whether a node is an input in another dtype and nothing else: one of two axes, as matrices are."""
    source = node.args[0] if node.args and "convert_element_type" in str(node.target) else None
    return isinstance(source, Node) and _base(source) in places and node.meta["val"].ndim == 2


class _Stands(torch.autograd.Function):
    """Allocates what a fused part does."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
        *inputs, cut, allocations = args
        device = inputs[0].device
        copies = [meta.empty(device) for meta in cut.copies]
        for copy in copies:
            allocations.enter(copy, COPIES)
        kept = [meta.empty(device) for meta in cut.kept]
        ctx.cut, ctx.inputs = cut, [(Meta.of(t), needs) for t, needs in zip(inputs, ctx.needs_input_grad, strict=False)]
        ctx.save_for_backward(*(inputs[i] for i in cut.inputs_kept), *copies, *kept)
        return tuple(meta.empty(device) for meta in cut.outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        device = next(g for g in grads if g is not None).device
        workspace = [meta.empty(device) for meta in ctx.cut.workspace]
        found = [meta.empty(device) if needs else None for meta, needs in ctx.inputs]
        del workspace
        return *found, None, None
