"""The one exception that stands for a user's mistake, and the names that a misspelt one may stand for."""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import SequenceMatcher

CLOSE = 0.6
"""Names that are at least so similar are taken for a misspelling of one another (difflib's own default)."""


class UserError(ValueError):
    """A mistake in a config, a command or an input; its message says where, which values, and what to do.

    The command line prints it as one message without a traceback and exits with code 2.
    """


def nearest(name: str, names: Iterable[str]) -> list[str]:
    """Return the names, those most similar to `name` first."""
    return sorted(names, key=lambda other: (-_similarity(name, other), other))


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """Return "; did you mean X?" with the most similar name, empty if none is close."""
    close = [other for other in nearest(name, names)[:1] if _similarity(name, other) >= CLOSE]
    return f"; did you mean {close[0]}?" if close else ""


def _similarity(name: str, other: str) -> float:
    """Return how similar two names are, from 0 to 1; `name` may also stand for the last part of the other one."""
    last = re.split(r"[./]", other)[-1]
    # A little less for a part: the whole name, where it is there too, is meant.
    return max(_ratio(name, other), 0.99 * _ratio(name.removeprefix("--"), last))


def _ratio(one: str, other: str) -> float:
    return SequenceMatcher(None, one, other, autojunk=False).ratio()
