"""Which samples a report shows: the most telling ones, and some by lot so that nobody takes those for typical."""

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
    """A sample that is shown."""

    sample: Mapping[str, Any]
    score: float
    why: str
    """What it was chosen for."""


@dataclass(frozen=True, kw_only=True)
class SampleSelection:
    """The samples of a task that are shown."""

    failures: tuple[SelectedSample, ...]
    successes: tuple[SelectedSample, ...]
    unanswered: tuple[tuple[str, str], ...]
    """Key and error of the first samples that have no answer."""
    measure: str
    """The per-sample score that says what is a success."""
    n_failures: int
    n_successes: int


def select_samples(
    path: Path, headline: str, *, n_failures: int = 5, n_successes: int = 3, n_unanswered: int = 8, seed: int = 0
) -> SampleSelection:
    """Choose among the samples of a file; the same ones whatever the order of its lines.

    A failure scores below one half, or below the middle sample where a measure is not a share (CIDEr). Where the model chose
    among candidates, the failures shown first are those it was surest of; else, where the measure has more than two values,
    those that score lowest. Two failures and all successes but one are drawn by lot.

    The file is read once; of each sample three numbers and its key are kept, so that any number of samples fits in memory.
    """
    keys: list[str] = []
    places, scores, sure = [], [], []
    unanswered: list[tuple[str, str]] = []
    measure = ""
    for place, sample in iterate_samples(path):
        if sample.get("error"):
            if len(unanswered) < n_unanswered:
                unanswered.append((str(sample["key"]), str(sample["error"])))
            continue
        found = sample.get("scores") or {}
        measure = measure or (headline if headline in found else next(iter(found), ""))
        keys.append(str(sample["key"]))
        places.append(place)
        score = found.get(measure)
        scores.append(float(sample.get("prediction") == sample.get("target") if score is None else score))
        sure.append(confidence(sample))
    order = np.array(sorted(range(len(keys)), key=keys.__getitem__), dtype=np.int64)
    worth, confident, place_of = (np.asarray(values)[order] if keys else np.zeros(0) for values in (scores, sure, places))
    bar = 0.5 if not keys or worth.max() <= 1 else float(np.median(worth))
    wrong, right = np.flatnonzero(worth < bar), np.flatnonzero(worth >= bar)
    graded = len(np.unique(worth)) > 2
    random = np.random.default_rng(seed)

    def shown(group: np.ndarray[Any, Any], n: int, n_telling: int, good: bool) -> tuple[SelectedSample, ...]:
        known = group[~np.isnan(confident[group])]
        if len(known):
            telling = known[np.argsort(confident[known] if good else -confident[known], kind="stable")][:n_telling]
            why = "the narrowest" if good else "among the surest errors"
        elif graded:
            telling = group[np.argsort(-worth[group] if good else worth[group], kind="stable")][:n_telling]
            why = "among the best" if good else "among the worst"
        else:
            telling, why = group[:0], ""
        rest = random.permutation(np.setdiff1d(group, telling))[: n - len(telling)]
        picked = [(i, why) for i in telling] + [(i, "by lot") for i in sorted(rest)]
        return tuple(
            SelectedSample(sample=sample_at(path, int(place_of[i])), score=float(worth[i]), why=reason)
            for i, reason in picked
        )

    return SampleSelection(
        failures=shown(wrong, n_failures, n_failures - 2, False), successes=shown(right, n_successes, 1, True),
        unanswered=tuple(unanswered), measure=measure, n_failures=len(wrong), n_successes=len(right),
    )  # fmt: skip


def confidence(sample: Mapping[str, Any]) -> float:
    """Return the share that a model's choice has among the candidates, 0 to 1; NaN if it did not choose."""
    shares = candidate_shares(sample)
    if not shares:
        return NAN
    prediction = [share for text, share in shares if text == sample.get("prediction")]
    return prediction[0] if len(prediction) == 1 else max(share for _, share in shares)


def candidate_shares(sample: Mapping[str, Any]) -> list[tuple[str, float]]:
    """Return candidates with their shares; empty if there was no choice.

    They are the task's own, `probabilities` in an outcome's data. Of a task that hands over none they follow from mean log
    probability of the candidates' tokens. Candidates are then those of the last request that has several, or the last
    requests that have one each (images, each with its own prompt), numbered from 0.
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
