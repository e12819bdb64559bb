"""What a task asks a model for, and how it reads the responses.

A prompt is a tuple of parts, text and images in order, as a document of the training corpora is: the same encoder makes
tokens of both (`evaluation.prompts`). No text is searched for marks, so a dataset's own words stay words.
"""

from __future__ import annotations

from dataclasses import dataclass

from kosmos_lit.images import ImageLike
from kosmos_lit.inference.config import GenerationConfig
from kosmos_lit.inference.results import Continuation, ScoredCandidate

Part = str | ImageLike
"""Text is `str`; an image's file is a `pathlib.Path`, never a string."""
Parts = tuple[Part, ...]


@dataclass(frozen=True)
class Generate:
    """Continue a prompt; the response is a `Continuation`."""

    parts: Parts
    settings: GenerationConfig


@dataclass(frozen=True)
class LogLikelihood:
    """Score each candidate as the continuation of a prompt; the response is a tuple of `ScoredCandidate` in their order.

    All candidates share one prefill of the prompt.
    """

    parts: Parts
    candidates: tuple[str, ...]


Request = Generate | LogLikelihood
Response = Continuation | tuple[ScoredCandidate, ...]


def generated_text(response: Response) -> str:
    """Return the text of the response to a `Generate`, without surrounding blanks."""
    assert not isinstance(response, tuple)
    return response.text.strip()


def scored_candidates(response: Response) -> tuple[ScoredCandidate, ...]:
    """Return the candidates of the response to a `LogLikelihood`, with their log-probabilities."""
    assert isinstance(response, tuple)
    return response
