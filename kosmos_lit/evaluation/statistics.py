"""Figures with their 95 % intervals: percentile bootstrap over samples.

Samples are drawn with replacement, a figure is computed of each draw, and the interval leaves out 2.5 % of these figures on
either side. Percentiles and not BCa: every figure here is a mean or close to one, where both agree, and the corpus measures
have no cheap jackknife. An interval knows only what the samples show: where all of them score alike, it has no width.
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
"""Resamples of a bootstrap; the ends of an interval of 1,000 are good to about a tenth of its width."""
MOST_DRAWS = 1 << 22
"""Numbers of samples that are held at once."""

Values = npt.NDArray[np.float64]
Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Metric:
    """One number of a table."""

    value: float
    low: float
    """2.5 % of bootstrap resamples of the samples lie below."""
    high: float
    """2.5 % lie above."""
    n: int
    """Samples that it is computed from."""


NOTHING = Metric(float("nan"), float("nan"), float("nan"), 0)
"""The figure of no samples."""


def mean_metric(values: Sequence[float] | Values) -> Metric:
    """Return the mean of per-sample scores with its interval."""
    found = np.asarray(values, dtype=np.float64)
    if not len(found):
        return NOTHING
    random = np.random.default_rng(0)
    drawn, n_rows = np.empty(N_RESAMPLES), max(1, MOST_DRAWS // len(found))
    for first in range(0, N_RESAMPLES, n_rows):
        rows = drawn[first : first + n_rows]
        rows[:] = found[random.integers(len(found), size=(len(rows), len(found)))].mean(axis=1)
    return _metric(float(found.mean()), drawn, len(found))


def bootstrap(statistic: Callable[[Numbers], float], n: int, seed: int = 0) -> Metric:
    """Return a statistic of n samples with its interval.

    Args:
        statistic: takes the numbers of the samples, some of them several times; may return NaN where it is not defined:
            such a draw is left out.
        n: samples; 0 gives a figure of NaN.
        seed: of the draws.
    """
    if not n:
        return NOTHING
    random = np.random.default_rng(seed)
    drawn = np.array([statistic(random.integers(n, size=n)) for _ in range(N_RESAMPLES)], dtype=np.float64)
    return _metric(statistic(np.arange(n)), drawn, n)


def _metric(value: float, drawn: Values, n: int) -> Metric:
    defined = drawn[~np.isnan(drawn)]
    low, high = np.percentile(defined, [2.5, 97.5]) if len(defined) else (float("nan"), float("nan"))
    return Metric(value, float(low), float(high), n)


def difference(ours: Mapping[str, float], theirs: Mapping[str, float]) -> Metric:
    """Return by how much the mean of one set of results exceeds that of another, over the same samples.

    The interval is that of the differences sample by sample: it excludes 0 where one is better beyond chance, also where the
    intervals of both means overlap.

    Args:
        ours: a score by each sample's key.
        theirs: the same of what it is set against, such as a control.

    Raises: UserError if the samples are not the same.
    """
    if only := sorted(ours.keys() ^ theirs.keys()):
        raise UserError(
            f"a paired difference needs the same samples on both sides, but {len(only)} are on one side only, such as "
            f"{only[0]!r}; leave out what failed on either side"
        )
    return mean_metric([ours[key] - theirs[key] for key in ours])


def paired(ours: Callable[[Numbers], float], theirs: Callable[[Numbers], float], n: int, seed: int = 0) -> Metric:
    """Return by how much a statistic of n samples exceeds another of the same samples; both as `bootstrap` takes them."""
    return bootstrap(lambda at: ours(at) - theirs(at), n, seed)


def auc_metric(scores: Sequence[float] | Values, labels: Sequence[int] | Numbers, seed: int = 0) -> Metric:
    """Return the area under the ROC curve: how often a positive sample scores above a negative one, ties counting half.

    Args:
        scores: (n,) higher where a sample is likelier positive; any scale.
        labels: (n,) 1 positive, 0 negative.
        seed: of the draws.

    Returns: a value of NaN where all samples are of one class.
    """
    score, label = np.asarray(scores, dtype=np.float64), np.asarray(labels, dtype=np.int64)
    if not 0 < label.sum() < len(label):
        return Metric(float("nan"), float("nan"), float("nan"), len(label))
    # Of ranks the area depends alone; torchmetrics would take scores out of [0, 1] through a sigmoid, and lose digits.
    levels, rank = np.unique(score, return_inverse=True)
    value = float(binary_auroc(torch.from_numpy(rank / len(levels)), torch.from_numpy(label)))

    def area(at: Numbers) -> float:
        positive = np.bincount(rank[at], weights=label[at], minlength=len(levels))
        negative = np.bincount(rank[at], minlength=len(levels)) - positive
        below = np.cumsum(negative) - negative
        n_pairs = positive.sum() * negative.sum()
        return float((positive * (below + negative / 2)).sum() / n_pairs) if n_pairs else float("nan")

    found = bootstrap(area, len(label), seed)
    return Metric(value, found.low, found.high, found.n)


def macro_f1_metric(chosen: Sequence[int] | Numbers, labels: Sequence[int] | Numbers, seed: int = 0) -> Metric:
    """Return the mean over classes of F1; a class that is neither chosen nor right does not count.

    Args:
        chosen: (n,) the class that each sample was given, from 0 on.
        labels: (n,) its own class.
        seed: of the draws.
    """
    prediction, target = np.asarray(chosen, dtype=np.int64), np.asarray(labels, dtype=np.int64)
    if not len(target):
        return NOTHING
    n_classes = int(max(prediction.max(), target.max())) + 1
    value = multiclass_f1_score(torch.from_numpy(prediction), torch.from_numpy(target), max(2, n_classes), average="macro")

    def mean_f1(at: Numbers) -> float:
        table = np.bincount(n_classes * target[at] + prediction[at], minlength=n_classes**2).reshape(n_classes, n_classes)
        both = table.sum(0) + table.sum(1)  # times said, plus times right
        counts = both > 0
        return float((2 * np.diag(table)[counts] / both[counts]).mean())

    found = bootstrap(mean_f1, len(target), seed)
    return Metric(float(value), found.low, found.high, found.n)
