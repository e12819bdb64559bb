"""Strings that end a continuation."""

from __future__ import annotations

from collections.abc import Sequence

from kosmos_lit.tokenizer import Tokenizer


class StopStrings:
    """Finds stop strings in the text of tokens, across the boundaries of tokens."""

    def __init__(self, stop_strings: Sequence[str], tokenizer: Tokenizer) -> None:
        self._stop_strings, self._tokenizer = tuple(stop_strings), tokenizer

    def occurs_in(self, tokens: Sequence[int]) -> bool:
        """Return whether the tokens' text has a stop string."""
        return bool(self._stop_strings) and self._first(self._text(tokens)) is not None

    def cut(self, tokens: Sequence[int]) -> str:
        """Return the tokens' text before the first stop string."""
        text = self._text(tokens)
        return text[: self._first(text)]  # None, without a stop string, cuts nothing

    def _text(self, tokens: Sequence[int]) -> str:
        # Grounding tokens are part of an answer; in a vocabulary without them, no control token is.
        return self._tokenizer.decode(tokens, keep_control=bool(self._tokenizer.extra))

    def _first(self, text: str) -> int | None:
        return min((at for stop in self._stop_strings if (at := text.find(stop)) >= 0), default=None)
