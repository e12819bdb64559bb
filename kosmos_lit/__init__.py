"""KOSMOS-1 (arXiv 2302.14045) as a Lightning training framework."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from kosmos_lit._version import __version__

if TYPE_CHECKING:
    # `as` tells type checkers that a name is exported.
    from kosmos_lit.inference.engine import Engine as Engine
    from kosmos_lit.inference.engine import load as load
    from kosmos_lit.model import Kosmos as Kosmos

__all__ = ["Engine", "Kosmos", "__version__", "load"]

_MODULES = {"Engine": "kosmos_lit.inference.engine", "load": "kosmos_lit.inference.engine", "Kosmos": "kosmos_lit.model"}


def __getattr__(name: str) -> Any:
    """Import a public name at its first use: the loader's processes and `--help` do without torch."""
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
