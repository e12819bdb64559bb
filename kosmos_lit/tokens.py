"""Special tokens, the tokenizer, and the token form of an image.

The vocabulary is laid out as in the released KOSMOS models (fairseq over SentencePiece Unigram): four leading control
tokens, the pieces of the SentencePiece model at `piece + 1`, six trailing control tokens. 64,000 pieces give 64,007 ids,
the figure of the paper's Table 17.

Control tokens never come from text: SentencePiece sees text only, and the ids above are added around its output. A
literal "<image>" or "</s>" in a corpus is therefore spelled out in ordinary pieces.

An image is one `<image>` marker in stored tokens, whatever the model's number of latents L; `expand_images` turns it
into `<image>`, L slots, `</image>`, the form in which the model reads it (L + 2 positions).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import sentencepiece

from kosmos_lit.errors import UserError

MODEL_FILE = "sentencepiece.bpe.model"
"""The file's name in the released models; despite it, the model is a Unigram one."""

BOS, PAD, EOS, UNK = 0, 1, 2, 3
LEADING = ("<s>", "<pad>", "</s>", "<unk>")
TRAILING = ("<mask>", "</doc>", "<image>", "</image>", "</chunk>", "</line>")
N_CONTROL_PIECES = 3
"""SentencePiece's own <unk>, <s> and </s>: its pieces 0, 1 and 2, which map to `LEADING`."""

IGNORE = -100
"""The target of a position that carries no loss."""

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class SpecialTokens:
    """The ids of the control tokens of one vocabulary."""

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
    def after(cls, n_pieces: int) -> SpecialTokens:
        """Return the ids for a SentencePiece model of `n_pieces` pieces, its three control pieces included."""
        first = n_pieces - N_CONTROL_PIECES + len(LEADING)
        names = ("mask", "doc_end", "image", "image_end", "chunk_end", "line_end")
        return cls(**{name: first + i for i, name in enumerate(names)})


