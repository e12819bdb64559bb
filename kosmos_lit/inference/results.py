"""The results of generation and scoring."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Continuation:
    """What a model generated after a prompt."""

    text: str
    """Without the stop string that ended it and the text after that; a choice exactly as in the settings."""
    tokens: tuple[int, ...]
    """All generated ids but </s>."""
    finish_reason: str
    """`end`: </s> came; `stop`: a stop string came; `length`: max_new_tokens are reached."""


@dataclass(frozen=True)
class ScoredCandidate:
    """A candidate with the log-probability of each of its tokens."""

    text: str
    log_probs: tuple[float, ...]
    """In nats, of each of its tokens after the prompt and the tokens before it."""

    @cached_property
    def total(self) -> float:
        """The logarithm of the candidate's probability."""
        return sum(self.log_probs)

    @property
    def n_tokens(self) -> int:
        return len(self.log_probs)

    @property
    def mean(self) -> float:
        """Nats per token."""
        return self.total / self.n_tokens
