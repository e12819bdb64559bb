"""Strings that end a continuation."""

from __future__ import annotations

from collections.abc import Sequence

from kosmos_lit.tokenizer import Tokenizer


class StopStrings:
    """Looks for stop strings in what tokens say, wherever tokens begin and end."""

    def __init__(self, stop_strings: Sequence[str], tokenizer: Tokenizer) -> None:
        self._stops, self._tokenizer = tuple(stop_strings), tokenizer

    def end(self, written: Sequence[int]) -> bool:
        """Return whether a stop string has been written."""
        return bool(self._stops) and self._first(self._text(written)) is not None

    def cut(self, written: Sequence[int]) -> str:
        """Return what the tokens say before the first stop string."""
        text = self._text(written)
        return text[: self._first(text)]

    def _text(self, written: Sequence[int]) -> str:
        # A vocabulary with grounding tokens writes them; other control tokens are not there to be shown.
        return self._tokenizer.decode(written, keep_control=bool(self._tokenizer.extra))

    def _first(self, text: str) -> int | None:
        return min((at for stop in self._stops if (at := text.find(stop)) >= 0), default=None)
