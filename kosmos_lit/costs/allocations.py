"""What a computation allocates on a device, by category, without the device: the real code on tensors without storage.

PyTorch's fake tensors have shape, dtype and device but no memory. The model's own code runs on them, forward and backward,
under the same autocast. Each storage that an operator allocates is counted until its last reference goes, autograd's
included, so that nothing has to be known of what a layer keeps for its backward pass.

Private parts of PyTorch and patches of it are used in this file alone (a test holds that): another version may break it,
and `memory.estimate` turns whatever it raises into an `EstimateError`. PyTorch's `MemTracker` gives the same sums where it
runs; it needs a GPU for what is on a GPU, and cannot see into what is compiled (`benchmarks/costs.py` compares them).
"""

from __future__ import annotations

import gc
import heapq
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
import torch._subclasses.fake_tensor as fake_tensors
import torch.nn.functional as F
from functorch.compile import min_cut_rematerialization_partition  # type: ignore[import-untyped]
from torch import Tensor, nn
from torch._inductor.decomposition import select_decomp_table
from torch.autograd.function import BackwardCFunction
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

ROUNDING = {"cuda": 512, "cpu": 64}
"""Bytes that PyTorch's allocators round an allocation up to."""
Edge = tuple[Any, int]
"""A node of the autograd graph (None: no gradient is needed), and which of its inputs."""


