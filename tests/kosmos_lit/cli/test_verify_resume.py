"""`verify-resume` compares two runs: its messages and exit codes."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kosmos_lit.checkpoint import load_checkpoint
from kosmos_lit.cli import main
from kosmos_lit.cli.verify_resume import compare

Edit = Callable[[dict[str, Any]], None]
Verify = Callable[..., tuple[int, str]]
STEPS = (3, 6)


@pytest.fixture
def verify(capsys: pytest.CaptureFixture[str]) -> Verify:
    """Return a function that runs the verb and returns its exit code and output."""

    def run(*arguments: object) -> tuple[int, str]:
        code = main(["verify-resume", *map(str, arguments)])
        captured = capsys.readouterr()
        return code, captured.out + captured.err

    return run


def checkpoint(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step={step:08d}.ckpt"


@pytest.fixture
def other(trained: Path, tmp_path: Path) -> Path:
    """A copy of a run."""
    shutil.copytree(trained, tmp_path / "other")
    return tmp_path / "other"


def edit(run: Path, step: int, change: Edit) -> None:
    contents = load_checkpoint(checkpoint(run, step))
    change(contents)
    torch.save(contents, checkpoint(run, step).with_suffix(".new"))  # the old one is mapped from disk
    checkpoint(run, step).with_suffix(".new").replace(checkpoint(run, step))


def shift_weight(by: float) -> Edit:
    def change(contents: dict[str, Any]) -> None:
        name = next(name for name, w in contents["state_dict"].items() if w.is_floating_point())
        contents["state_dict"][name] = contents["state_dict"][name].clone()
        contents["state_dict"][name].view(-1)[0] += by

    return change


def shift_moment(by: float) -> Edit:
    def change(contents: dict[str, Any]) -> None:
        state = contents["optimizer_states"][0]["state"][0]
        state["exp_avg"] = state["exp_avg"] + by

    return change


def other_rows(contents: dict[str, Any]) -> None:
    contents["rows_digest"] = f"{int(contents['rows_digest'], 16) ^ 1:016x}"


def test_the_same_runs_are_the_same(verify: Verify, trained: Path, other: Path) -> None:
    code, output = verify(trained, other)

    assert code == 0
    lines = output.splitlines()
    assert lines[-1] == "2 of 2 common checkpoints are the same"
    for line, step in zip(lines, STEPS, strict=False):
        digest = load_checkpoint(checkpoint(trained, step))["rows_digest"]
        assert line == (f"step {step:>8}  rows to {4 * step}, digest {digest}, weights and optimizer state equal bit by bit")
    assert len(lines) == 3


def test_runs_of_other_rows_differ_from_the_first_step_on(verify: Verify, trained: Path, other: Path) -> None:
    for step in STEPS:
        edit(other, step, other_rows)
    _relog(other, 2, "rows", "17")

    code, output = verify(trained, other)

    assert code == 1
    assert "step        3  ROWS DIFFER: to 12 and 12, digests " in output
    assert "in the log the rows differ first at step 2\n" in output
    assert "the first checkpoints that differ are those of step 3\n0 of 2 common checkpoints are the same" in output


def test_checkpoints_that_are_at_another_row_differ(verify: Verify, trained: Path, other: Path) -> None:
    edit(other, 6, lambda contents: contents["WorldData"].update(next_row=25))

    code, output = verify(trained, other)

    assert code == 1
    assert "step        6  ROWS DIFFER: to 24 and 25," in output
    assert "1 of 2 common checkpoints are the same" in output


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (shift_weight(0.25), "optimizer state equal bit by bit, weights differ by up to 0.25\n"),
        (shift_moment(0.25), "weights equal bit by bit, optimizer state differs by up to 0.25\n"),
        (shift_weight(float("nan")), "weights differ by up to inf\n"),
        (lambda contents: contents["state_dict"].popitem(), "weights differ by up to inf\n"),
    ],
    ids=["weights", "optimizer", "not a number", "missing"],
)
def test_the_same_rows_with_other_results_differ(
    verify: Verify, trained: Path, other: Path, change: Edit, message: str
) -> None:
    edit(other, 6, change)

    code, output = verify(trained, other)

    assert code == 1
    assert "ROWS DIFFER" not in output
    assert message in output
    assert "the first checkpoints that differ are those of step 6\n1 of 2" in output


def test_what_is_within_the_tolerance_is_the_same(verify: Verify, trained: Path, other: Path) -> None:
    edit(other, 6, shift_weight(0.25))

    assert [verify(trained, other, "--tolerance", by)[0] for by in ("0.24", "0.26")] == [1, 0]


def test_no_tolerance_makes_other_rows_the_same(verify: Verify, trained: Path, other: Path) -> None:
    edit(other, 6, other_rows)

    assert verify(trained, other, "--tolerance", "1e9")[0] == 1


def test_the_first_step_of_another_loss_is_named(verify: Verify, trained: Path, other: Path) -> None:
    _relog(other, 4, "train/loss", "17.5")

    code, output = verify(trained, other)

    assert "in the log the loss differs first at step 4: " in output
    assert " and 17.5\n" in output
    assert code == 0  # weights are compared by checkpoints alone


def test_a_loss_within_the_tolerance_is_not_named(verify: Verify, trained: Path, other: Path) -> None:
    _relog(other, 4, "train/loss", "17.5")

    assert "in the log" not in verify(trained, other, "--tolerance", "100")[1]


def test_single_checkpoints_are_compared_with_runs_and_with_each_other(verify: Verify, trained: Path, other: Path) -> None:
    edit(other, 6, shift_weight(0.5))

    assert verify(checkpoint(trained, 3), checkpoint(other, 3))[0] == 0
    assert verify(checkpoint(trained, 6), other)[0] == 1
    assert [c.step for c in compare(trained, checkpoint(other, 6))] == [6]


def test_a_checkpoint_that_was_renamed_is_of_the_step_that_it_holds(trained: Path, other: Path) -> None:
    checkpoint(other, 6).rename(other / "checkpoints" / "best.ckpt")

    assert [c.step for c in compare(trained, other)] == [3, 6]


def test_checkpoints_of_steps_that_the_other_run_lacks_are_not_read(trained: Path, other: Path) -> None:
    checkpoint(other, 7).write_bytes(b"what a killed run left")

    assert [c.step for c in compare(trained, other)] == [3, 6]


def test_a_folder_of_checkpoints_is_compared_as_its_run(verify: Verify, trained: Path, other: Path) -> None:
    assert verify(trained, other / "checkpoints")[0] == 0


@pytest.mark.parametrize(
    ("mistake", "named"),
    [
        (
            ("{trained}/checkpoints/step=00000003.ckpt", "{trained}/checkpoints/step=00000006.ckpt"),
            ("has checkpoints of the steps [3], ", " of [6]: none in common; keep more of them (Checkpoints.keep)"),
        ),
        (("{trained}", "{trained}/csv"), ("no checkpoint in {trained}/csv; give a run's folder",)),
        (("{trained}", "{trained}/none"), ("no checkpoint in {trained}/none; give a run's folder",)),
        (("{trained}",), ("verify-resume takes RUN 2 times, got 1",)),
        (("{trained}", "{trained}", "--tolerance=-1"), ("--tolerance must not be negative, got -1.0",)),
        (("{trained}", "{trained}", "--tolerance=.nan"), ("--tolerance must not be negative, got nan",)),
    ],
)
def test_what_cannot_be_compared_is_named(
    verify: Verify, trained: Path, mistake: tuple[str, ...], named: tuple[str, ...]
) -> None:
    code, output = verify(*(argument.format(trained=trained) for argument in mistake))

    assert code == 2
    assert all(name.format(trained=trained) in output for name in named), output


def test_a_checkpoint_without_a_digest_is_named(verify: Verify, trained: Path, other: Path) -> None:
    edit(other, 3, lambda contents: contents.pop("rows_digest"))

    code, output = verify(trained, other)

    assert code == 2
    assert f"{checkpoint(other, 3)} is of a version that kept no digest of rows" in output


def test_help_says_what_is_compared_and_what_the_exit_codes_mean(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["verify-resume", "--help"])

    assert end.value.code == 0
    output = " ".join(capsys.readouterr().out.split())
    for part in ("RUN RUN", "--tolerance", "digest of all rows", "Exit code 0: all are the same; 1: some differ"):
        assert part in output


def _relog(run: Path, step: int, column: str, value: str) -> None:
    """Change a value of a step in a run's log."""
    path = run / "csv" / "version_0" / "metrics.csv"
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        if row["train/loss"] and int(float(row["step"])) == step:
            row[column] = value
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
