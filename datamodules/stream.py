"""The training stream as a pure function: row i = f(seed, corpora, ratio, T, L, i).

Nothing else decides what the model sees: not ranks, not workers, not a crash in between. Optimizer step s is rows
[s G, (s + 1) G) for a global batch of G rows, however they are shared out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from datamodules.corpus import IndexedCorpus, StoredImage
from datamodules.plan import Plan
from kosmos_lit.batch import CORPORA
from kosmos_lit.tokens import BOS, EOS, IGNORE, PAD, Ids, SpecialTokens, expand_images


class Schedule(Protocol):
    """Says which corpus a stream row comes from; `Mixture` for training, `InOrder` for validation."""

    def locate(self, row: int) -> tuple[int, int]:
        """Return the corpus of stream row `row`, and its number among that corpus's rows."""


class InOrder:
    """Each corpus's rows once, one corpus after another."""

    def __init__(self, counts: Sequence[int]) -> None:
        self._ends = np.cumsum(counts)
        self.n_rows = int(self._ends[-1])

    def locate(self, row: int) -> tuple[int, int]:
        """Return the corpus of row `row`, and its number there."""
        corpus = int(np.searchsorted(self._ends, row, side="right"))
        return corpus, row - (int(self._ends[corpus - 1]) if corpus else 0)


@dataclass(frozen=True)
class PlacedDocument:
    """A document, or a piece of one, in a row."""

    document: int
    """Its number in the corpus."""
    start: int
    """Its first target among the document's tokens and </s>."""
    end: int
    """One past its last target."""
    at: int
    """Its first position in the row."""
    length: int
    """Positions it takes."""


@dataclass(frozen=True)
class Row:
    """T positions of the stream, as numbers; pictures are still references."""

    number: int
    corpus: int
    """Index into CORPORA."""
    epoch: int
    """How often the corpus had been read through before."""
    tokens: Ids
    """(T,) input ids."""
    targets: Ids
    """(T,) ids to predict, or IGNORE."""
    documents: tuple[PlacedDocument, ...]
    images: tuple[StoredImage, ...]
    image_owner: tuple[int, ...]
    """Per picture: index into `documents`."""
    slots: npt.NDArray[np.int64]
    """(n_images,) first slot of each picture."""

    @property
    def n_real(self) -> int:
        """Positions that are not padding."""
        return sum(d.length for d in self.documents)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Positions of each document, and of the padding if there is any."""
        padding = len(self.tokens) - self.n_real
        return (*(d.length for d in self.documents), *((padding,) if padding else ()))

    def segments(self) -> npt.NDArray[np.int64]:
        """Return (T,) the number of the document at each position, from 1; 0 is padding."""
        numbers = np.zeros(len(self.tokens), dtype=np.int64)
        for n, placed in enumerate(self.documents, start=1):
            numbers[placed.at : placed.at + placed.length] = n
        return numbers


class Stream:
    """Rows by number."""

    def __init__(
        self,
        corpora: Mapping[str, IndexedCorpus],
        plans: Mapping[str, Plan],
        schedule: Schedule,
        special: SpecialTokens,
        seq_len: int,
    ) -> None:
        """Take the corpora that the schedule names, by their names in CORPORA, and how each is packed."""
        self.corpora, self.plans, self.schedule = corpora, plans, schedule
        self.special, self.seq_len = special, seq_len

    def locate(self, row: int) -> tuple[str, int, int]:
        """Return the corpus of a stream row, its epoch there, and its row in the corpus's plan."""
        corpus, number = self.schedule.locate(row)
        name = CORPORA[corpus]
        epoch, at = divmod(number, self.plans[name].n_rows)
        return name, epoch, self.plans[name].row(epoch, at)

    def n_targets(self, first: int, stop: int) -> int:
        """Return the supervised tokens of rows `first` up to `stop`, without reading them."""
        placed = (self.locate(row) for row in range(first, stop))
        return sum(self.plans[name].n_targets(row) for name, _, row in placed)

    def row(self, number: int) -> Row:
        """Return stream row `number`."""
        name, epoch, at = self.locate(number)
        corpus, n_latents = self.corpora[name], self.plans[name].n_latents
        tokens = np.full(self.seq_len, PAD, dtype=np.int64)
        targets = np.full(self.seq_len, IGNORE, dtype=np.int64)
        documents: list[PlacedDocument] = []
        images: list[StoredImage] = []
        owner: list[int] = []
        slots: list[int] = []
        position = 0
        for document, start, end in self.plans[name].pieces(at):
            stored, answers = corpus.document_tokens(document), corpus.document_supervised(document)
            read, wanted, first_slots = render(stored, start, end, self.special, n_latents, answers)
            stop = position + len(read)
            tokens[position:stop], targets[position:stop] = read, wanted
            slots += (first_slots + position).tolist()
            seen = [i for i in corpus.document_images(document) if start <= i.position < end] if len(first_slots) else []
            images += seen
            owner += [len(documents)] * len(seen)
            documents.append(PlacedDocument(document, start, end, position, len(read)))
            position = stop
        return Row(
            number, CORPORA.index(name), epoch, tokens, targets, tuple(documents), tuple(images), tuple(owner),
            np.array(slots, dtype=np.int64),
        )  # fmt: skip


def render(
    stored: Ids, start: int, end: int, special: SpecialTokens, n_latents: int, answers: npt.NDArray[np.bool_] | None = None
) -> tuple[Ids, Ids, Ids]:
    """Write out piece [start, end) of a document's targets as the model reads it (see `plan`).

    Loss is on text only: neither <image>, nor slots, nor </image> is ever a target (released caption loader). With
    `answers`, which of the tokens are to be learnt, it is on those, and </s> is the target behind each run of them: where
    a conversation goes on, the input does so without a </s>, and what comes next is given.

    Returns: input ids, targets, and each picture's first slot.
    """
    inputs = np.concatenate([[BOS], stored[start : end - 1]])
    wanted = np.append(stored, EOS)
    if answers is not None:
        says = np.append(answers, answers[-1:])
        ends = np.append(False, says[:-1] & ~says[1:])
        wanted = np.where(says, wanted, np.where(ends, EOS, IGNORE))
    wanted = wanted[start:end]
    tokens, last, slots = expand_images(inputs, special, n_latents)
    targets = np.full(len(tokens), IGNORE, dtype=np.int64)
    targets[last] = np.where(wanted == special.image, IGNORE, wanted)
    return tokens, targets, slots
