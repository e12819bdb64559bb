"""Configuration files one over the other: what is merged by name, and what the files and flags say."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import reduce
from pathlib import Path
from typing import Any

import yaml

from kosmos_lit.errors import UserError
from kosmos_lit.shipped import CONFIGS, find_file

Keys = tuple[str, ...]
BASE = CONFIGS / "base.yaml"
"""Read before every file that is named."""

FLAG = "--config="
MERGED: tuple[Keys, ...] = (("data", "init_args", "sources"), ("eval", "tasks"))
"""Tables by name that files add to; the stock parser drops the entries that a later file does not repeat."""


def value_at(node: Any, keys: Sequence[str]) -> Any:
    """Return what lies at `keys` in a file's content, None if nothing does."""
    for key in keys:
        node = node.get(key) if isinstance(node, dict) else None
    return node


def _merged(one: Any, other: Any) -> Any:
    if not (isinstance(one, dict) and isinstance(other, dict)):
        return other
    # A file that names no class changes options of the class before.
    if one.get("class_path") != other.get("class_path", one.get("class_path")):
        return other  # what another class was made with
    return one | {key: _merged(one.get(key), value) for key, value in other.items()}


def with_files_resolved(arguments: Sequence[str]) -> list[str]:
    """Return the arguments with each config file as one word, `--config=PATH`, a shipped one found by its name.

    Raises: UserError if there is no such file, or `BASE`, without which a run would be another one, is missing.
    """
    if not BASE.is_file():
        raise UserError(f"no file {BASE}, which every run begins with: the installation is not complete")
    resolved, words = list[str](), iter(arguments)
    for word in words:
        flag, equals, value = word.partition("=")
        if flag not in ("-c", "--config"):
            resolved.append(word)
        elif (name := value if equals else next(words, None)) is None:
            resolved.append(word)  # a missing value is the parser's to report
        else:
            resolved.append(f"{FLAG}{name if _text(name) is not None else find_file(name, flag)}")
    return resolved


def with_all_named(arguments: Sequence[str]) -> list[str]:
    """Repeat, behind each config file that has a table of `MERGED`, the entries of the files before it; a null begins anew.

    Args:
        arguments: as `with_files_resolved` returns them.

    Raises: UserError if a flag for the table stands before such a file, which would undo it.
    """
    expanded: list[str] = []
    flags, tables = dict[Keys, str](), dict[Keys, Any]()
    for word in arguments:
        expanded.append(word)
        if not word.startswith(FLAG):
            flags |= {keys: word.split("=")[0] for keys in MERGED if _is_of(word, keys)}
            continue
        config = word.removeprefix(FLAG)
        content = read_config(config)
        for keys in MERGED:
            around = value_at(content, keys[:-1])
            if not isinstance(around, dict) or keys[-1] not in around:
                continue
            named, before = around[keys[-1]], tables.get(keys)
            if keys in flags and named:
                raise UserError(
                    f"{flags[keys]} is given before {config}, which names {keys[-1]} too; put it behind the last file"
                )
            # A null replaces the table, and the next file begins with nothing.
            tables[keys] = _merged(before, named)
            if before and named:
                # The table within its keys: {"data": {"init_args": {"sources": ...}}}.
                node = reduce(lambda inner, key: {key: inner}, reversed(keys), tables[keys])
                expanded.append(f"{FLAG}{yaml.safe_dump(node, sort_keys=False)}")
    return expanded


def _is_of(word: str, keys: Keys) -> bool:
    """Tell whether a flag sets something in the table at `keys`; `init_args` may be left out of its name."""
    names = (".".join(keys), ".".join(key for key in keys if key != "init_args"))
    # `\b`: the table itself ("=", "+=") or a key of it (".").
    return any(re.match(rf"--{re.escape(name)}\b", word) for name in names)


def configs_of(arguments: Sequence[str]) -> Iterator[str]:
    """Yield the configs that are given, as `with_files_resolved` returns them."""
    yield from (word.removeprefix(FLAG) for word in arguments if word.startswith(FLAG))


def _text(config: str) -> dict[str, Any] | None:
    """Return a config's content if it is YAML itself in the place of a file's name, as the parser takes it too."""
    try:
        content = yaml.safe_load(config)
    except yaml.YAMLError:
        return None
    return content if isinstance(content, dict) else None


def read_config(config: str) -> Any:
    """Return the content of a config, a file's path or YAML itself.

    Raises: UserError if the file is no YAML.
    """
    if (content := _text(config)) is not None:
        return content
    try:
        return yaml.safe_load(Path(config).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{config} is no YAML: {' '.join(str(error).split())}") from error
