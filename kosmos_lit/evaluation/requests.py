"""What a task asks a model for, and what it gets back.

A prompt is a tuple of parts, text and images in their order, as a document of the training corpora is: the same encoder
makes tokens of both (`evaluation.formatting`). No text is searched for marks, so a dataset's own words stay words.
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
    """Continue a prompt; answered by a `Continuation`."""

    parts: Parts
    settings: GenerationConfig


@dataclass(frozen=True)
class LogLikelihood:
    """Say how likely each candidate is after a prompt; answered by a tuple of `Scored`, in the candidates' order.

    The prompt is read once for all of its candidates.
    """

    parts: Parts
    candidates: tuple[str, ...]


Request = Generate | LogLikelihood
Response = Continuation | tuple[ScoredCandidate, ...]
