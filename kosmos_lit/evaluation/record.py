"""What is kept of each sample: everything that was asked and said, and what it is worth."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from kosmos_lit.evaluation.task import Outcome


@dataclass(frozen=True)
class Failure:
    """Why a sample could not be asked about."""

    reason: str
    """A short phrase for counting."""
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


@dataclass(frozen=True)
class Result:
    """One sample's questions, answers, and outcome or failure."""

    key: str
    requests: list[dict[str, Any]]
    """Plain data, see `to_dict`."""
    outcome: Outcome | None
    """None if it failed."""
    failure: Failure | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain data: one line of `samples.jsonl`."""
        outcome = asdict(self.outcome) if self.outcome else {"prediction": None, "target": None, "scores": {}, "data": {}}
        return {"key": self.key, "requests": self.requests, **outcome, "error": str(self.failure) if self.failure else None}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Result:
        """Return what `to_dict` gave."""
        outcome = {name: data[name] for name in ("prediction", "target", "scores", "data")}
        if data["error"] is None:
            return cls(data["key"], data["requests"], Outcome(**outcome))
        reason, _, detail = data["error"].partition(": ")
        return cls(data["key"], data["requests"], None, Failure(reason, detail))
