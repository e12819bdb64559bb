"""The figures of a step are what happened in that step."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from datamodules.mixture import Mixture
from kosmos_lit.batch import CORPORA


@pytest.fixture
def rows(trained: Path) -> list[dict[str, str]]:
    """The log's rows of training steps."""
    with (trained / "csv" / "version_0" / "metrics.csv").open(encoding="utf-8", newline="") as file:
        return [row for row in csv.DictReader(file) if row["train/loss"]]


def test_the_realised_mixture_is_that_of_the_rows_so_far(rows: list[dict[str, str]]) -> None:
    for step, row in enumerate(rows, start=1):
        counts = Mixture.constant((5, 5, 2, 0)).counts(4 * step)
        found = [float(row[f"mix/{name}"]) for name in CORPORA]
        assert found == pytest.approx([n / (4 * step) for n in counts])


def test_a_steps_loss_is_the_token_mean_of_its_corpora(rows: list[dict[str, str]]) -> None:
    for row in rows:
        each = [float(v) for name in CORPORA if (v := row.get(f"train/loss/{name}"))]
        assert min(each) <= float(row["train/loss"]) <= max(each)


def test_shares_lie_between_none_and_all(rows: list[dict[str, str]]) -> None:
    assert all(0 <= float(row[key]) <= 1 for row in rows for key in ("padding", "data_wait"))


def test_speed_and_gradient_are_positive(rows: list[dict[str, str]]) -> None:
    assert all(float(row[key]) > 0 for row in rows for key in ("tokens_per_second", "images_per_second", "grad_norm"))
