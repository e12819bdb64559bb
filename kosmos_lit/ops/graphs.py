"""torch.compile for one model at a time."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from types import FunctionType
from typing import Any, Protocol

import torch

_copies = count()


class Compiler(Protocol):
    """Makes a function faster, and computes the same."""

    def __call__(self, function: Callable[..., Any], *, dynamic: bool | None = False) -> Callable[..., Any]:
        """Return the faster function.

        Args:
            function: must not refer to variables of another function.
            dynamic: whether sizes may vary within a graph; None: those that have varied.
        """


class Graphs:
    """The compiled functions of one model, which all of its layers share.

    torch.compile keeps the graphs of a function with the function's code. Each is for certain shapes, dtypes, modes and
    weights that train or not; a ninth one counts as a runaway and is refused. Several models in one process, or training
    beside validation, need more than eight in all, without any running away. So every model has copies of the functions, one
    for each of the modes: training, without gradients, and inference.
    """

    def __init__(self) -> None:
        self._functions: dict[tuple[Any, bool, bool], Callable[..., Any]] = {}

    def __call__(self, function: Callable[..., Any], *, dynamic: bool | None = False) -> Callable[..., Any]:
        """Return a function's compiled copy for the current mode of autograd; see `Compiler`."""
        key = (function, torch.is_grad_enabled(), torch.is_inference_mode_enabled())
        if key not in self._functions:
            # A break in the graph is an error, not a slow run.
            self._functions[key] = torch.compile(_copy(function), fullgraph=True, dynamic=dynamic)
        return self._functions[key]


def _copy(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the same function with code of its own."""
    assert isinstance(function, FunctionType)
    assert function.__closure__ is None, function
    # Which sizes have varied is remembered by the code's name.
    code = function.__code__.replace(co_name=f"{function.__name__}_{next(_copies)}")
    copy = FunctionType(code, function.__globals__, function.__name__, function.__defaults__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy
