"""Pieces, the text half of a vocabulary: text to numbers 0, 1, ... and back.

`Tokenizer` puts control tokens around these numbers. There are two kinds: SentencePiece models (this file), as of the
released KOSMOS models, and Hugging Face tokenizers (`hugging_face`).
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from functools import cached_property
from typing import Literal, Protocol

import numpy as np
import sentencepiece

from kosmos_lit.errors import UserError
from kosmos_lit.terminal import program
from kosmos_lit.tokenizer.vocabulary import N_CONTROL_PIECES, Ids

Kind = Literal["sentencepiece", "huggingface"]

UNKNOWN = -1
"""The number of a character that the vocabulary has no piece for."""
UNKNOWN_TEXT = " ⁇ "
"""The text that UNKNOWN decodes to, as in SentencePiece."""
SPACE = "▁"
"""A space as pieces spell it."""


class Pieces(Protocol):
    """Text to numbers and back. Numbers lie in [0, n_text), or are UNKNOWN."""

    kind: Kind
    n_text: int
    """How many numbers there are."""
    n_pieces: int
    """The vocabulary's size as its own files count it."""
    reads_newlines: bool
    """Whether decoding gives a newline back; if not, `encode` must not get one."""
    absorbs_space: bool
    """Whether a space in front of a text changes nothing, because encoding would put one there."""
    puts_space: bool
    """Whether encoding puts a space in front of a text; `decode` removes it where a text begins."""

    def encode(self, texts: Sequence[str]) -> list[Ids]:
        """Return the numbers of each text."""

    def encode_flat(self, texts: Sequence[str]) -> tuple[Ids, Ids]:
        """Return the numbers of all texts one after another, and how many belong to each."""

    def decode(self, numbers: Sequence[int], *, begins: bool = True) -> str:
        """Return the text of `numbers`; if it `begins` a text, without the space that encoding puts in front."""

    def name(self, number: int) -> str:
        """Return how a number is written, spaces as spaces."""

    def sizes(self) -> Ids:
        """Return the UTF-8 bytes of text that each number stands for, (2, n_text): inside a text, and where it begins."""

    def to_bytes(self) -> bytes:
        """Return the file that this was made from."""

    def identity(self) -> bytes:
        """Return everything that decides the numbers, as canonical bytes."""


class SentencePieces:
    """A SentencePiece model; number k is its piece k + 3."""

    kind: Kind = "sentencepiece"
    reads_newlines = False

    def __init__(self, model: bytes) -> None:
        """Raises: UserError if `model` is no SentencePiece model with <unk>, <s>, </s> as its pieces 0, 1, 2."""
        self._model = model
        try:
            self._pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise UserError(f"not a SentencePiece model ({len(model)} bytes): {error}") from error
        controls = (self._pieces.unk_id(), self._pieces.bos_id(), self._pieces.eos_id())
        if controls != (0, 1, 2):
            raise UserError(
                f"the SentencePiece model has <unk>, <s>, </s> at {controls}, not at (0, 1, 2); "
                f"train it with `{program()} prepare tokenizer`"
            )
        self.n_pieces: int = self._pieces.get_piece_size()
        self.n_text = self.n_pieces - N_CONTROL_PIECES
        self.absorbs_space: bool = self._pieces.encode(" a") == self._pieces.encode("a")
        first: int = self._pieces.encode("a")[0]
        self.puts_space: bool = self._pieces.id_to_piece(first).startswith(SPACE)

    @cached_property
    def _number_of_piece(self) -> Ids:
        numbers = np.arange(self.n_pieces, dtype=np.int64) - N_CONTROL_PIECES
        numbers[:N_CONTROL_PIECES] = UNKNOWN  # <unk>; the other two never come from text
        return numbers

    def encode(self, texts: Sequence[str]) -> list[Ids]:
        numbers, lengths = self.encode_flat(texts)
        return np.split(numbers, np.cumsum(lengths)[:-1]) if len(texts) else []

    def encode_flat(self, texts: Sequence[str]) -> tuple[Ids, Ids]:
        encoded: list[list[int]] = self._pieces.encode(list(texts), num_threads=1)
        pieces = array("i")
        for text in encoded:
            pieces.fromlist(text)
        numbers = self._number_of_piece[np.frombuffer(pieces, dtype=np.intc)] if pieces else np.empty(0, dtype=np.int64)
        return numbers, np.array([len(text) for text in encoded], dtype=np.int64)

    def decode(self, numbers: Sequence[int], *, begins: bool = True) -> str:
        pieces = [n + N_CONTROL_PIECES if n != UNKNOWN else 0 for n in numbers]
        text: str = self._pieces.decode(pieces)
        leads = not begins and pieces and self._pieces.id_to_piece(pieces[0]).startswith(SPACE)
        return f" {text}" if leads else text

    def raw_name(self, number: int) -> str:
        """Return the piece as the model's file has it."""
        piece: str = self._pieces.id_to_piece(number + N_CONTROL_PIECES)
        return piece

    def name(self, number: int) -> str:
        return self.raw_name(number).replace(SPACE, " ")

    def sizes(self) -> Ids:
        """SentencePiece puts a space before every line; at the start of one, that space is no text."""
        texts = [self.name(number) for number in range(self.n_text)]
        inside, first = ([len(t.encode()) for t in x] for x in (texts, [t.removeprefix(" ") for t in texts]))
        return np.array([inside, first], dtype=np.int64)

    def to_bytes(self) -> bytes:
        return self._model

    def identity(self) -> bytes:
        return self._model
