"""The verb `verify-resume`: compare the rows that two runs read, their weights and their optimizer states."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kosmos_lit.checkpoint import SUFFIX, load_checkpoint
from kosmos_lit.cli.parsing import Parser, verb_parser
from kosmos_lit.cli.run_log import read_log
from kosmos_lit.errors import UserError


@dataclass(frozen=True, kw_only=True)
class VerifyResumeOptions:
    """How far runs may differ."""

    runs: tuple[Path, ...]
    tolerance: float = 0.0
    """Largest difference of weights, optimizer state and logged losses."""


def verify_resume_parser() -> Parser:
    """Return the options of `verify-resume`."""
    return verb_parser(
        "verify-resume",
        VerifyResumeOptions,
        positionals={"runs": (2, "folder of a run, or a checkpoint")},
        description="Compare two runs at every step of which both have a checkpoint: the digest of all rows that they have "
        "trained on, their weights and their optimizer states. Exit code 0: all are the same; 1: some differ.",
        epilog="A run that was killed and resumed must be the same as one that was not, bit by bit. On another number of "
        "ranks, or with other micro-batches, the rows must be the same, and everything else up to rounding. Only "
        "checkpoints that still exist can be compared: see `keep` of kosmos_lit.callbacks.Checkpoints.",
    )


def verify_resume(arguments: list[str]) -> int:
    """Compare two runs' rows and weights; return 0 if they are the same, else 1."""
    [a] = verify_resume_parser().read(arguments)
    if not a.tolerance >= 0:  # also refuses NaN
        raise UserError(f"verify-resume: --tolerance must not be negative, got {a.tolerance}")
    first, second = a.runs
    comparisons = compare(first, second)
    for comparison in comparisons:
        print(comparison.describe())
    if difference := first_difference(first, second, a.tolerance):
        print(difference)
    differing = [c.step for c in comparisons if not c.is_same(a.tolerance)]
    if differing:
        print(f"the first checkpoints that differ are those of step {differing[0]:,}")
    print(f"{len(comparisons) - len(differing)} of {len(comparisons)} common checkpoints are the same")
    return 1 if differing else 0


@dataclass(frozen=True)
class CheckpointComparison:
    """Two checkpoints of one step."""

    step: int
    next_rows: tuple[int, int]
    digests: tuple[str, str]
    distance: float
    """Largest absolute difference of any weight; infinite where names or shapes differ, or one is not a number."""
    optimizer_distance: float
    """The same for the optimizer's state."""

    @property
    def has_same_rows(self) -> bool:
        return self.next_rows[0] == self.next_rows[1] and self.digests[0] == self.digests[1]

    def is_same(self, tolerance: float = 0.0) -> bool:
        """Return whether the rows are the same, and weights and optimizer state too, up to `tolerance`."""
        return self.has_same_rows and max(self.distance, self.optimizer_distance) <= tolerance

    def describe(self) -> str:
        """Return the comparison as a line for people."""
        rows = f"rows to {self.next_rows[0]:,}, digest {self.digests[0]}"
        if not self.has_same_rows:
            rows = f"ROWS DIFFER: to {self.next_rows[0]:,} and {self.next_rows[1]:,}, digests {' and '.join(self.digests)}"
        distances = {"weights": self.distance, "optimizer state": self.optimizer_distance}
        equal = [name for name, distance in distances.items() if not distance]
        parts = [f"{' and '.join(equal)} equal bit by bit"] if equal else []
        # "weights differ", but "optimizer state differs".
        parts += [f"{name} differ{'s' * (name != 'weights')} by up to {d:.3g}" for name, d in distances.items() if d]
        return f"step {self.step:>8,}  {rows}, {', '.join(parts)}"


