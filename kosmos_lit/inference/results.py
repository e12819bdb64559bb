"""What generation gives back."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Continuation:
    """What a model wrote after a prompt."""

    text: str
    """Without the stop string that ended it and what came after; a choice as it was given."""
    tokens: tuple[int, ...]
    """All ids that were written but </s>."""
    ended: str
    """`end`: by </s>; `stop`: by a stop string; `length`: by max_new_tokens."""


@dataclass(frozen=True)
class ScoredCandidate:
    """How likely a continuation is."""

    text: str
    log_probs: tuple[float, ...]
    """In nats, of each of its tokens after the prompt and the tokens before it."""

    @cached_property
    def total(self) -> float:
        """The logarithm of the continuation's probability."""
        return sum(self.log_probs)

    @property
    def n_tokens(self) -> int:
        return len(self.log_probs)

    @property
    def mean(self) -> float:
        """Nats per token."""
        return self.total / self.n_tokens
