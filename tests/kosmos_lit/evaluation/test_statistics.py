"""Metrics against other implementations or values by hand, and the coverage of intervals."""

from __future__ import annotations

from dataclasses import astuple
from math import isnan, sqrt

import numpy as np
import pytest
from sklearn.metrics import f1_score, roc_auc_score

from kosmos_lit.errors import UserError
from kosmos_lit.evaluation.statistics import (
    Indices,
    auc_metric,
    bootstrap,
    macro_f1_metric,
    mean_metric,
    paired_bootstrap,
    paired_difference,
)


@pytest.mark.parametrize("n", [1, 7, 4999])  # the last one is drawn in several parts
def test_the_fast_mean_is_the_plain_bootstrap_of_a_mean(n: int) -> None:
    values = np.random.default_rng(3).normal(size=n)

    fast, plain = mean_metric(values), bootstrap(lambda at: float(values[at].mean()), n)

    assert (fast.value, fast.n) == (plain.value, plain.n)
    assert (fast.low, fast.high) == pytest.approx((plain.low, plain.high), rel=1e-12)  # sums in another order


def test_the_interval_of_a_share_is_that_of_the_binomial() -> None:
    metric = mean_metric([1.0] * 300 + [0.0] * 100)

    half = 1.96 * sqrt(0.75 * 0.25 / 400)  # the bootstrap of a share is a binomial; 400 samples are nearly normal
    assert metric.value == 0.75
    assert metric.low == pytest.approx(0.75 - half, abs=0.15 * half)
    assert metric.high == pytest.approx(0.75 + half, abs=0.15 * half)


def test_intervals_cover_the_truth_nineteen_times_in_twenty() -> None:
    random = np.random.default_rng(5)
    shares, areas = 0, 0
    for _ in range(200):
        metric = mean_metric((random.random(151) < 0.3).astype(float))
        shares += metric.low <= 0.3 <= metric.high
    for _ in range(30):
        labels = (random.random(151) < 0.5).astype(np.int64)
        metric = auc_metric(random.normal(size=151) + labels * sqrt(2) * 0.5244, labels)
        areas += metric.low <= 0.7 <= metric.high  # Phi(0.5244) = 0.7: two normals with that distance / sqrt 2

    assert 0.90 <= shares / 200 <= 0.985  # 0.95 +- 3 standard deviations of 200 draws
    assert areas / 30 >= 0.85


def test_no_samples_have_no_metric() -> None:
    metrics = [mean_metric([]), bootstrap(lambda at: float(at.mean()), 0), macro_f1_metric([], [])]

    assert all(metric.n == 0 and isnan(metric.value) and isnan(metric.low) for metric in metrics)


def test_draws_where_a_statistic_is_not_defined_are_left_out() -> None:
    metric = bootstrap(lambda at: float("nan") if 0 in at else 5.0, 3)
    never = bootstrap(lambda at: float("nan"), 3)

    assert (metric.low, metric.high) == (5.0, 5.0)
    assert isnan(never.low)


def test_a_paired_difference_sees_what_two_intervals_hide() -> None:
    random = np.random.default_rng(0)
    hard = random.normal(size=97)  # how hard each sample is, for both
    baseline = {f"s{i}": float(value) for i, value in enumerate(hard)}
    scores = {key: value + 0.1 + 0.05 * random.normal() for key, value in reversed(baseline.items())}

    metric = paired_difference(scores, baseline)

    one, other = mean_metric(list(scores.values())), mean_metric(list(baseline.values()))
    assert metric.value == pytest.approx(one.value - other.value)
    assert one.low < other.high
    assert 0 < metric.low < 0.1 < metric.high


def test_a_difference_of_statistics_draws_the_same_samples_on_both_sides() -> None:
    values = np.random.default_rng(1).normal(size=31)

    metric = paired_bootstrap(lambda at: float(values[at].max()) + 1.0, lambda at: float(values[at].max()), 31)

    assert astuple(metric) == pytest.approx((1.0, 1.0, 1.0, 31))


def test_a_difference_of_other_samples_is_an_error() -> None:
    with pytest.raises(UserError, match="2 are on one side only, such as 'b'"):
        paired_difference({"a": 1.0, "b": 0.0}, {"a": 1.0, "c": 0.0})


def test_auc_by_hand() -> None:
    # Positives 0.9, 0.4 against negatives 0.4, 0.1, 0.5: pairs won 3 + 1, one tie, one lost.
    assert auc_metric([0.9, 0.4, 0.4, 0.1, 0.5], [1, 1, 0, 0, 0]).value == pytest.approx(4.5 / 6)


def test_auc_is_that_of_scikit_learn_and_its_interval_that_of_counted_pairs() -> None:
    random = np.random.default_rng(2)
    labels = (random.random(83) < 0.4).astype(np.int64)
    scores = np.round(random.normal(size=83) + labels, 1) * 1e-9 - 50.0  # ties, and log-probabilities far from 0

    def pairs_won(at: Indices) -> float:
        high, low = scores[at][labels[at] == 1, None], scores[at][labels[at] == 0]
        return float(((high > low) + (high == low) / 2).mean())

    metric = auc_metric(scores, labels)

    plain = bootstrap(pairs_won, 83)
    assert metric.value == pytest.approx(roc_auc_score(labels, scores))
    assert astuple(metric) == pytest.approx(astuple(plain))


def test_auc_of_one_class_is_not_defined() -> None:
    metric = auc_metric([0.1, 0.2, 0.3], [1, 1, 1])

    assert isnan(metric.value)
    assert metric.n == 3


@pytest.mark.parametrize("n_classes", [2, 3])
def test_macro_f1_is_that_of_scikit_learn(n_classes: int) -> None:
    random = np.random.default_rng(n_classes)
    labels, predictions = random.integers(n_classes, size=56), random.integers(n_classes, size=56)

    assert macro_f1_metric(predictions, labels).value == pytest.approx(f1_score(labels, predictions, average="macro"))


def test_macro_f1_by_hand_leaves_out_a_class_that_does_not_occur() -> None:
    # Class 0: precision 1/2, recall 1/1: F1 2/3. Class 2: precision 1/1, recall 1/2: 2/3. Class 1 does not occur.
    metric = macro_f1_metric([0, 0, 2], [0, 2, 2])

    assert metric.value == pytest.approx(2 / 3)
    assert metric.low <= 2 / 3 <= metric.high == 1.0