class Tokenizer:
    """SentencePiece pieces plus control tokens.

    A newline is not text: each line is encoded on its own, and `</line>` stands between two lines.
    """

    def __init__(self, model: bytes) -> None:
        """Raises: UserError if `model` is no SentencePiece model with <unk>, <s>, </s> as its pieces 0, 1, 2."""
        self.model = model
        try:
            self._pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise UserError(f"not a SentencePiece model ({len(model)} bytes): {error}") from error
        controls = (self._pieces.unk_id(), self._pieces.bos_id(), self._pieces.eos_id())
        if controls != (0, 1, 2):
            raise UserError(
                f"the SentencePiece model has <unk>, <s>, </s> at {controls}, not at (0, 1, 2); "
                "train it with `python main.py prepare tokenizer`"
            )
        self.n_pieces: int = self._pieces.get_piece_size()
        self.vocab_size = self.n_pieces - N_CONTROL_PIECES + len(LEADING) + len(TRAILING)
        self.special = SpecialTokens.after(self.n_pieces)
        self.fingerprint = hashlib.sha256(model).hexdigest()[:16]
        """Identifies the vocabulary; an index remembers the one it was made with."""

    @classmethod
    def load(cls, folder: str | Path) -> Tokenizer:
        """Read a tokenizer folder.

        Raises: UserError if there is none.
        """
        path = Path(folder) / MODEL_FILE
        if not path.is_file():
            raise UserError(
                f"no tokenizer in {folder}: {MODEL_FILE} is missing; make one with "
                "`python main.py prepare tokenizer --input FILES --vocab-size N --output DIR`"
            )
        return cls(path.read_bytes())

    @cached_property
    def _id_of_piece(self) -> Ids:
        ids = np.arange(self.n_pieces, dtype=np.int64) + (len(LEADING) - N_CONTROL_PIECES)
        ids[:N_CONTROL_PIECES] = (UNK, BOS, EOS)
        return ids

    @cached_property
    def token_bytes(self) -> Ids:
        """Return the UTF-8 bytes of text that each id stands for, (2, V): inside a line, and at the start of one.

        SentencePiece reads every line as if a space stood before it; at a line's start that space is no text. Control
        tokens stand for no bytes, `</line>` for its newline, an unknown character counts as one byte.
        """
        sizes = np.zeros((2, self.vocab_size), dtype=np.int64)
        for piece in range(N_CONTROL_PIECES, self.n_pieces):
            text: str = self._pieces.id_to_piece(piece).replace("▁", " ")
            sizes[:, self._id_of_piece[piece]] = len(text.encode()), len(text.removeprefix(" ").encode())
        sizes[:, [UNK, self.special.line_end]] = 1
        return sizes

    def count_bytes(self, tokens: Ids, targets: Ids) -> Ids:
        """Return how many UTF-8 bytes of text each target stands for, read after its token; 0 for IGNORE.

        A piece in the middle of a document begins with <s> like a whole one, and may be counted one byte short.
        """
        starts = np.isin(tokens, (BOS, self.special.image_end, self.special.line_end))
        supervised = targets != IGNORE
        return np.where(supervised, self.token_bytes[starts.astype(np.int64), np.where(supervised, targets, 0)], 0)

    def encode(self, text: str) -> Ids:
        """Return the ids of `text`, without <s> and </s>."""
        return self.encode_all([text])[0]

    def encode_all(self, texts: Sequence[str]) -> list[Ids]:
        """Return the ids of each text; one call of SentencePiece for all of them."""
        # What cannot be written as UTF-8 (lone surrogates out of JSON escapes) becomes "?".
        lines = [clean(text).split("\n") for text in texts]
        pieces: list[list[int]] = self._pieces.encode([line for text in lines for line in text])
        encoded, at = [], 0
        for text in lines:
            parts: list[npt.ArrayLike] = []
            for line in pieces[at : at + len(text)]:
                parts += [self._id_of_piece[np.asarray(line, dtype=np.int64)], [self.special.line_end]]
            encoded.append(np.concatenate(parts[:-1]).astype(np.int64))
            at += len(text)
        return encoded

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids`; control tokens other than `</line>` are left out."""
        lines: list[list[int]] = [[]]
        for id_ in ids:
            if id_ == self.special.line_end:
                lines.append([])
            elif id_ == UNK:
                lines[-1].append(0)
            elif len(LEADING) <= id_ < self.special.mask:
                lines[-1].append(int(id_) - len(LEADING) + N_CONTROL_PIECES)
        return "\n".join(self._pieces.decode(line) for line in lines)

    def name(self, id_: int) -> str:
        """Return how `id_` is written: a control token's name, else its piece with spaces as spaces."""
        if id_ < len(LEADING):
            return LEADING[id_]
        if id_ >= self.special.mask:
            return TRAILING[id_ - self.special.mask]
        piece: str = self._pieces.id_to_piece(id_ - len(LEADING) + N_CONTROL_PIECES)
        return piece.replace("▁", " ")


def clean(text: str) -> str:
    """Return `text` with Unix newlines and without what UTF-8 cannot express."""
    return text.replace("\r\n", "\n").replace("\r", "\n").encode("utf-8", "replace").decode("utf-8")


def expand_images(tokens: Ids, special: SpecialTokens, n_latents: int) -> tuple[Ids, Ids, Ids]:
    """Write each image marker out as `<image>`, `n_latents` slots, `</image>`.

    Slots repeat the id of `<image>`, as the released training loader does: what the embedding gives there is overwritten.

    Returns: the expanded ids; for each of `tokens` its last expanded position; for each image its first slot.
    """
    is_image = tokens == special.image
    width = np.where(is_image, n_latents + 2, 1)
    last = np.cumsum(width) - 1
    expanded = np.repeat(tokens, width)
    expanded[last[is_image]] = special.image_end
    return expanded, last, last[is_image] - n_latents
