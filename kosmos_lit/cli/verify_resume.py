"""`verify-resume A B`: did two runs read the same rows, and get the same weights and optimizer state from them?"""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kosmos_lit.checkpoint import SUFFIX, load_checkpoint
from kosmos_lit.errors import UserError


@dataclass(frozen=True)
class Comparison:
    """Two checkpoints of one step."""

    step: int
    next_rows: tuple[int, int]
    digests: tuple[str, str]
    distance: float
    """Largest absolute difference of any weight; infinite where names or shapes differ, or one is not a number."""
    optimizer_distance: float
    """The same of the optimizer's state."""

    @property
    def same_rows(self) -> bool:
        return self.next_rows[0] == self.next_rows[1] and self.digests[0] == self.digests[1]

    def same(self, tolerance: float = 0.0) -> bool:
        """Tell whether the rows are the same, and weights and optimizer state too, up to `tolerance`."""
        return self.same_rows and max(self.distance, self.optimizer_distance) <= tolerance

    def describe(self) -> str:
        rows = f"rows to {self.next_rows[0]:,}, digest {self.digests[0]}"
        if not self.same_rows:
            rows = f"ROWS DIFFER: to {self.next_rows[0]:,} and {self.next_rows[1]:,}, digests {' and '.join(self.digests)}"
        parts = {"weights": self.distance, "optimizer state": self.optimizer_distance}
        equal = [name for name, distance in parts.items() if not distance]
        told = [f"{' and '.join(equal)} equal bit by bit"] if equal else []
        told += [f"{name} differ{'s' * (name != 'weights')} by up to {d:.3g}" for name, d in parts.items() if d]
        return f"step {self.step:>8,}  {rows}, {', '.join(told)}"


def compare(one: Path, other: Path) -> list[Comparison]:
    """Compare all checkpoints that two runs have of the same steps.

    Raises: UserError if there are none.
    """
    mine, theirs = _checkpoints(one), _checkpoints(other)
    steps = sorted(mine.keys() & theirs.keys())
    if not steps:
        raise UserError(
            f"{one} has checkpoints of the steps {sorted(mine)}, {other} of {sorted(theirs)}: none in common; keep more of "
            "them (Checkpoints.keep), or let both runs end with the same step"
        )
    return [_compare(step, _load(mine[step]), _load(theirs[step])) for step in steps]


def first_difference(one: Path, other: Path, tolerance: float = 0.0) -> str | None:
    """Say at which logged step two runs first differ in rows, or in the loss by more than `tolerance`; None: nowhere."""
    mine, theirs = logged(one), logged(other)
    for step in sorted(mine.keys() & theirs.keys()):
        a, b = mine[step], theirs[step]
        if a.get("rows") != b.get("rows"):
            return f"in the log the rows differ first at step {step:,}"
        losses = float(a["train/loss"]), float(b["train/loss"])
        if not abs(losses[0] - losses[1]) <= tolerance:
            return f"in the log the loss differs first at step {step:,}: {losses[0]:.7g} and {losses[1]:.7g}"
    return None


def logged(run: Path) -> dict[int, dict[str, str]]:
    """Return the log of a run by step, over all its starts; a step that was done again counts as it was done last."""
    found: dict[int, dict[str, str]] = {}
    files = (run / "csv").glob("version_*/metrics.csv")
    for path in sorted(files, key=lambda p: int(p.parent.name.rpartition("_")[2])):
        with path.open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                if row.get("train/loss"):
                    found[int(float(row["step"]))] = row
    return found


def _checkpoints(run: Path) -> dict[int, Path]:
    """Return a run's checkpoints by step, which a name tells as `Checkpoints` writes it; another file is asked."""
    if run.is_file():
        return {_step(run): run}
    files = list(run.glob(f"checkpoints/*{SUFFIX}")) or list(run.glob(f"*{SUFFIX}"))
    if not files:
        raise UserError(f"no checkpoint in {run}; give a run's folder, or one of its checkpoints")
    return {_step(path): path for path in files}


def _step(path: Path) -> int:
    named = re.fullmatch(r"step=(\d{8,})", path.stem)
    return int(named[1]) if named else int(load_checkpoint(path)["global_step"])


def _load(path: Path) -> dict[str, Any]:
    found = load_checkpoint(path)
    if "rows_digest" not in found:
        raise UserError(f"{path} is of a version that kept no digest of rows, so its rows cannot be compared")
    return found


def _compare(step: int, mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> Comparison:
    return Comparison(
        step,
        (_next_row(mine), _next_row(theirs)),
        (mine["rows_digest"], theirs["rows_digest"]),
        _distance(mine["state_dict"], theirs["state_dict"]),
        _distance(_optimizer_state(mine), _optimizer_state(theirs)),
    )


def _optimizer_state(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return what the optimizer keeps of each parameter."""
    return {
        f"{number}.{parameter}.{name}": torch.as_tensor(value)
        for number, optimizer in enumerate(checkpoint.get("optimizer_states", ()))
        for parameter, kept in optimizer["state"].items()
        for name, value in kept.items()
    }


def _next_row(checkpoint: Mapping[str, Any]) -> int:
    return next((int(v["next_row"]) for v in checkpoint.values() if isinstance(v, dict) and "next_row" in v), -1)


def _distance(mine: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
    return max((_between(mine.get(name), theirs.get(name)) for name in mine.keys() | theirs.keys()), default=0.0)


def _between(a: Tensor | None, b: Tensor | None) -> float:
    if a is None or b is None or a.shape != b.shape or a.dtype != b.dtype:
        return float("inf")
    if torch.equal(a, b):
        return 0.0
    found = float((a.double() - b.double()).abs().max())
    return float("inf") if math.isnan(found) else found
