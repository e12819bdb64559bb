"""Logged metrics of a step are those of that step."""

from __future__ import annotations

import csv
import itertools
import math
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
        actual = [float(row[f"mix/{name}"]) for name in CORPORA]
        assert actual == pytest.approx([n / (4 * step) for n in counts])


def test_a_steps_loss_is_the_token_mean_of_its_corpora(rows: list[dict[str, str]]) -> None:
    for row in rows:
        each = [loss for name in CORPORA if not math.isnan(loss := float(row.get(f"train/loss/{name}") or "nan"))]
        assert min(each) <= float(row["train/loss"]) <= max(each)


def test_a_corpus_without_tokens_in_a_step_has_no_loss_of_another_step(rows: list[dict[str, str]]) -> None:
    counts = [Mixture.constant((5, 5, 2, 0)).counts(4 * step) for step in range(7)]
    expected = [[now > before for before, now in zip(*pair, strict=True)] for pair in itertools.pairwise(counts)]

    assert sorted({step[2] for step in expected}) == [False, True]  # interleaved rows are rare
    for row, has_tokens in zip(rows, expected, strict=True):
        actual = [not math.isnan(float(row.get(f"train/loss/{name}") or "nan")) for name in CORPORA]
        assert actual == has_tokens


def test_shares_lie_between_none_and_all(rows: list[dict[str, str]]) -> None:
    assert all(0 <= float(row[key]) <= 1 for row in rows for key in ("padding", "data_wait"))


def test_speed_and_gradient_are_positive(rows: list[dict[str, str]]) -> None:
    assert all(float(row[key]) > 0 for row in rows for key in ("tokens_per_second", "images_per_second", "grad_norm"))


def test_a_validation_is_logged_at_its_step(trained: Path) -> None:
    with (trained / "csv" / "version_0" / "metrics.csv").open(encoding="utf-8", newline="") as file:
        actual = [int(row["step"]) for row in csv.DictReader(file) if row["val/loss"]]

    assert actual == [3, 6]
