"""Tries: sequences of tokens that share their beginnings."""

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

    def next_tokens(self, prefix: Sequence[int]) -> list[int]:
        """Return the tokens that may follow a prefix."""
        node = ROOT
        for token in prefix:
            node = self._child[node, token]
        return self._next[node]

    def ancestors(self) -> npt.NDArray[np.bool_]:
        """Return (n, n) bool: True where a node (first axis) is the other one or descends from it."""
        attends = np.eye(len(self), dtype=np.bool_)
        for node, parent in enumerate(self.parents):
            if parent != ROOT:  # parents come first, so theirs is complete
                attends[node] |= attends[parent]
        return attends


class ChoiceTrie:
    """The choices of a constrained generation: exactly one of these strings is generated."""

    def __init__(self, texts: Sequence[str], tokenizer: Tokenizer, max_new_tokens: int) -> None:
        """Raises: UserError if two of them have the same tokens, or one has too many."""
        self._text_of: dict[tuple[int, ...], str] = {}
        for text in dict.fromkeys(texts):  # a choice that is repeated counts once
            ids = tuple(tokenizer.encode(text).tolist())
            if other := self._text_of.get(ids):
                raise UserError(f"choices: {other!r} and {text!r} are the same tokens; leave one of them out")
            if not 0 < len(ids) < max_new_tokens:  # `<`: </s> needs room too
                raise UserError(
                    f"choices: {text!r} has {len(ids)} tokens; with </s> it must take 2 to max_new_tokens = {max_new_tokens}"
                )
            self._text_of[ids] = text
        # </s> ends each path: a choice that begins another one can be generated too.
        self._trie = Trie([(*ids, EOS) for ids in self._text_of])
        self.n_steps = 1 + max(len(ids) for ids in self._text_of)
        """Tokens of the longest choice, </s> included."""

    def next_tokens(self, prefix: Sequence[int]) -> list[int]:
        """Return the tokens that may follow the beginning of a choice."""
        return self._trie.next_tokens(prefix)

    def text(self, tokens: Sequence[int]) -> str:
        """Return the choice of these tokens, spelled as in the settings."""
        return self._text_of[tuple(tokens)]
