"""The training stream as a pure function: row i = f(seed, sources, shares, T, L, i).

Nothing else decides what the model sees: not ranks, not workers, not a crash in between. Optimizer step s is rows
[s G, (s + 1) G) for a global batch of G rows, however they are shared out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Protocol

import numpy as np
import numpy.typing as npt

from datamodules.config import Unit
from datamodules.corpus import IndexedCorpus, StoredImage
from datamodules.packing import RowPlan
from kosmos_lit.errors import UserError
from kosmos_lit.tokenizer import BOS, EOS, IGNORE, PAD, Ids, SpecialTokens, expand_images


class Schedule(Protocol):
    """Says which source a stream row comes from; `Relay` for training, `InOrder` for validation."""

    def locate(self, row: int) -> tuple[int, int]:
        """Return the source of stream row `row`, and its number among that source's rows."""

    def counts(self, n_rows: int) -> list[int]:
        """Return how many of the first `n_rows` rows come from each source."""


class SequentialSchedule:
    """Each source's rows once, one source after another."""

    def __init__(self, counts: Sequence[int]) -> None:
        self._ends = np.cumsum(counts)
        self.n_rows = int(self._ends[-1])

    def locate(self, row: int) -> tuple[int, int]:
        """Return the source of row `row`, and its number there."""
        source = int(np.searchsorted(self._ends, row, side="right"))
        return source, row - (int(self._ends[source - 1]) if source else 0)

    def counts(self, n_rows: int) -> list[int]:
        """Return how many of the first `n_rows` rows come from each source."""
        return [int(n) for n in np.diff(np.minimum(self._ends, n_rows), prepend=0)]


@dataclass(frozen=True)
class PackedSource:
    """A source with its rows."""

    name: str
    kind: int
    """Index into CORPORA."""
    corpus: IndexedCorpus
    plan: RowPlan


@dataclass(frozen=True)
class Segment:
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
    """T positions of the stream, as numbers; images are still references."""

    number: int
    corpus: int
    """Index into CORPORA."""
    source: str
    """Name of the source; empty for a row of padding."""
    epoch: int
    """How often the source had been read through before."""
    tokens: Ids
    """(T,) input ids."""
    targets: Ids
    """(T,) ids to predict, or IGNORE."""
    documents: tuple[Segment, ...]
    images: tuple[StoredImage, ...]
    image_segments: tuple[int, ...]
    """Per image: index into `documents`."""
    slots: npt.NDArray[np.int64]
    """(n_images,) first slot of each image."""

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

    def amount(self, unit: Unit) -> int:
        """Return how much of a mixture's unit this row holds; a document counts where it begins."""
        match unit:
            case "tokens":
                return len(self.tokens)
            case "loss_tokens":
                return int((self.targets != IGNORE).sum())
            case "documents":
                return sum(d.start == 0 for d in self.documents)

    def digest(self) -> int:
        """Return 63 bits that tell this row from any other: its number, where all of it comes from, and its tokens."""
        found = blake2b(digest_size=8)
        images = [(i.shard, i.offset, i.length, i.path) for i in self.images]
        found.update(repr((self.number, self.source, self.epoch, self.documents, images)).encode())
        for ids in (self.tokens, self.targets):
            found.update(np.ascontiguousarray(ids, dtype="<i8").data)
        return int.from_bytes(found.digest(), "little") >> 1


class Stream:
    """Rows by number."""

    def __init__(
        self, sources: Sequence[PackedSource | None], schedule: Schedule, special: SpecialTokens, seq_len: int
    ) -> None:
        """Take the sources by their numbers in the schedule; None is one that past rows came from and that is gone."""
        self.sources, self.schedule, self.special, self.seq_len = sources, schedule, special, seq_len
        self.by_name = {source.name: source for source in sources if source is not None}

    def locate(self, row: int) -> tuple[PackedSource, int, int]:
        """Return the source of a stream row, its epoch there, and its row in the source's plan.

        Raises: UserError if the source is not given any more.
        """
        at, number = self.schedule.locate(row)
        source = self.sources[at]
        if source is None:
            raise UserError(f"row {row} came from a source that this run's config does not name any more; name it again")
        epoch, number = divmod(number, source.plan.n_rows)
        return source, epoch, source.plan.row(epoch, number)

    def n_targets(self, first: int, stop: int) -> int:
        """Return the supervised tokens of rows `first` up to `stop`, without reading them."""
        found = 0
        for source, before, after in zip(self.sources, *map(self.schedule.counts, (first, stop)), strict=False):
            if source is not None:
                found += source.plan.n_targets(before, after)
            elif after > before:
                for row in range(first, stop):
                    self.locate(row)  # says which row it is
        return found

    def row(self, number: int) -> Row:
        """Return stream row `number`."""
        source, epoch, at = self.locate(number)
        corpus, pieces = source.corpus, source.plan.segments(at)
        inputs, wanted = zip(
            *(
                inputs_and_targets(corpus.document_tokens(n), start, end, self.special, corpus.document_supervised(n))
                for n, start, end in pieces
            ),
            strict=True,
        )
        n_latents = source.plan.n_latents
        read, learnt, slots, last = render(np.concatenate(inputs), np.concatenate(wanted), self.special, n_latents)
        tokens = np.full(self.seq_len, PAD, dtype=np.int64)
        targets = np.full(self.seq_len, IGNORE, dtype=np.int64)
        tokens[: len(read)], targets[: len(read)] = read, learnt
        documents: list[Segment] = []
        images: list[StoredImage] = []
        owner: list[int] = []
        stops = (last[np.cumsum([len(ids) for ids in inputs]) - 1] + 1).tolist()
        for (document, start, end), position, stop in zip(pieces, [0, *stops[:-1]], stops, strict=True):
            seen = [i for i in corpus.document_images(document) if start <= i.position < end] if len(slots) else []
            images += seen
            owner += [len(documents)] * len(seen)
            documents.append(Segment(document, start, end, position, stop - position))
        return Row(
            number, source.kind, source.name, epoch, tokens, targets, tuple(documents), tuple(images), tuple(owner), slots
        )


def inputs_and_targets(
    stored: Ids, start: int, end: int, special: SpecialTokens, answers: npt.NDArray[np.bool_] | None = None
) -> tuple[Ids, Ids]:
    """Return piece [start, end) of a document's targets (see `plan`): what is read, and what is to be predicted from it.

    Loss is on text only: an image's marker is never a target. With `answers`, which of the tokens are to be learnt, it is
    on those, and </s> is the target behind each run of them: where a conversation goes on, the input does so without a
    </s>, and what comes next is given.
    """
    inputs, wanted = np.empty(end - start, dtype=np.int64), np.append(stored, EOS)
    inputs[0], inputs[1:] = BOS, stored[start : end - 1]
    if answers is not None:
        says = np.append(answers, answers[-1:])
        ends = np.append(False, says[:-1] & ~says[1:])
        wanted = np.where(says, wanted, np.where(ends, EOS, IGNORE))
    wanted[wanted == special.image] = IGNORE
    return inputs, wanted[start:end]


def render(inputs: Ids, wanted: Ids, special: SpecialTokens, n_latents: int) -> tuple[Ids, Ids, Ids, Ids]:
    """Write inputs and targets as the model reads them; neither slots nor </image> are targets (released caption loader).

    Returns: input ids; targets; each image's first slot; for each of `inputs` its last position.
    """
    tokens, last, slots = expand_images(inputs, special, n_latents)
    targets = np.full(len(tokens), IGNORE, dtype=np.int64)
    targets[last] = wanted
    return tokens, targets, slots, last
