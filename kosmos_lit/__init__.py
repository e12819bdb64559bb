"""KOSMOS-1 (arXiv 2302.14045) as a Lightning training framework: the model and how it is trained."""

from kosmos_lit._version import __version__

__all__ = ["__version__"]
