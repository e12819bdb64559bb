"""Configuration files one over the other: what is merged by name, and what the files and flags say."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import reduce
from pathlib import Path
from typing import Any

import yaml

from kosmos_lit.errors import UserError

Keys = tuple[str, ...]

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


def with_all_named(arguments: Sequence[str]) -> list[str]:
    """Repeat, behind each config file that has a table of `MERGED`, the entries of the files before it; a null begins anew.

    Raises: UserError if a flag for the table stands before such a file, which would undo it.
    """
    expanded: list[str] = []
    flags, tables, words = dict[Keys, str](), dict[Keys, Any](), iter(arguments)
    for word in words:
        expanded.append(word)
        if word in ("-c", "--config"):
            expanded.append(next(words, ""))  # a missing value is the parser's to report
        elif not word.startswith("--config="):
            flags |= {keys: word.split("=")[0] for keys in MERGED if _is_of(word, keys)}
            continue
        path = Path(expanded[-1].removeprefix("--config="))
        content = read_yaml(path)
        for keys in MERGED:
            around = value_at(content, keys[:-1])
            if not isinstance(around, dict) or keys[-1] not in around:
                continue
            named, before = around[keys[-1]], tables.get(keys)
            if keys in flags and named:
                raise UserError(
                    f"{flags[keys]} is given before {path}, which names {keys[-1]} too; put it behind the last file"
                )
            # A null replaces the table, and the next file begins with nothing.
            tables[keys] = _merged(before, named)
            if before and named:
                # The table within its keys: {"data": {"init_args": {"sources": ...}}}.
                node = reduce(lambda inner, key: {key: inner}, reversed(keys), tables[keys])
                # The parser also takes YAML itself in the place of a file's name.
                expanded.append(f"--config={yaml.safe_dump(node, sort_keys=False)}")
    return expanded


def _is_of(word: str, keys: Keys) -> bool:
    """Tell whether a flag sets something in the table at `keys`; `init_args` may be left out of its name."""
    names = (".".join(keys), ".".join(key for key in keys if key != "init_args"))
    # `\b`: the table itself ("=", "+=") or a key of it (".").
    return any(re.match(rf"--{re.escape(name)}\b", word) for name in names)


def config_files(arguments: Sequence[str]) -> Iterator[Path]:
    """Yield the config files that are named."""
    for flag, value in zip(arguments, [*arguments[1:], ""], strict=False):  # there may be no argument
        if flag in ("-c", "--config"):
            yield Path(value)
        elif flag.startswith("--config="):
            yield Path(flag.partition("=")[2])


def read_yaml(path: Path) -> Any:
    """Return a config file's content, None if it is not there: the parser will say so.

    Raises: UserError if it is no YAML.
    """
    if not path.is_file():
        return None
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
