"""Ranks that agree: what each of them read must be what the others read, or all of them end with one message."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch.distributed as dist

from kosmos_lit._version import __version__
from kosmos_lit.errors import UserError


def is_distributed() -> bool:
    """Return whether this process is one of several ranks; those of torch's `fake` backend exist in name only."""
    if not (dist.is_available() and dist.is_initialized()):
        return False
    return dist.get_world_size() > 1 and dist.get_backend() != "fake"


def from_rank_zero(value: Any) -> Any:
    """Return rank 0's value of plain data on all ranks. Collective: all ranks must call it."""
    if not is_distributed():
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def check_same(values: Mapping[str, str], advice: str) -> None:
    """Check that all ranks have the same values. Collective: all ranks must call it.

    Args:
        values: by what they are; hashes or other short texts.
        advice: what to do where they differ.

    Raises: UserError naming what differs and on which ranks, on rank 0; the other ranks exit with its code, 2.
    """
    if not is_distributed():
        return
    tables: list[dict[str, str]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(tables, dict(values))
    messages = []
    for name in values:
        ranks: dict[str | None, list[int]] = {}
        for rank, table in enumerate(tables):
            ranks.setdefault(table.get(name), []).append(rank)
        if len(ranks) > 1:
            groups = "; ".join(f"{value} on {_named(numbers)}" for value, numbers in ranks.items())
            messages.append(f"{name} differs among ranks: {groups}")
    if messages and dist.get_rank() != 0:
        sys.exit(2)
    if messages:
        raise UserError(f"{'; '.join(messages)}. {advice}")


def short_hash(value: object) -> str:
    """Return twelve hexadecimal digits for plain data; equal data have equal ones in any process."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


@cache
def code_version() -> str:
    """Return this package's version and a hash of the source files that this process runs."""
    digest = hashlib.sha256()
    root = Path(__file__).parent
    for folder in (root, root.parent / "datamodules"):
        for path in sorted(folder.rglob("*.py")):
            digest.update(path.relative_to(root.parent).as_posix().encode() + path.read_bytes())
    return f"{__version__} {digest.hexdigest()[:12]}"


def _named(ranks: list[int]) -> str:
    """Return ranks as text, long lists cut."""
    some = ", ".join(map(str, ranks[:4]))
    return f"rank{'s' * (len(ranks) > 1)} {some}{f' and {len(ranks) - 4} more' * (len(ranks) > 4)}"
