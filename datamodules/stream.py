"""The training stream as a pure function: row i = f(seed, sources, shares, T, L, i).

Nothing else decides what the model sees: not ranks, not workers, not a crash in between. Optimizer step s reads rows
[s G, (s + 1) G) for a global batch of G rows, however they are distributed.

T is the row length, L the number of an image's latents.
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
    """The source of each stream row: a `MixtureSchedule` for training, a `SequentialSchedule` for validation."""

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
        """Return the source of row `row`, and its number among that source's rows."""
        # side="right": a row at the end of a source belongs to the next, and empty ones are passed over.
        source = int(np.searchsorted(self._ends, row, side="right"))
        return source, row - (int(self._ends[source - 1]) if source else 0)

    def counts(self, n_rows: int) -> list[int]:
        """Return how many of the first `n_rows` rows come from each source."""
        # The sources' ends, none behind n_rows: their differences are the rows read of each.
        return [int(n) for n in np.diff(np.minimum(self._ends, n_rows), prepend=0)]


@dataclass(frozen=True)
class PackedSource:
    """A source with its row plan."""

    name: str
    kind: int
    """Index into CORPORA."""
    corpus: IndexedCorpus
    plan: RowPlan


@dataclass(frozen=True)
class Segment:
    """A document, or a part of one, in a row."""

    document: int
    """The document's number in the corpus."""
    start: int
    """Its first target among the document's tokens and </s>."""
    end: int
    """One past its last target."""
    position: int
    """Its first position in the row."""
    length: int
    """Positions it takes."""


@dataclass(frozen=True)
class Row:
    """T positions of the stream as ids; its images are references to bytes in shards."""

    number: int
    corpus: int
    """Index into CORPORA."""
    source: str
    """Name of the source; empty for a row of padding."""
    epoch: int
    """How often the source was read completely before."""
    tokens: Ids
    """(T,) input ids."""
    targets: Ids
    """(T,) ids to predict, or IGNORE."""
    segments: tuple[Segment, ...]
    images: tuple[StoredImage, ...]
    image_segments: tuple[int, ...]
    """Per image: index into `segments`."""
    slots: npt.NDArray[np.int64]
    """(n_images,) first slot of each image."""

    @property
    def n_real(self) -> int:
        """Positions that are not padding."""
        return sum(segment.length for segment in self.segments)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Positions of each segment, and of the padding if there is any."""
        padding = len(self.tokens) - self.n_real
        return (*(segment.length for segment in self.segments), *((padding,) if padding else ()))

    def segment_ids(self) -> npt.NDArray[np.int64]:
        """Return (T,) the number of the segment at each position, from 1; 0 is padding."""
        ids = np.zeros(len(self.tokens), dtype=np.int64)
        for n, segment in enumerate(self.segments, start=1):
            ids[segment.position : segment.position + segment.length] = n
        return ids

    def amount(self, unit: Unit) -> int:
        """Return how much of a mixture's unit this row holds; a document counts where it begins."""
        match unit:
            case "tokens":
                return len(self.tokens)
            case "loss_tokens":
                return int((self.targets != IGNORE).sum())
            case "documents":
                return sum(segment.start == 0 for segment in self.segments)

    def digest(self) -> int:
        """Return a 63-bit hash of the row: of its number, where its documents and images lie, ids and targets."""
        # Not the path of the shard: a corpus that has moved gives the same digest.
        images = [(i.shard, i.offset, i.length, i.path) for i in self.images]
        identity = (self.number, self.source, self.epoch, tuple(map(_DigestedSegment, self.segments)), images)
        digest = blake2b(repr(identity).encode(), digest_size=8)
        for ids in (self.tokens, self.targets):  # of one byte order on all machines
            digest.update(np.ascontiguousarray(ids, dtype="<i8").data)
        return int.from_bytes(digest.digest(), "little") >> 1  # torch sums digests as int64


class _DigestedSegment:
    """A segment as digests spell it: checkpoints hold sums of digests, so that the text must stay as it is."""

    def __init__(self, segment: Segment) -> None:
        self.segment = segment

    def __repr__(self) -> str:
        s = self.segment
        return f"PlacedDocument(document={s.document}, start={s.start}, end={s.end}, at={s.position}, length={s.length})"


