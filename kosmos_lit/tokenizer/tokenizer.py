"""The tokenizer, and the token form of an image.

The ids of text stand between leading and trailing control tokens (`vocabulary`): id 4 + k for number k of the `pieces`.
For a SentencePiece model that is its piece number + 1, as in the released models.

Control tokens never come from text: the pieces see text only, and the control ids are added around their output. A
literal "<image>" or "</s>" in a corpus is therefore spelled out in ordinary pieces. A prompt may ask for them by name
(`encode_marked`).

An image is one `<image>` marker in stored tokens, whatever the model's number of latents L; `expand_images` turns it
into `<image>`, L slots, `</image>`, the form in which the model reads it (L + 2 positions).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from kosmos_lit.errors import UserError
from kosmos_lit.tokenizer import files, xlm_roberta
from kosmos_lit.tokenizer.files import has_tokenizer
from kosmos_lit.tokenizer.pieces import Pieces, SentencePieces
from kosmos_lit.tokenizer.vocabulary import (
    BOS,
    EOS,
    GROUNDING,
    GROUNDING_TAGS,
    LEADING,
    PAD,
    TRAILING,
    UNK,
    Ids,
    SpecialTokens,
    check_extra,
    grounding,
)
from kosmos_lit.tokenizer.xlm_roberta import MODEL_FILE

if TYPE_CHECKING:
    from transformers import XLMRobertaTokenizer

__all__ = [
    "BOS", "EOS", "GROUNDING", "GROUNDING_TAGS", "IGNORE", "LEADING", "MODEL_FILE", "PAD", "TRAILING", "UNK", "Ids",
    "SpecialTokens", "Tokenizer", "clean", "expand_images", "grounding", "has_tokenizer", "trimmed",
]  # fmt: skip

Part = TypeVar("Part")

IGNORE = -100
"""The target of a position that carries no loss."""


class Tokenizer:
    """Pieces plus control tokens.

    For pieces that cannot read a newline (SentencePiece), each line is encoded on its own, and `</line>` stands between
    two lines. Byte-level pieces read it as they read all text, and `</line>` does not occur.
    """

    def __init__(self, pieces: bytes | Pieces, extra: Iterable[str] = ()) -> None:
        """Take the pieces, or the bytes of a SentencePiece model, and the control tokens to append, such as `GROUNDING`.

        Raises: UserError if the bytes are no such model, or the names of `extra` are not new.
        """
        self._pieces: Pieces = SentencePieces(pieces) if isinstance(pieces, bytes) else pieces
        self.extra = tuple(extra)
        check_extra(self.extra)
        self.n_pieces = self._pieces.n_pieces
        self.special = SpecialTokens.for_text_ids(self._pieces.n_text)
        self.vocab_size = self.special.line_end + 1 + len(self.extra)
        self.fingerprint = hashlib.sha256(self._identity()).hexdigest()[:16]
        """Identifies the vocabulary; an index remembers the one it was made with."""

    def _identity(self) -> bytes:
        if not self.extra and self._pieces.kind == "sentencepiece":
            return self._pieces.identity()
        return json.dumps([self._pieces.kind, self.extra]).encode() + self._pieces.identity()

    def __reduce__(self) -> tuple[object, tuple[bytes]]:
        return Tokenizer.from_bytes, (self.to_bytes(),)

    # ---- files

    @classmethod
    def load(cls, folder: str | Path) -> Tokenizer:
        """Read a tokenizer folder: one that `save` wrote, a released model's, or any Hugging Face tokenizer's.

        Raises: UserError if there is none, or its files contradict each other.
        """
        return cls(*files.read_folder(Path(folder)))

    def save(self, folder: str | Path) -> None:
        """Write a folder that `load` reads; other files in it are kept."""
        files.write_folder(Path(folder), self._pieces, self.extra)

    @classmethod
    def from_bytes(cls, data: bytes) -> Tokenizer:
        """Read what `to_bytes` gave, or the bytes of a SentencePiece model.

        Raises: UserError if it is neither.
        """
        return cls(*files.unpack(data))

    def to_bytes(self) -> bytes:
        """Return the whole tokenizer as plain data; the bytes of its model for SentencePiece without extra tokens."""
        return files.pack(self._pieces, self.extra)

    @classmethod
    def from_transformers(cls, folder: str | Path) -> Tokenizer:
        """Read the files that `transformers` keeps of a Kosmos-2 or XLM-RoBERTa tokenizer, with the same ids.

        Raises: UserError if the folder holds something else.
        """
        return cls(*xlm_roberta.read(Path(folder)))

    def to_transformers(self) -> XLMRobertaTokenizer:
        """Return the tokenizer for `transformers` and its Kosmos2Processor; see docs/tokenizers.md for what differs.

        Raises: UserError if the pieces have no counterpart there.
        """
        return xlm_roberta.convert(self._pieces, self.extra)

    def save_transformers(self, folder: str | Path) -> None:
        """Write the files that `AutoTokenizer.from_pretrained` reads, and the SentencePiece model beside them.

        Raises: UserError as `to_transformers` does.
        """
        xlm_roberta.write(Path(folder), self._pieces, self.extra)

    # ---- names

    @cached_property
    def _control_ids(self) -> dict[str, int]:
        last = enumerate((*TRAILING, *self.extra), start=self.special.mask)
        return {name: id_ for id_, name in (*enumerate(LEADING), *last)}

    @cached_property
    def _control_names(self) -> dict[int, str]:
        return {id_: name for name, id_ in self._control_ids.items()}

    def name(self, id_: int) -> str:
        """Return how `id_` is written: a control token's name, else its piece with spaces as spaces."""
        return self._control_names.get(id_) or self._pieces.name(id_ - len(LEADING))

    def id_of(self, name: str) -> int:
        """Return the id of the control token `name`.

        Raises: UserError if there is none of that name.
        """
        if name not in self._control_ids:
            known = (*LEADING, *TRAILING, *self.extra[:8], *(["..."] if len(self.extra) > 8 else []))
            raise UserError(f"the tokenizer has no control token {name!r}; it has {', '.join(known)}")
        return self._control_ids[name]

    # ---- bytes

    @cached_property
    def token_bytes(self) -> Ids:
        """Return the UTF-8 bytes of text that each id stands for, (2, V): inside a line, and at the start of one.

        Control tokens stand for no bytes, `</line>` for its newline, an unknown character counts as one byte.
        """
        sizes = np.zeros((2, self.vocab_size), dtype=np.int64)
        sizes[:, len(LEADING) : self.special.mask] = self._pieces.sizes()
        sizes[:, [UNK, self.special.line_end]] = 1
        return sizes

    def count_bytes(self, tokens: Ids, targets: Ids) -> Ids:
        """Return how many UTF-8 bytes of text each target stands for, read after its token; 0 for IGNORE.

        A piece in the middle of a document begins with <s> like a whole one, and may be counted one byte short. A word
        behind an appended control token counts with the space that `decode` writes there.
        """
        starts = (tokens == BOS) | (tokens == self.special.image_end) | (tokens == self.special.line_end)
        supervised = targets != IGNORE
        return np.where(supervised, self.token_bytes[starts.astype(np.int64), np.where(supervised, targets, 0)], 0)

    # ---- text

    def encode(self, text: str) -> Ids:
        """Return the ids of `text`, without <s> and </s>."""
        return self.encode_all([text])[0]

    def encode_all(self, texts: Sequence[str]) -> list[Ids]:
        """Return the ids of each text; one call of the pieces for all of them."""
        # What cannot be written as UTF-8 (lone surrogates out of JSON escapes) becomes "?".
        if self._pieces.reads_newlines:
            return [numbers + len(LEADING) for numbers in self._pieces.encode([_writable(text) for text in texts])]
        return self._encode_lines([clean(text).split("\n") for text in texts])

    def _encode_lines(self, texts: Sequence[Sequence[str]]) -> list[Ids]:
        """Return the ids of texts given as lines; each line is read once, however often it occurs."""
        number_of = {line: i for i, line in enumerate(dict.fromkeys(line for lines in texts for line in lines))}
        numbers, lengths = self._pieces.encode_flat(list(number_of))
        starts = np.cumsum(lengths) - lengths
        line = np.array([number_of[line] for lines in texts for line in lines], dtype=np.int64)
        length = lengths[line] + 1  # and </line>
        end = np.cumsum(length)
        ids = np.empty(end[-1] if len(end) else 0, dtype=np.int64)
        source = np.repeat(starts[line] - (end - length), length) + np.arange(len(ids))
        source[end - 1] = 0  # no number, and perhaps behind the last one
        ids[:] = (numbers[source] if len(numbers) else 0) + len(LEADING)
        ids[end - 1] = self.special.line_end
        last_line = np.cumsum([len(lines) for lines in texts])
        ends = end[last_line - 1].tolist() if len(texts) else []
        return [ids[start : end - 1] for start, end in zip([0, *ends], ends, strict=False)]

    def encode_parts(self, documents: Iterable[Sequence[object]]) -> list[Ids]:
        """Return the ids of all parts of documents, one after another: the one encoder of training rows and prompts.

        A `str` is text, whatever it says; anything else is an image, one <image>. A text right behind another one of its
        document goes on with it (`continuation`).
        """
        parts = list(documents)
        texts = iter(self.encode_all([text for document in parts for text in self._texts(document)]))
        marker = np.array([self.special.image], dtype=np.int64)
        return [next(texts) if isinstance(part, str) else marker for document in parts for part in document]

    def _texts(self, document: Sequence[object]) -> Iterator[str]:
        before: object = None
        for part in document:
            if isinstance(part, str):
                yield self.continuation(part) if isinstance(before, str) else part
            before = part

    def continuation(self, text: str) -> str:
        """Return how `encode` must be given a text that follows another one: without a space that it puts there itself."""
        adds = self._pieces.puts_space and not self._pieces.absorbs_space
        return text.removeprefix(" ") if adds else text

    def encode_marked(self, text: str, names: Sequence[str] | None = None) -> Ids:
        """Return the ids of a text in which the names of control tokens stand for these.

        As the processor of Kosmos-2 reads it: blanks to the left of a name are no text (newlines are), and each stretch
        of text between names is encoded on its own.

        Args:
            text: such as "<grounding> the <phrase> red square</phrase>".
            names: the names to look for; None: those of `extra`.

        Raises: UserError if one of `names` is no control token.
        """
        wanted = {name: self.id_of(name) for name in (self.extra if names is None else names)}
        if not wanted:
            return self.encode(text)
        longest_first = sorted(wanted, key=len, reverse=True)
        parts = re.split(rf"[^\S\r\n]*({'|'.join(map(re.escape, longest_first))})", text)
        stretches = self.encode_all(parts[::2])
        ids = [stretches[0]]
        for name, stretch in zip(parts[1::2], stretches[1:], strict=True):
            ids += [np.array([wanted[name]], dtype=np.int64), stretch]
        return np.concatenate(ids)

    def decode(self, ids: Iterable[int], *, keep_control: bool = False) -> str:
        """Return the text of `ids`; `</line>` is a newline, other control tokens are left out.

        With `keep_control` these are written by name, with the space of the word behind them: "by<phrase> a fire", unless
        `encode_marked` would read that space as another one.
        """
        text, run, begins = "", list[int](), True
        for id_ in map(int, ids):
            if id_ == UNK or len(LEADING) <= id_ < self.special.mask:
                run.append(id_ - len(LEADING))
            elif id_ == self.special.line_end or keep_control:
                text += self._pieces.decode(run, begins=begins)
                text += "\n" if id_ == self.special.line_end else self._control_names.get(id_, "")
                run, begins = [], id_ == self.special.line_end or not self._pieces.absorbs_space
        return text + self._pieces.decode(run, begins=begins)


def _writable(text: str) -> str:
    return text.encode("utf-8", "replace").decode("utf-8")


def clean(text: str) -> str:
    """Return `text` with Unix newlines and without what UTF-8 cannot express."""
    return _writable(text.replace("\r\n", "\n").replace("\r", "\n"))


def trimmed(parts: Iterable[Part]) -> Iterator[tuple[int, Part | str]]:
    """Yield what a document keeps of its parts, each with its number: no blanks at its ends, none beside images.

    Blanks between two texts are the head of the second one. A `str` is text; anything else is an image.
    """
    at_start, blanks = True, ""
    for number, part in enumerate(parts):
        if not isinstance(part, str):
            yield number, part
            at_start = True
            continue
        whole = part.lstrip() if at_start else blanks + part
        words = whole.rstrip()
        blanks = whole[len(words) :]
        if words:
            yield number, words
            at_start = False


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
