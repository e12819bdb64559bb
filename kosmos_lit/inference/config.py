"""Every setting of generation, with its default. Free of torch, so that `--help` is quick."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from kosmos_lit.config import BaseConfig

BeamStop = Literal["heuristic", "first", "exact"]
BEAM_STOPS = get_args(BeamStop)


@dataclass(frozen=True, kw_only=True)
class GenerationConfig(BaseConfig):
    """Greedy decoding by default; more beams, or a temperature for sampling.

    Logits processors act in the order of transformers: repetition penalty, n-gram limit, choices or forbidden tokens,
    temperature, top-k, top-p.
    """

    max_new_tokens: int = 64
    """Longest continuation in tokens, </s> included."""
    n_beams: int = 1
    """Width of the beam search; 1: no search."""
    length_penalty: float = 1.0
    """A finished beam scores its log-probability / length ** length_penalty, length in tokens, </s> included."""
    beam_stop: BeamStop = "heuristic"
    """When a beam search with n_beams finished beams ends. `heuristic`: when the best running beam, scored at its present
    length, would displace none of them; `exact`: when it would displace none at any length; `first`: at once."""
    temperature: float = 0.0
    """0: the likeliest token; above: draws from softmax(logits / temperature)."""
    top_k: int | None = None
    """Draw among this many likeliest tokens; None: among all."""
    top_p: float | None = None
    """Draw among the likeliest tokens that together reach this probability; None: among all."""
    repetition_penalty: float = 1.0
    """Divides a positive score of every token in prompt or continuation and multiplies a negative one (CTRL, arXiv
    1909.05858, section 4.1). Scores are logits, and log-probabilities in a beam search."""
    no_repeat_ngram_size: int | None = None
    """No run of so many tokens occurs twice in prompt and continuation; None: no limit."""
    stop: Sequence[str] = ()
    """Strings that end a continuation; its text is what comes before the first of them."""
    choices: Sequence[str] = ()
    """If any: the continuation is exactly one of these strings."""
    seed: int = 0
    """Seed of the draws. They depend on it, on the prompt and on its images, but not on the rest of the batch."""
    allow_control_tokens: bool = False
    """Whether control tokens other than </s> and </line>, and ids beyond the tokenizer's, may be generated."""

    def __post_init__(self) -> None:
        self._check_choices()
        self._check_positive("max_new_tokens", "n_beams", "repetition_penalty")
        for name in ("temperature", "length_penalty", "repetition_penalty"):
            # Comparisons alone would let infinity pass.
            self._check(math.isfinite(getattr(self, name)), f"{name} must be finite, got {getattr(self, name)}")
        self._check(self.temperature >= 0, f"temperature must not be negative, got {self.temperature}")
        for name in ("top_k", "no_repeat_ngram_size"):
            value = getattr(self, name)
            self._check(value is None or value > 0, f"{name} must be positive or null, got {value}")
        self._check(self.top_p is None or 0 < self.top_p <= 1, f"top_p must lie in (0, 1], got {self.top_p}")
        for name in ("stop", "choices"):
            value = getattr(self, name)
            # A single string is a sequence of strings too.
            ok = not isinstance(value, str) and all(isinstance(text, str) and text for text in value)
            self._check(ok, f"{name} must be a list of strings that are not empty, got {value!r}")
        self._check_together()

    def _check_together(self) -> None:
        samples = self.temperature > 0
        for name in ("top_k", "top_p"):
            value = getattr(self, name)
            self._check(
                samples or value is None, f"{name} {value} needs a temperature above 0: without one nothing is drawn"
            )
        self._check(
            not samples or self.n_beams == 1,
            f"temperature {self.temperature} and n_beams {self.n_beams} exclude one another: draw, or search",
        )
        for name in ("stop", "no_repeat_ngram_size"):
            value = getattr(self, name)
            self._check(
                not (self.choices and value),
                f"{name} {value!r} and choices exclude one another: it could forbid or cut every choice",
            )
