"""Sequences of tokens that share their beginnings, as a tree."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from kosmos_lit.errors import UserError
from kosmos_lit.tokenizer import EOS, Tokenizer

ROOT = -1
"""The node before the first token: the prompt's end."""


class Trie:
    """Nodes numbered so that a parent comes before its children."""

    def __init__(self, sequences: Sequence[Sequence[int]]) -> None:
        self.tokens: list[int] = []
        """The token of each node."""
        self.parents: list[int] = []
        """The node before each node, or ROOT."""
        self.depths: list[int] = []
        """Tokens between each node and the root."""
        self.ends: list[int] = []
        """The last node of each sequence, ROOT for an empty one."""
        self._child: dict[tuple[int, int], int] = {}
        self._next: dict[int, list[int]] = {ROOT: []}
        for sequence in sequences:
            node = ROOT
            for depth, token in enumerate(sequence):
                if (node, token) not in self._child:
                    self._child[node, token] = len(self.tokens)
                    self._next[node].append(token)
                    self._next[len(self.tokens)] = []
                    self.tokens.append(token)
                    self.parents.append(node)
                    self.depths.append(depth)
                node = self._child[node, token]
            self.ends.append(node)

    def __len__(self) -> int:
        return len(self.tokens)

    def after(self, path: Sequence[int]) -> list[int]:
        """Return the tokens that may follow a path from the root."""
        node = ROOT
        for token in path:
            node = self._child[node, token]
        return self._next[node]

    def ancestors(self) -> npt.NDArray[np.bool_]:
        """Return (n, n) bool: True where a node (first axis) is another or comes after it."""
        sees = np.eye(len(self), dtype=np.bool_)
        for node, parent in enumerate(self.parents):
            if parent != ROOT:
                sees[node] |= sees[parent]
        return sees


class ChoiceTrie:
    """A list of strings, one of which is to be written."""

    def __init__(self, texts: Sequence[str], tokenizer: Tokenizer, max_new_tokens: int) -> None:
        """Raises: UserError if two of them read the same in tokens, or one is too long to be written."""
        self._text_of: dict[tuple[int, ...], str] = {}
        for text in dict.fromkeys(texts):
            ids = tuple(tokenizer.encode(text).tolist())
            if other := self._text_of.get(ids):
                raise UserError(f"choices: {other!r} and {text!r} are the same tokens; leave one of them out")
            if not 0 < len(ids) < max_new_tokens:
                raise UserError(
                    f"choices: {text!r} has {len(ids)} tokens; with </s> it must take 2 to max_new_tokens = {max_new_tokens}"
                )
            self._text_of[ids] = text
        self._trie = Trie([(*ids, EOS) for ids in self._text_of])
        self.n_steps = 1 + max(len(ids) for ids in self._text_of)
        """Tokens of the longest, </s> included."""

    def after(self, written: Sequence[int]) -> list[int]:
        """Return the tokens that may follow what has been written of one of them."""
        return self._trie.after(written)

    def text(self, written: Sequence[int]) -> str:
        """Return the string that has been written, as it was given."""
        return self._text_of[tuple(written)]
