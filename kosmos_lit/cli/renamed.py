"""What earlier versions called otherwise: each old name, and what to write now.

A commit that renames an option or a key of configs adds a line here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from kosmos_lit.errors import UserError

FLAGS = {
    "generate": {"--beams": "--n_beams", "--no-repeat-ngram": "--no_repeat_ngram_size"},
}
"""Flags by verb, old and new. Those that only had `-` for `_` need no line."""

KEYS = {
    "eval.pictures": "eval.image_control",
    "eval.tasks.*.init_args.measures": "eval.tasks.*.init_args.metrics",
    "model.kosmos.vision.l2_normalise": "model.kosmos.vision.feature_length: 1.0 for true, null for false",
}
"""Keys of configs, old and new; `*` is any name."""

CLASSES = {
    "kosmos_lit.evals.": "kosmos_lit.tasks.",
    "kosmos_lit.fsdp.": "kosmos_lit.sharding.fsdp.",
}
"""How a `class_path` begins, old and new."""


def renamed_flag(verb: str, flag: str, names: Sequence[str]) -> str | None:
    """Return the message on a flag of an earlier version, None if it is none.

    Args:
        verb: its verb.
        flag: with its dashes.
        names: the options that there are, without dashes.
    """
    new = FLAGS.get(verb, {}).get(flag)
    if new is None and "-" in flag[2:] and (written := flag[2:].replace("-", "_")) in names:
        new = f"--{written}"
    return new and f"{verb}: {flag} is {new} now"


def check_names(config: Any, place: str) -> None:
    """Check that a config has no name of an earlier version.

    Raises: UserError that lists all of them, with what to write instead.
    """
    messages = dict.fromkeys(message for keys, value in _leaves(config) if (message := _message(keys, value)))
    if messages:
        raise UserError(f"{place} is of an earlier version: {'; '.join(messages)}")


def check_flags(arguments: Sequence[str]) -> None:
    """Check that no flag sets a key of an earlier version. Raises: UserError with what to write instead."""
    for word in arguments:
        flag, _, value = word.partition("=")
        keys = flag.removeprefix("--").split(".")
        if flag.startswith("--") and flag != "--config" and (message := _message(keys, value)):
            raise UserError(f"{flag} is of an earlier version: {message}")


def _message(keys: Sequence[str], value: Any) -> str | None:
    name = ".".join(keys)
    for old, new in KEYS.items():
        if re.match(rf"{re.escape(old).replace(re.escape('*'), '[^.]+')}(\.|$)", name):
            return f"{old} is {new} now"
    for old, new in CLASSES.items():
        if keys and keys[-1] == "class_path" and str(value).startswith(old):
            return f"{value} is {new}{str(value).removeprefix(old)} now"
    return None


def _leaves(node: Any, keys: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield the path and the value of everything in a config that is no table; a list's items have the list's path."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield from _leaves(value, (*keys, str(key)))
    elif isinstance(node, list):
        for value in node:
            yield from _leaves(value, keys)
    else:
        yield keys, node
