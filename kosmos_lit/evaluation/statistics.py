"""Metrics with their 95 % intervals: percentile bootstrap over samples.

Samples are drawn with replacement, the metric is computed of each draw, and the interval leaves out 2.5 % of these values on
either side. Percentiles and not BCa: every metric here is a mean or close to one, where both agree, and corpus metrics have
no cheap jackknife. If all samples score alike, the interval has no width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torchmetrics.functional.classification import binary_auroc, multiclass_f1_score

from kosmos_lit.errors import UserError

N_RESAMPLES = 1000
"""Draws of a bootstrap; of 1,000, the ends of an interval are exact to about a tenth of its width."""
MAX_INDICES = 1 << 22
"""Indices of drawn samples in memory at once."""

Values = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Metric:
    """A task's value of one metric, with its interval."""

    value: float
    low: float
    """2.5 % of the bootstrap's draws lie below."""
    high: float
    """2.5 % lie above."""
    n: int
    """Number of samples."""


NO_METRIC = Metric(float("nan"), float("nan"), float("nan"), 0)
"""The metric of no samples."""


def mean_metric(values: Sequence[float] | Values) -> Metric:
    """Return the mean of per-sample scores with its interval."""
    scores = np.asarray(values, dtype=np.float64)
    if not len(scores):
        return NO_METRIC
    random = np.random.default_rng(0)  # fixed: equal scores have equal intervals in every report
    means, n_rows = np.empty(N_RESAMPLES), max(1, MAX_INDICES // len(scores))
    for first in range(0, N_RESAMPLES, n_rows):
        rows = means[first : first + n_rows]  # a view: assigning fills `means`
        rows[:] = scores[random.integers(len(scores), size=(len(rows), len(scores)))].mean(axis=1)
    return _metric(float(scores.mean()), means, len(scores))


def bootstrap(statistic: Callable[[Indices], float], n: int, seed: int = 0) -> Metric:
    """Return a statistic of n samples with its interval.

    Args:
        statistic: takes the indices of the drawn samples, some of them several times; draws for which it returns NaN are
            left out.
        n: number of samples; 0 gives a metric of NaN.
        seed: of the draws.
    """
    if not n:
        return NO_METRIC
    random = np.random.default_rng(seed)
    draws = np.array([statistic(random.integers(n, size=n)) for _ in range(N_RESAMPLES)], dtype=np.float64)
    # The value itself takes each sample once.
    return _metric(statistic(np.arange(n)), draws, n)


def _metric(value: float, draws: Values, n: int) -> Metric:
    # A draw may have no value, as the AUC has none of a single class.
    defined = draws[~np.isnan(draws)]
    low, high = np.percentile(defined, [2.5, 97.5]) if len(defined) else (float("nan"), float("nan"))
    return Metric(value, float(low), float(high), n)


def paired_difference(scores: Mapping[str, float], baseline: Mapping[str, float]) -> Metric:
    """Return the difference of two means over the same samples, scores minus baseline.

    Its interval is that of the differences sample by sample: it can exclude 0 although the intervals of both means overlap.

    Args:
        scores: scores by the samples' keys.
        baseline: scores of the same samples in another evaluation, such as a control.

    Raises: UserError if the samples are not the same.
    """
    if unpaired := sorted(scores.keys() ^ baseline.keys()):
        raise UserError(
            f"a paired difference needs the same samples on both sides, but {len(unpaired)} are on one side only, such as "
            f"{unpaired[0]!r}; leave out samples that failed on either side"
        )
    return mean_metric([scores[key] - baseline[key] for key in scores])


def paired_bootstrap(
    statistic: Callable[[Indices], float], baseline: Callable[[Indices], float], n: int, seed: int = 0
) -> Metric:
    """Return the difference of two statistics of the same n samples; both are as `bootstrap` takes them."""
    return bootstrap(lambda at: statistic(at) - baseline(at), n, seed)


def auc_metric(scores: Sequence[float] | Values, labels: Sequence[int] | Indices, seed: int = 0) -> Metric:
    """Return the area under the ROC curve: how often a positive sample scores above a negative one, ties counting half.

    Args:
        scores: (n,) higher for samples that are likelier positive; any scale.
        labels: (n,) 1 positive, 0 negative.
        seed: of the draws.

    Returns: a value of NaN where all samples are of one class.
    """
    score, label = np.asarray(scores, dtype=np.float64), np.asarray(labels, dtype=np.int64)
    if not 0 < label.sum() < len(label):
        return Metric(float("nan"), float("nan"), float("nan"), len(label))
    # The area depends on ranks alone; torchmetrics would put scores outside of [0, 1] through a sigmoid, and lose digits.
    levels, rank = np.unique(score, return_inverse=True)
    value = float(binary_auroc(torch.from_numpy(rank / len(levels)), torch.from_numpy(label)))

    def area(at: Indices) -> float:
        # Counts by level, (levels,): a draw costs no sort. minlength: a draw may lack the highest scores.
        positive = np.bincount(rank[at], weights=label[at], minlength=len(levels))
        negative = np.bincount(rank[at], minlength=len(levels)) - positive
        below = np.cumsum(negative) - negative  # negatives with a lower score than each level
        n_pairs = positive.sum() * negative.sum()
        return float((positive * (below + negative / 2)).sum() / n_pairs) if n_pairs else float("nan")

    # `area` is for the draws alone; the value is that of torchmetrics.
    resampled = bootstrap(area, len(label), seed)
    return Metric(value, resampled.low, resampled.high, resampled.n)


def macro_f1_metric(predictions: Sequence[int] | Indices, labels: Sequence[int] | Indices, seed: int = 0) -> Metric:
    """Return the mean of F1 over classes; classes among neither predictions nor labels do not count.

    Args:
        predictions: (n,) predicted classes, from 0 on.
        labels: (n,) true classes.
        seed: of the draws.
    """
    prediction, target = np.asarray(predictions, dtype=np.int64), np.asarray(labels, dtype=np.int64)
    if not len(target):
        return NO_METRIC
    n_classes = int(max(prediction.max(), target.max())) + 1
    # max: torchmetrics refuses fewer than two classes.
    value = multiclass_f1_score(torch.from_numpy(prediction), torch.from_numpy(target), max(2, n_classes), average="macro")

    def mean_f1(at: Indices) -> float:
        # The confusion matrix from one count of numbered pairs, targets by predictions.
        table = np.bincount(n_classes * target[at] + prediction[at], minlength=n_classes**2).reshape(n_classes, n_classes)
        both = table.sum(0) + table.sum(1)  # times predicted, plus times true
        counts = both > 0
        return float((2 * np.diag(table)[counts] / both[counts]).mean())  # F1 = 2 TP / (predicted + true)

    resampled = bootstrap(mean_f1, len(target), seed)
    return Metric(float(value), resampled.low, resampled.high, resampled.n)
