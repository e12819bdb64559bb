"""Operations that let the host wait for a device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
READS = {
    aten._local_scalar_dense,
    aten.item,
    aten.nonzero,
    aten.nonzero_numpy,
    aten.masked_select,
    aten.equal,
    aten.is_nonzero,
    aten._unique2,
    aten.unique_consecutive,
    aten.unique_dim,
    aten.bincount,
    aten.allclose,
}
"""Operations whose result is a number on the host, or has as many elements as the values say."""


class HostWaits(TorchDispatchMode):
    """Collects the operations that would let the host wait for a type of device."""

    def __init__(self, device: str = "cpu") -> None:
        super().__init__()
        self.device = device
        self.calls: list[str] = []
        self.n_operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        is_on_device = any(isinstance(t, Tensor) and t.device.type == self.device for t in tree_leaves((args, kwargs)))
        self.n_operations += is_on_device
        if _is_slow_copy(func, args, kwargs) or (is_on_device and _reads_values(func, args, kwargs)):
            self.calls.append(str(func))
        return func(*args, **kwargs)


def _reads_values(func: Any, args: Any, kwargs: Any) -> bool:
    by_mask = func.overloadpacket in (aten.index, aten.index_put, aten.index_put_) and any(
        i is not None and i.dtype == torch.bool for i in args[1]
    )
    counts = func.overloadpacket is aten.repeat_interleave and kwargs.get("output_size") is None
    return func.overloadpacket in READS or by_mask or counts


def _is_slow_copy(func: Any, args: Any, kwargs: Any) -> bool:
    """Return whether an operation copies between host and device, other than asynchronously from pinned memory."""
    if func.overloadpacket is aten._to_copy:
        source, asynchronous = args[0], kwargs.get("non_blocking")
        target = torch.device(kwargs.get("device") or source.device)
    elif func.overloadpacket is aten.copy_:
        source, target, asynchronous = args[1], args[0].device, (*args[2:], kwargs.get("non_blocking"))[0]
    else:
        return False
    if source.device.type == target.type:
        return False
    return target.type == "cpu" or not asynchronous or not getattr(source, "is_fake_pinned", False)
