"""KOSMOS-1 (arXiv 2302.14045) as a Lightning training framework: the model and how it is trained."""

from typing import TYPE_CHECKING, Any

from kosmos_lit._version import __version__

if TYPE_CHECKING:
    from kosmos_lit.model import Kosmos as Kosmos

__all__ = ["Kosmos", "__version__"]


def __getattr__(name: str) -> Any:
    """Import the model when it is asked for: the loader's processes and `--help` do without torch."""
    if name == "Kosmos":
        from kosmos_lit.model import Kosmos

        return Kosmos
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
