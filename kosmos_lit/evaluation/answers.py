"""What a model's answers say: a text, or which of a few candidates is likeliest."""

from __future__ import annotations

import math
from collections.abc import Sequence

from kosmos_lit.evaluation.requests import Response
from kosmos_lit.inference.results import ScoredCandidate


def written(answer: Response) -> str:
    """Return what was written in answer to a `Generate`, without blanks around it."""
    assert not isinstance(answer, tuple)
    return answer.text.strip()


def compared(answer: Response) -> tuple[ScoredCandidate, ...]:
    """Return the candidates of a `LogLikelihood` with their probabilities."""
    assert isinstance(answer, tuple)
    return answer


def shares(scored: Sequence[ScoredCandidate]) -> list[float]:
    """Return each candidate's probability as a share of that of all of them."""
    return softmax([one.total for one in scored])


def softmax(values: Sequence[float]) -> list[float]:
    """Return e to the power of each value, as a share of their sum."""
    highest = max(values)
    raised = [math.exp(value - highest) for value in values]
    return [one / sum(raised) for one in raised]


def credit(values: Sequence[float], target: int) -> float:
    """Return 1 if the right one has the highest value, less if it shares the highest with others, else 0.

    Equals share the point, so that a model which tells nothing apart scores as guessing does.
    """
    best = [i for i, value in enumerate(values) if value == max(values)]
    return float(target in best) / len(best)
