"""The ledger of bad samples: where each lies, and what is wrong with it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class BadSample:
    """A sample that cannot be used; one JSON line of a ledger."""

    source: str
    """Name of the source in the run's config; the format where it is prepared."""
    shard: str
    """The file's path as the index keeps it."""
    key: str
    """What finds it there: a tar key, a URL, `line 17`."""
    reason: str
    """A short phrase for counting."""
    detail: str = ""
    """What the reader said."""

    def to_json(self) -> str:
        return json.dumps(asdict(self), ensure_ascii=False)
