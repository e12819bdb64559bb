"""Selection of the samples in a report: the most informative ones, and random ones, which are more typical."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kosmos_lit.evaluation.multiple_choice import softmax
from kosmos_lit.evaluation.results import NAN, iterate_samples, sample_at


@dataclass(frozen=True, kw_only=True)
class SelectedSample:
    """A sample for the report."""

    sample: Mapping[str, Any]
    score: float
    why: str
    """Why it was selected."""


@dataclass(frozen=True, kw_only=True)
class SampleSelection:
    """The samples of a task for the report."""

    failures: tuple[SelectedSample, ...]
    successes: tuple[SelectedSample, ...]
    failed: tuple[tuple[str, str], ...]
    """Key and error of the first samples that failed."""
    metric: str
    """The score that separates successes from failures."""
    n_failures: int
    n_successes: int


def select_samples(
    path: Path, main_metric: str, *, n_failures: int = 5, n_successes: int = 3, n_failed: int = 8, seed: int = 0
) -> SampleSelection:
    """Select samples of a file; the selection does not depend on the order of its lines.

    A failure scores below one half, or below the median where the metric is not a share (CIDEr). If the model took one of
    several candidates, the failures of highest confidence come first; else, if the metric has more than two values, those
    of the lowest score. Two failures and all successes but one are random.

    The file is read once; three numbers and the key of each sample are kept, so that any number of samples fits in memory.
    """
    keys: list[str] = []
    positions, scores, confidences = [], [], []
    failed: list[tuple[str, str]] = []
    metric = ""
    for position, sample in iterate_samples(path):
        if sample.get("error"):
            if len(failed) < n_failed:
                failed.append((str(sample["key"]), str(sample["error"])))
            continue
        sample_scores = sample.get("scores") or {}
        # A task may have samples without its main metric: then their first score.
        metric = metric or (main_metric if main_metric in sample_scores else next(iter(sample_scores), ""))
        keys.append(str(sample["key"]))
        positions.append(position)
        score = sample_scores.get(metric)
        # A sample without the score counts as right if it equals its target.
        scores.append(float(sample.get("prediction") == sample.get("target") if score is None else score))
        confidences.append(confidence(sample))
    # (n,): the samples in the order of their keys, and so are all arrays below.
    order = np.array(sorted(range(len(keys)), key=keys.__getitem__), dtype=np.int64)
    columns = (scores, confidences, positions)
    score_of, confidence_of, position_of = (np.asarray(values)[order] if keys else np.zeros(0) for values in columns)
    # A score above 1, such as CIDEr's, is no share.
    threshold = 0.5 if not keys or score_of.max() <= 1 else float(np.median(score_of))
    failures, successes = np.flatnonzero(score_of < threshold), np.flatnonzero(score_of >= threshold)
    is_graded = len(np.unique(score_of)) > 2
    random = np.random.default_rng(seed)

    def select(group: np.ndarray[Any, Any], n: int, n_top: int, is_success: bool) -> tuple[SelectedSample, ...]:
        # Ascending confidence among successes, descending among failures.
        sign = 1 if is_success else -1
        with_confidence = group[~np.isnan(confidence_of[group])]
        if len(with_confidence):
            # Stable: equal confidences stay in the order of keys.
            top = with_confidence[np.argsort(sign * confidence_of[with_confidence], kind="stable")][:n_top]
            why = "lowest confidence" if is_success else "high confidence"
        elif is_graded:
            top = group[np.argsort(-sign * score_of[group], kind="stable")][:n_top]
            why = "among the best" if is_success else "among the worst"
        else:
            top, why = group[:0], ""
        others = random.permutation(np.setdiff1d(group, top))[: n - len(top)]
        selected = [(i, why) for i in top] + [(i, "random") for i in sorted(others)]
        return tuple(
            SelectedSample(sample=sample_at(path, int(position_of[i])), score=float(score_of[i]), why=reason)
            for i, reason in selected
        )

    return SampleSelection(
        failures=select(failures, n_failures, n_failures - 2, False),
        successes=select(successes, n_successes, 1, True),
        failed=tuple(failed),
        metric=metric,
        n_failures=len(failures),
        n_successes=len(successes),
    )


def confidence(sample: Mapping[str, Any]) -> float:
    """Return the share of the model's choice among the candidates, 0 to 1; NaN if there were no candidates."""
    shares = candidate_shares(sample)
    if not shares:
        return NAN
    predicted = [share for text, share in shares if text == sample.get("prediction")]
    # Not so if a task's prediction is no candidate's text, or two candidates have the same.
    return predicted[0] if len(predicted) == 1 else max(share for _, share in shares)


def candidate_shares(sample: Mapping[str, Any]) -> list[tuple[str, float]]:
    """Return the candidates with their shares; empty if there were none.

    They are the task's own if the result's data have `probabilities`; else they follow from the mean log probability of
    the candidates' tokens. The candidates are then those of the last request if it has several, else those of the last
    requests with one each (images, each with its own prompt), numbered from 0.
    """
    if own := (sample.get("data") or {}).get("probabilities"):
        return list(own.items())
    scored = [request for request in sample.get("requests") or () if request.get("candidates")]
    if not scored:
        return []
    last = scored[-1]
    if len(last["candidates"]) > 1:
        names, log_probs = [str(c) for c in last["candidates"]], last["log_probs"]
    elif len(scored) > 1:
        names, log_probs = [str(i) for i in range(len(scored))], [r["log_probs"][0] for r in scored]
    else:
        return []
    return list(zip(names, softmax([sum(row) / max(1, len(row)) for row in log_probs]), strict=True))