def compare(first: Path, second: Path) -> list[CheckpointComparison]:
    """Compare all pairs of checkpoints that two runs have of the same step.

    Raises: UserError if there are none.
    """
    checkpoints, others = _checkpoints(first), _checkpoints(second)
    steps = sorted(checkpoints.keys() & others.keys())
    if not steps:
        raise UserError(
            f"{first} has checkpoints of the steps {sorted(checkpoints)}, {second} of {sorted(others)}: none in common; "
            "keep more of them (Checkpoints.keep), or let both runs end with the same step"
        )
    return [_compare(step, _load(checkpoints[step]), _load(others[step])) for step in steps]


def first_difference(first: Path, second: Path, tolerance: float = 0.0) -> str | None:
    """Return a message on the first logged step where rows differ, or losses by more than `tolerance`; None if none."""
    log, other_log = read_log(first), read_log(second)
    for step in sorted(log.keys() & other_log.keys()):
        a, b = log[step], other_log[step]
        if a.get("rows") != b.get("rows"):
            return f"in the log the rows differ first at step {step:,}"
        losses = float(a["train/loss"]), float(b["train/loss"])
        if not abs(losses[0] - losses[1]) <= tolerance:  # written so that NaN differs
            return f"in the log the loss differs first at step {step:,}: {losses[0]:.7g} and {losses[1]:.7g}"
    return None


def _checkpoints(run: Path) -> dict[int, Path]:
    """Return a run's checkpoints by step."""
    if run.is_file():
        return {_step(run): run}
    # The folder of a run, or that of its checkpoints.
    files = list(run.glob(f"checkpoints/*{SUFFIX}")) or list(run.glob(f"*{SUFFIX}"))
    if not files:
        raise UserError(f"no checkpoint in {run}; give a run's folder, or one of its checkpoints")
    return {_step(path): path for path in files}


def _step(path: Path) -> int:
    # The name is trusted if `Checkpoints` wrote it: the files of steps that only one run has need not be opened.
    match = re.fullmatch(r"step=(\d{8,})", path.stem)
    return int(match[1]) if match else int(load_checkpoint(path)["global_step"])


def _load(path: Path) -> dict[str, Any]:
    checkpoint = load_checkpoint(path)
    if "rows_digest" not in checkpoint:
        raise UserError(f"{path} is of a version that kept no digest of rows, so its rows cannot be compared")
    return checkpoint


def _compare(step: int, first: Mapping[str, Any], second: Mapping[str, Any]) -> CheckpointComparison:
    return CheckpointComparison(
        step,
        (_next_row(first), _next_row(second)),
        (first["rows_digest"], second["rows_digest"]),
        _distance(first["state_dict"], second["state_dict"]),
        _distance(_optimizer_state(first), _optimizer_state(second)),
    )


def _optimizer_state(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the optimizer's tensors by optimizer, parameter and name."""
    return {
        f"{number}.{parameter}.{name}": torch.as_tensor(value)
        for number, optimizer in enumerate(checkpoint.get("optimizer_states", ()))
        for parameter, state in optimizer["state"].items()
        for name, value in state.items()
    }


def _next_row(checkpoint: Mapping[str, Any]) -> int:
    """Return the stream's position, which the data module stores under its class's name."""
    # Not by the name: runs may have data modules of different classes.
    return next((int(v["next_row"]) for v in checkpoint.values() if isinstance(v, dict) and "next_row" in v), -1)


def _distance(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> float:
    # A name of one side alone gives None, and so an infinite distance.
    names = first.keys() | second.keys()
    return max((_largest_difference(first.get(name), second.get(name)) for name in names), default=0.0)


def _largest_difference(a: Tensor | None, b: Tensor | None) -> float:
    if a is None or b is None or a.shape != b.shape or a.dtype != b.dtype:
        return float("inf")
    if torch.equal(a, b):  # also of empty tensors, which have no maximum
        return 0.0
    # float64: in their own dtype, differences of 16-bit numbers would be rounded.
    difference = float((a.double() - b.double()).abs().max())
    return float("inf") if math.isnan(difference) else difference  # `max` would drop a NaN