class Stream:
    """Rows by number."""

    def __init__(
        self, sources: Sequence[PackedSource | None], schedule: Schedule, special: SpecialTokens, seq_len: int
    ) -> None:
        """Take the sources in the schedule's order; None is one that past rows came from and the config no longer names."""
        self.sources, self.schedule, self.special, self.seq_len = sources, schedule, special, seq_len
        self.by_name = {source.name: source for source in sources if source is not None}

    def locate(self, row: int) -> tuple[PackedSource, int, int]:
        """Return the source of a stream row, its epoch, and its row in the source's plan.

        Raises: UserError if the config no longer names the source.
        """
        index, number = self.schedule.locate(row)
        source = self.sources[index]
        if source is None:
            raise UserError(f"row {row} came from a source that this run's config no longer names; name it again")
        epoch, number = divmod(number, source.plan.n_rows)
        return source, epoch, source.plan.row(epoch, number)

    def n_targets(self, first: int, stop: int) -> int:
        """Return the supervised tokens of rows `first` up to `stop`, without reading them."""
        n_targets = 0
        for source, before, after in zip(self.sources, *map(self.schedule.counts, (first, stop)), strict=False):
            if source is not None:
                n_targets += source.plan.n_targets(before, after)
            elif after > before:
                for row in range(first, stop):
                    self.locate(row)  # raises the error that names the row
        return n_targets

    def row(self, number: int) -> Row:
        """Return stream row `number`."""
        source, epoch, planned_row = self.locate(number)
        corpus, planned = source.corpus, source.plan.segments(planned_row)
        # Segments as stored, with one marker for each image.
        stored_inputs, stored_targets = zip(
            *(
                inputs_and_targets(corpus.document_tokens(n), start, end, self.special, corpus.document_supervised(n))
                for n, start, end in planned
            ),
            strict=True,
        )
        # All in one go: a row of captions has some 24 segments.
        row_inputs, row_targets, slots, last = render(
            np.concatenate(stored_inputs), np.concatenate(stored_targets), self.special, source.plan.n_latents
        )
        # (T,), padded at the end
        tokens = np.full(self.seq_len, PAD, dtype=np.int64)
        targets = np.full(self.seq_len, IGNORE, dtype=np.int64)
        tokens[: len(row_inputs)], targets[: len(row_inputs)] = row_inputs, row_targets
        segments: list[Segment] = []
        images: list[StoredImage] = []
        image_segments: list[int] = []
        # A segment ends behind the last position of its last input.
        stops = (last[np.cumsum([len(ids) for ids in stored_inputs]) - 1] + 1).tolist()
        for (document, start, end), position, stop in zip(planned, [0, *stops[:-1]], stops, strict=True):
            # Without slots there is no image to look up: so it is in all rows of text.
            in_row = [i for i in corpus.document_images(document) if start <= i.position < end] if len(slots) else []
            images += in_row
            image_segments += [len(segments)] * len(in_row)
            segments.append(Segment(document, start, end, position, stop - position))
        return Row(
            number,
            source.kind,
            source.name,
            epoch,
            tokens,
            targets,
            tuple(segments),
            tuple(images),
            tuple(image_segments),
            slots,
        )


def inputs_and_targets(
    stored: Ids, start: int, end: int, special: SpecialTokens, answers: npt.NDArray[np.bool_] | None = None
) -> tuple[Ids, Ids]:
    """Return input ids and targets of the segment [start, end) of a document's targets (layout: see `packing.pack`).

    Loss is on text only: an image's marker is never a target. With `answers`, a mask of the supervised tokens, it is
    on those, and </s> is the target behind each run of them: where a conversation goes on, the input does so without a
    </s>, and the next turn is not a target.
    """
    inputs, targets = np.empty(end - start, dtype=np.int64), np.append(stored, EOS)
    # Inputs lag targets by one.
    inputs[0], inputs[1:] = BOS, stored[start : end - 1]
    if answers is not None:
        # (n + 1,): </s> is a target if the last token is one.
        is_answer = np.append(answers, answers[-1:])
        # The first target behind a run of answers; the document's own </s> belongs to the last run.
        is_end = np.append(False, is_answer[:-1] & ~is_answer[1:])
        targets = np.where(is_answer, targets, np.where(is_end, EOS, IGNORE))
    targets[targets == special.image] = IGNORE
    return inputs, targets[start:end]


def render(inputs: Ids, targets: Ids, special: SpecialTokens, n_latents: int) -> tuple[Ids, Ids, Ids, Ids]:
    """Expand images in inputs and targets; neither slots nor </image> are targets (as in the released caption loader).

    Returns: input ids; targets; each image's first slot; the last position of each of `inputs`.
    """
    tokens, last, slots = expand_images(inputs, special, n_latents)
    expanded = np.full(len(tokens), IGNORE, dtype=np.int64)
    # The id behind an image is predicted at its last position, </image>.
    expanded[last] = targets
    return tokens, expanded, slots, last
