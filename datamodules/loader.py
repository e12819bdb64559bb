"""Micro-batches out of a stream, for one rank and any number of worker processes."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import count

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from datamodules.blocklist import Blocklist
from datamodules.collate import ImageReader, collate, empty_row
from datamodules.config import Unit
from datamodules.quarantine import Ledger
from datamodules.stream import Row, Stream
from kosmos_lit.batch import KosmosBatch, PromptBatch
from kosmos_lit.errors import UserError
from kosmos_lit.images import Fit
from kosmos_lit.tokenizer import Tokenizer


def micro_batches(global_rows: int, micro_rows: int, world_size: int) -> int:
    """Return the micro-batches of one rank in one optimizer step.

    Raises: UserError if the rows do not divide.
    """
    G, m, W = global_rows, micro_rows, world_size
    if G % (m * W):
        fits = [d for d in range(1, G // W + 1) if G % (d * W) == 0]
        ranks = [w for w in range(1, G + 1) if G % (w * m) == 0]
        advice = f"micro_batch_rows could be {', '.join(map(str, fits))}" if fits else f"use a multiple of {W} rows"
        if ranks:
            advice += f", or {_around(ranks, W)} ranks"
        raise UserError(f"global_batch_rows {G} is not divisible by {W} ranks x {m} micro_batch_rows; {advice}")
    return G // (m * W)


def _around(numbers: list[int], wanted: int) -> str:
    """Return the largest number below `wanted` and the smallest above, as far as there are any."""
    below, above = [n for n in numbers if n < wanted], [n for n in numbers if n > wanted]
    return " or ".join(map(str, [*below[-1:], *above[:1]]))


@dataclass(frozen=True, kw_only=True)
class BatchLayout:
    """How the rows of each optimizer step are shared out.

    Micro-batch k of rank r holds rows [(k W + r) m, (k W + r + 1) m) from `first_row` on, for W ranks and m rows a
    micro-batch: whatever W and m are, a step of G rows is the same G rows.
    """

    first_row: int
    """Row with which this loader begins."""
    global_batch_rows: int
    micro_batch_rows: int
    rank: int = 0
    world_size: int = 1

    @property
    def micro_batches(self) -> int:
        """Micro-batches of one rank in one optimizer step."""
        return micro_batches(self.global_batch_rows, self.micro_batch_rows, self.world_size)

    def rows(self, k: int) -> range:
        """Return the rows of this rank's micro-batch k."""
        first = self.first_row + (k * self.world_size + self.rank) * self.micro_batch_rows
        return range(first, first + self.micro_batch_rows)

    def step_rows(self, k: int) -> range:
        """Return all rows of the optimizer step that micro-batch k belongs to."""
        first = self.first_row + k // self.micro_batches * self.global_batch_rows
        return range(first, first + self.global_batch_rows)


@dataclass(frozen=True, kw_only=True)
class RenderOptions:
    """What turns rows into tensors."""

    tokenizer: Tokenizer
    image_size: int
    fit: Fit
    n_latents: int
    max_bad_share: Mapping[str, float]
    """Per source the share of its images that may be bad."""
    ledger: Ledger | None = None
    """Gets a line for each bad image and blocked document."""
    blocklist: Blocklist | None = None
    """What must not be learnt."""
    unit: Unit = "tokens"
    """What the mixture counts."""


class MicroBatches(IterableDataset[KosmosBatch]):
    """The micro-batches of one rank; worker w of n makes each n-th of them, so their order does not depend on n."""

    def __init__(self, stream: Stream, share: BatchLayout, rendering: RenderOptions, n_rows: int | None = None) -> None:
        """Take `n_rows` of a finite stream, or None for an endless one."""
        self.stream, self.share, self.rendering, self.n_rows = stream, share, rendering, n_rows

    def __iter__(self) -> Iterator[KosmosBatch]:
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        r = self.rendering
        reader = ImageReader(
            r.image_size, r.fit, r.tokenizer.special, r.max_bad_share, ledger=r.ledger, blocklist=r.blocklist,
            split=None if self.n_rows is None else "val",
        )  # fmt: skip
        corpora = {name: source.corpus for name, source in self.stream.by_name.items()}
        counted, n_targets = range(0), 1
        for k in count(first, step) if self.n_rows is None else range(first, self.n_batches, step):
            if self.n_rows is None and (rows_of_step := self.share.step_rows(k)) != counted:
                counted, n_targets = rows_of_step, self.stream.n_targets(rows_of_step.start, rows_of_step.stop)
            rows, images = reader.read([self._row(number) for number in self.share.rows(k)], corpora)
            yield collate(
                rows, images, tokenizer=r.tokenizer, n_latents=r.n_latents, n_step_targets=max(1, n_targets), unit=r.unit
            )

    def _row(self, number: int) -> Row:
        """A rank that has fewer rows of a finite stream than others gets empty ones: all ranks have equally many batches."""
        if self.n_rows is not None and number >= self.n_rows:
            return empty_row(self.stream.seq_len)
        return self.stream.row(number)

    @property
    def n_batches(self) -> int:
        """Micro-batches of a finite stream, the same on every rank."""
        assert self.n_rows is not None
        return -(-self.n_rows // (self.share.micro_batch_rows * self.share.world_size))


class Loader:
    """A DataLoader that knows how long it has been waited for."""

    def __init__(self, batches: MicroBatches, num_workers: int) -> None:
        self.batches = batches
        self.waited_seconds = 0.0
        self._loader: DataLoader[KosmosBatch] = DataLoader(
            batches,
            batch_size=None,
            num_workers=num_workers,
            pin_memory=torch.cuda.is_available(),
            prefetch_factor=4 if num_workers else None,
            worker_init_fn=_leave_interrupts_to_main,
        )

    def __iter__(self) -> Iterator[KosmosBatch]:
        batches = iter(self._loader)
        while True:
            asked = time.monotonic()
            batch = next(batches, None)
            self.waited_seconds += time.monotonic() - asked
            if batch is None:
                return
            yield batch


def _leave_interrupts_to_main(worker: int) -> None:
    """Let signals that reach all processes of a run count for the training process alone: it needs its last batches.

    That process itself may end this one, as it does on its way out with those that are left; or it would wait for ever.
    Only Linux tells whose signal it is; elsewhere none counts.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_obey, args=(os.getppid(),), daemon=True).start()
    else:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _obey(parent: int) -> None:
    """End this process when `parent` asks for it."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)  # as asked: anything else would count as a worker that failed


class FiniteLoader(Loader):
    """A loader with a length."""

    def __len__(self) -> int:
        return self.batches.n_batches


class PromptLoader:
    """Batches of questions, made as they are asked for; a bare iterator could be read only once."""

    def __init__(self, make: Callable[[], Iterator[PromptBatch]], seq_len: int) -> None:
        """Take what makes the batches, and the positions in a row, for the message if there are none."""
        self._make, self._seq_len = make, seq_len

    def __iter__(self) -> Iterator[PromptBatch]:
        """Raises: UserError if there is no question."""
        batches = self._make()
        first = next(batches, None)
        if first is None:
            raise UserError(
                "there is nothing to ask: every held-out prompt leaves too little of a row of "
                f"{self._seq_len} positions for an answer, or has an image that cannot be decoded; raise data.seq_len, or "
                "hold other documents out"
            )
        yield first
        yield from batches
