"""`verify-resume A B`: did two runs read the same rows, and end with the same weights?"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping
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
    """Largest absolute difference of any weight; infinite where names or shapes differ."""

    @property
    def same_rows(self) -> bool:
        return self.next_rows[0] == self.next_rows[1] and self.digests[0] == self.digests[1]

    def describe(self) -> str:
        rows = f"rows to {self.next_rows[0]:,}, digest {self.digests[0]}"
        if not self.same_rows:
            rows = f"ROWS DIFFER: to {self.next_rows[0]:,} and {self.next_rows[1]:,}, digests {' and '.join(self.digests)}"
        weights = "weights equal bit by bit" if not self.distance else f"weights differ by up to {self.distance:.3g}"
        return f"step {self.step:>8,}  {rows}, {weights}"


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
    return [_compare(step, load_checkpoint(mine[step]), load_checkpoint(theirs[step])) for step in steps]


def first_difference(one: Path, other: Path) -> tuple[int, str] | None:
    """Return the first logged step at which two runs' rows or losses differ, and which of them; None: all are equal."""
    mine, theirs = logged(one), logged(other)
    for step in sorted(mine.keys() & theirs.keys()):
        for name in ("rows", "train/loss"):
            if mine[step].get(name) != theirs[step].get(name):
                return step, "rows" if name == "rows" else "the loss"
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
    if run.is_file():
        return {load_checkpoint(run)["global_step"]: run}
    files = list(run.glob(f"checkpoints/*{SUFFIX}")) or list(run.glob(f"*{SUFFIX}"))
    if not files:
        raise UserError(f"no checkpoint in {run}; give a run's folder, or one of its checkpoints")
    return {load_checkpoint(path)["global_step"]: path for path in files}


def _compare(step: int, mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> Comparison:
    if missing := [c for c in (mine, theirs) if "rows_digest" not in c]:
        raise UserError(f"step {step}: {len(missing)} of the checkpoints are of a version that kept no digest of rows")
    return Comparison(
        step,
        (_next_row(mine), _next_row(theirs)),
        (mine["rows_digest"], theirs["rows_digest"]),
        max(_distances(mine["state_dict"], theirs["state_dict"]), default=0.0),
    )


def _next_row(checkpoint: Mapping[str, Any]) -> int:
    return next((int(v["next_row"]) for v in checkpoint.values() if isinstance(v, dict) and "next_row" in v), -1)


def _distances(mine: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> Iterator[float]:
    for name in mine.keys() | theirs.keys():
        a, b = mine.get(name), theirs.get(name)
        if a is None or b is None or a.shape != b.shape or a.dtype != b.dtype:
            yield float("inf")
        elif not torch.equal(a, b):
            yield float((a.double() - b.double()).abs().max())
