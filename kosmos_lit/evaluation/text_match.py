"""How well one text matches another: exact match and F1 of words, as SQuAD and WebSRC have them."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

ARTICLES = re.compile(r"\b(a|an|the)\b")
NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalised(text: str) -> str:
    """Return a text in lower case without ASCII punctuation, then without articles, with single blanks."""
    return " ".join(ARTICLES.sub(" ", text.lower().translate(NO_PUNCTUATION)).split())


def exact_match(prediction: str, references: Sequence[str]) -> float:
    """Return 1 if an answer is one of the references once both are normalised, else 0."""
    return float(normalised(prediction) in {normalised(reference) for reference in references})


def f1(prediction: str, references: Sequence[str]) -> float:
    """Return the best harmonic mean of precision and recall over normalised words, 0 to 1.

    Two texts that have no words left are equal.
    """
    return max(_f1(normalised(prediction).split(), normalised(reference).split()) for reference in references)


def _f1(prediction: Sequence[str], target: Sequence[str]) -> float:
    if not prediction or not target:
        return float(list(prediction) == list(target))
    n_common = (Counter(prediction) & Counter(target)).total()
    return 2 * n_common / (len(prediction) + len(target))
