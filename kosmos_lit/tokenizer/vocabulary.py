"""The control tokens of a vocabulary, and their ids.

The order is that of the released KOSMOS models (fairseq over SentencePiece): four leading control tokens, the ids of text,
six trailing control tokens, and any that a model appends. 64,000 SentencePiece pieces give the paper's 64,007 ids;
the grounding tokens of Kosmos-2 behind them give 65,037.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kosmos_lit.errors import UserError

Ids = npt.NDArray[np.int64]

BOS, PAD, EOS, UNK = 0, 1, 2, 3
LEADING = ("<s>", "<pad>", "</s>", "<unk>")
TRAILING = ("<mask>", "</doc>", "<image>", "</image>", "</chunk>", "</line>")
N_CONTROL_PIECES = 3
"""SentencePiece's own <unk>, <s> and </s>: its pieces 0, 1 and 2, which map to `LEADING`."""

GROUNDING_TAGS = (
    "<phrase>",
    "</phrase>",
    "<object>",
    "</object>",
    "</delimiter_of_multi_objects/>",
    "<grounding>",
)
"""Appended by Kosmos-2 behind `</line>`; its patch tokens follow."""


def grounding(n_patches: int = 1024) -> tuple[str, ...]:
    """Return the control tokens that Kosmos-2 appends: its six tags and a token per cell of a grid of `n_patches`."""
    return (*GROUNDING_TAGS, *(f"<patch_index_{i:04d}>" for i in range(n_patches)))


GROUNDING = grounding()
"""Of the released Kosmos-2: ids 64,007 to 65,036."""


@dataclass(frozen=True, kw_only=True)
class SpecialTokens:
    """The ids of the control tokens that every vocabulary has."""

    mask: int
    doc_end: int
    image: int
    image_end: int
    chunk_end: int
    line_end: int
    bos: int = BOS
    pad: int = PAD
    eos: int = EOS
    unk: int = UNK

    @classmethod
    def for_pieces(cls, n_pieces: int) -> SpecialTokens:
        """Return the ids for a SentencePiece model of `n_pieces` pieces, its three control pieces included."""
        return cls.for_text_ids(n_pieces - N_CONTROL_PIECES)

    @classmethod
    def for_text_ids(cls, n_text: int) -> SpecialTokens:
        """Return the ids for a vocabulary with `n_text` ids of text."""
        first = n_text + len(LEADING)
        names = ("mask", "doc_end", "image", "image_end", "chunk_end", "line_end")
        return cls(**{name: first + i for i, name in enumerate(names)})


def check_extra(extra: tuple[str, ...]) -> None:
    """Make sure that appended control tokens have names of their own.

    Raises: UserError naming those that are empty, occur twice, or are control tokens already.
    """
    every = (*LEADING, *TRAILING, *extra)
    twice = sorted({name for name in extra if every.count(name) > 1}) if len(set(every)) < len(every) else []
    if twice or not all(name.strip() for name in extra):
        raise UserError(
            f"extra control tokens need names of their own, got {', '.join(map(repr, twice)) or 'an empty one'}; "
            f"taken are {', '.join((*LEADING, *TRAILING))}"
        )