class AllocationTracker(TorchDispatchMode):  # type: ignore[no-untyped-call]  # of a base class's hook
    """Adds up the storages on a device by category, and keeps the sums at the peak."""

    def __init__(self, device: str, category: str, weight_copies: str) -> None:
        """Start counting nothing.

        Args:
            device: its type, cuda or cpu.
            category: of what is allocated from now on.
            weight_copies: category of weights in the compute dtype, which autocast makes.
        """
        super().__init__()  # type: ignore[no-untyped-call]
        self.device, self.category, self.weight_copies = device, category, weight_copies
        self.current: Counter[str] = Counter()
        """Bytes by category, now."""
        self.peak: Counter[str] = Counter()
        """Bytes by category when their sum was largest."""
        self._is_enabled = True
        self._total = self._peak_total = 0
        self._storages: dict[int, tuple[str, int]] = {}
        self._weights: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self._is_enabled:
            return result
        # Autocast casts weights by `_to_copy`.
        copies = func is torch.ops.aten._to_copy.default and _key(args[0]) in self._weights
        for tensor in tree_leaves(result):
            # Views and in-place operators return storages that are counted already.
            if isinstance(tensor, Tensor) and tensor.device.type == self.device and _key(tensor) not in self._storages:
                self.add(tensor, self.weight_copies if copies else self.category)
        return result

    def add(self, tensor: Tensor, category: str) -> None:
        """Count a tensor's storage in `category`, and in no other one any more."""
        key, storage = _key(tensor), tensor.untyped_storage()
        if key in self._storages:
            previous, size = self._storages[key]
            self.current[previous] -= size
            self._total -= size
        else:
            size = -(-storage.nbytes() // ROUNDING[self.device]) * ROUNDING[self.device]  # rounded up
            weakref.finalize(storage, self._remove, key)  # when its last reference goes
        self._storages[key] = category, size
        self.current[category] += size
        self._total += size
        if self._total > self._peak_total:
            self._peak_total, self.peak = self._total, self.current.copy()

    def add_weights(self, module: nn.Module, category: str) -> None:
        """Count a module's parameters in `category`, and recognise autocast's copies of them."""
        for parameter in module.parameters():
            self.add(parameter, category)
            self._weights.add(_key(parameter))

    def track_module(self, module: nn.Module, category: str) -> None:
        """Count what a module's forward pass allocates in `category`, also when it is recomputed."""
        previous: list[str] = []  # a stack: modules nest

        def before(*_: Any) -> None:
            previous.append(self.category)
            self.category = category

        def after(*_: Any) -> None:
            self.category = previous.pop()

        module.register_forward_pre_hook(before)
        # Always: checkpointing ends a recomputation early, by an exception.
        module.register_forward_hook(after, always_call=True)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Count nothing in a block."""
        self._is_enabled = False
        try:
            yield
        finally:
            self._is_enabled = True

    def _remove(self, key: int) -> None:
        category, size = self._storages.pop(key)
        self._weights.discard(key)
        self.current[category] -= size
        self._total -= size


def _key(tensor: Tensor) -> int:
    # Python's wrappers of a storage come and go; the address of the storage itself does not change while it lives.
    key: int = tensor.untyped_storage()._cdata
    return key


# ---- a fake device


@contextmanager
def fake_device(device: str) -> Iterator[None]:
    """Give tensors no memory, and let code run as it does on a type of device, which need not exist."""
    with ExitStack() as stack:
        stack.enter_context(_without_collector())
        stack.enter_context(fake_tensors.FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(patched((torch.autograd.Function, "apply", classmethod(_apply_with_views))))
        if device == "cuda":
            # Torch 2.11 starts the device for its first fake tensor if `is_available`, and that is patched below.
            stack.enter_context(patched((fake_tensors, "init_gpu_context", _always(None))))
            # PyTorch would ask the device which attention kernel to take.
            stack.enter_context(patched((F, "scaled_dot_product_attention", _fake_attention)))
            # Autocast asks these two.
            for question in ("is_available", "is_bf16_supported"):
                stack.enter_context(patched((torch.cuda, question, _always(True))))
            # Too old for kernels that are called by their own names: all attention goes through the function above.
            stack.enter_context(patched((torch.cuda, "get_device_capability", _always((7, 0)))))
        # Checkpointed functions ask which backward pass recomputes them; outside the engine there is no answer.
        stack.enter_context(patched((torch._C, "_current_graph_task_id", _always(1))))
        yield


@contextmanager
def patched(*replacements: tuple[Any, str, Any]) -> Iterator[None]:
    """Replace attributes (owner, name, value) in a block."""
    with ExitStack() as stack:
        for owner, name, value in replacements:
            stack.enter_context(mock.patch.object(owner, name, value))
        yield


def _always(value: Any) -> Callable[..., Any]:
    return lambda *_, **__: value


@contextmanager
def _without_collector() -> Iterator[None]:
    """Turn Python's collector of cycles off in a block."""
    # It runs at no fixed moment: with it, tensors in cycles would go earlier in one estimate than in another.
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _apply_with_views(function: Any, *args: Any, **kwargs: Any) -> Any:
    """Return what `function.apply` does, as views: then each Python node of the graph has parents that keep no tensors.

    In torch 2.11 it lives only as long as they do, however many Python objects refer to it, so `backward` keeps one of them.
    """

    def view(result: Any) -> Any:
        # Checkpointing makes an empty result for the sake of its node, which it wants itself.
        is_plain = not isinstance(result, Tensor) or result.grad_fn is None or not result.numel()
        return result if is_plain else result.view_as(result)

    results = _APPLY.__get__(None, function)(*args, **kwargs)
    return tuple(map(view, results)) if isinstance(results, tuple) else view(results)


_APPLY = torch.autograd.Function.__dict__["apply"]  # of whichever function it is asked for


class _FakeFlashAttention(torch.autograd.Function):
    """Keeps what flash kernels keep: queries, keys, values, output, and a float32 number a query and head."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        B, H, T, _ = q.shape
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out, q.new_empty(B, H, T, dtype=torch.float32))  # the last: log-sum-exp
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, _, _ = ctx.saved_tensors
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _fake_attention(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> Tensor:
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else q.dtype
    return _FakeFlashAttention.apply(*(x.to(dtype) for x in (q, k, v)))  # type: ignore[no-any-return]


# ---- backward, node by node


def backward(outputs: list[Tensor], gradients: Sequence[Tensor] | None = None) -> None:
    """Set the gradients of the parameters that `outputs` depend on, freeing the graph on the way; empty the list.

    PyTorch's engine starts a thread with a context on each device, which need not exist here. The order is the engine's: of
    the nodes that have all their gradients, the one that was made last comes first.

    Args:
        outputs: tensors with a graph.
        gradients: of the outputs; None: ones.
    """
    values = [torch.ones_like(t) for t in outputs] if gradients is None else list(gradients)
    edges = [(output.grad_fn, output.output_nr) for output in outputs]
    outputs.clear()
    dependencies = _dependencies(edges)
    buffers: defaultdict[Any, dict[int, Tensor]] = defaultdict(dict)
    ready: list[tuple[float, int, Any, Any]] = []
    with torch.no_grad():
        _propagate(None, edges, values, dependencies, buffers, ready)
        # What is deleted from here on would else hold tensors that the engine has freed by then.
        del edges
        while ready:
            _, _, node, parent = heapq.heappop(ready)  # `parent` is held until the node has been called
            buffer = buffers.pop(node, {})
            if hasattr(node, "variable"):  # AccumulateGrad, where a path ends at a parameter
                _accumulate_grad(node.variable, buffer)
                continue
            arguments = [buffer.pop(i, None) for i in range(len(node._input_metadata))]
            call: Callable[..., Any] = node.apply if isinstance(node, BackwardCFunction) else node
            result = call(*arguments)
            values, edges = list(result) if isinstance(result, tuple) else [result], node.next_functions
            # A view, which keeps no tensors: see `_apply_with_views`.
            parent = node if any(isinstance(child, BackwardCFunction) for child, _ in edges) else None
            del node, call, arguments, result
            _propagate(parent, edges, values, dependencies, buffers, ready)
            del parent, edges


def _dependencies(edges: Iterable[Edge]) -> Counter[Any]:
    """Return how many gradients each node waits for."""
    dependencies: Counter[Any] = Counter()
    stack = [edges]
    while stack:
        for node, _ in stack.pop():
            if node is not None:
                if node not in dependencies:
                    stack.append(node.next_functions)
                dependencies[node] += 1
    return dependencies


def _propagate(
    parent: Any, edges: Sequence[Edge], values: list[Any], dependencies: Counter[Any], buffers: Any, ready: list[Any]
) -> None:
    """Pass gradients along edges, and queue the nodes that now have all of theirs; empty `values` on the way.

    What is queued keeps `parent`, the node that the edges start at or None.
    """
    # Arguments of a Python function that are no tensors have no edge: they must be the last ones.
    assert not any(isinstance(value, Tensor) for value in values[len(edges) :])
    for i, (node, number) in enumerate(edges):
        grad, values[i] = values[i], None
        if node is None:
            continue
        if grad is not None:
            _add_to_buffer(buffers[node], number, grad, node._input_metadata[number])
        del grad
        dependencies[node] -= 1
        if not dependencies[node]:
            del dependencies[node]
            heapq.heappush(ready, (*_priority(node), node, parent))


def _priority(node: Any) -> tuple[float, int]:
    """Sort parameters first, then nodes made last; the second number tells nodes of the same rank apart."""
    return (float("-inf"), id(node)) if hasattr(node, "variable") else (-node._sequence_nr(), id(node))


def _add_to_buffer(buffer: dict[int, Tensor], number: int, grad: Tensor, expected: Any) -> None:
    # The engine does the same: broadcasting and autocast change shapes and dtypes of gradients.
    if grad.shape != expected.shape:
        grad = grad.sum_to_size(expected.shape)
    if grad.dtype != expected.dtype:
        grad = grad.to(expected.dtype)
    buffer[number] = buffer[number] + grad if number in buffer else grad  # not in place: another node may hold it too


def _accumulate_grad(parameter: Tensor, buffer: dict[int, Tensor]) -> None:
    grad = buffer.pop(0, None)
    if grad is None:
        return
    if parameter.grad is None:
        parameter.grad = grad.detach()
    else:
        parameter.grad.add_(grad)
    for hook in (parameter._post_accumulate_grad_hooks or {}).values():
        hook(parameter)


# ---- what torch.compile keeps for the backward pass


def joint_partition(
    function: Callable[[list[Tensor]], list[Tensor]], inputs: list[Tensor]
) -> tuple[GraphModule, GraphModule, int]:
    """Return the graphs of a function's forward and backward pass, as torch.compile divides the work between them.

    The first one returns the function's results, whose number is the third value, and then what is kept for the second.

    Args:
        function: maps tensors to tensors.
        inputs: examples of them; a gradient is asked for where one requires it.
    """
    needs_gradient = [t.requires_grad for t in inputs]
    with torch.no_grad():
        examples = function([t.detach() for t in inputs])

    def joint(primals: list[Tensor], tangents: list[Tensor]) -> list[Any]:
        leaves = [t.detach().requires_grad_(needs) for t, needs in zip(primals, needs_gradient, strict=True)]
        with torch.enable_grad():
            outputs = function(leaves)
        results = [output.detach() for output in outputs]
        with torch.autocast(inputs[0].device.type, enabled=False):  # outside autocast, as in training
            backward(outputs, tangents)
        return [*results, *(leaf.grad for leaf in leaves)]

    # Inductor's decompositions: the partitioner sees the operators that it sees in torch.compile.
    graph = make_fx(joint, decomposition_table=select_decomp_table())(
        [t.detach() for t in inputs], [torch.empty_like(t) for t in examples]
    )
    n_outputs = len(examples)
    forward_graph, backward_graph = min_cut_rematerialization_partition(graph, None, num_fwd_outputs=n_outputs)
    return forward_graph, backward_graph, n_outputs


def split_tensors(arguments: Any) -> tuple[list[Tensor], Callable[[Sequence[Tensor]], Any]]:
    """Return the tensors in nested arguments, and a function that returns the arguments with others in their places."""
    leaves, structure = tree_flatten(arguments)
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]

    def join(tensors: Sequence[Tensor]) -> Any:
        values = list(leaves)
        for i, tensor in zip(places, tensors, strict=True):
            values[i] = tensor
        return tree_unflatten(values, structure)

    return [leaves[i] for i in places], join
