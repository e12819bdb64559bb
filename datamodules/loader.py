"""Micro-batches of a stream, for one rank and any number of worker processes."""

from __future__ import annotations

import faulthandler
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


def n_micro_batches(global_rows: int, micro_rows: int, world_size: int) -> int:
    """Return the number of micro-batches of one rank in one optimizer step.

    Raises: UserError if the rows do not divide.
    """
    G, m, W = global_rows, micro_rows, world_size
    if G % (m * W):
        # Micro-batch sizes that would do; none where the ranks alone do not divide the rows.
        fits = [d for d in range(1, G // W + 1) if G % (d * W) == 0]
        ranks = [w for w in range(1, G + 1) if G % (w * m) == 0]
        advice = f"micro_batch_rows could be {', '.join(map(str, fits))}" if fits else f"use a multiple of {W} rows"
        if ranks:
            advice += f", or {_nearest(ranks, W)} ranks"
        raise UserError(f"global_batch_rows {G} is not divisible by {W} ranks x {m} micro_batch_rows; {advice}")
    return G // (m * W)


def _nearest(numbers: list[int], value: int) -> str:
    """Return the largest number below `value` and the smallest above, as far as they exist, as text."""
    below, above = [n for n in numbers if n < value], [n for n in numbers if n > value]
    return " or ".join(map(str, [*below[-1:], *above[:1]]))


@dataclass(frozen=True, kw_only=True)
class BatchLayout:
    """How the rows of each optimizer step are distributed over ranks and micro-batches.

    Micro-batch k of rank r holds rows [(k W + r) m, (k W + r + 1) m) from `first_row` on, for W ranks and m rows a
    micro-batch: whatever W and m are, a step of G rows is the same G rows.
    """

    first_row: int
    """First row that this loader reads."""
    global_batch_rows: int
    micro_batch_rows: int
    rank: int = 0
    world_size: int = 1

    @property
    def n_micro_batches(self) -> int:
        """Micro-batches of one rank in one optimizer step."""
        return n_micro_batches(self.global_batch_rows, self.micro_batch_rows, self.world_size)

    def rows(self, k: int) -> range:
        """Return the rows of this rank's micro-batch k."""
        first = self.first_row + (k * self.world_size + self.rank) * self.micro_batch_rows
        return range(first, first + self.micro_batch_rows)

    def step_rows(self, k: int) -> range:
        """Return all rows of the optimizer step that micro-batch k belongs to."""
        first = self.first_row + k // self.n_micro_batches * self.global_batch_rows
        return range(first, first + self.global_batch_rows)


@dataclass(frozen=True, kw_only=True)
class RenderOptions:
    """How rows become tensors."""

    tokenizer: Tokenizer
    image_size: int
    fit: Fit
    n_latents: int
    max_bad_share: Mapping[str, float]
    """Per source the share of its images that may be bad."""
    ledger: Ledger | None = None
    """File with a line for each bad image and blocked document."""
    blocklist: Blocklist | None = None
    """Documents that must not be learnt."""
    unit: Unit = "tokens"
    """Unit of the mixture's weights."""


class MicroBatches(IterableDataset[KosmosBatch]):
    """The micro-batches of one rank; worker w of n renders every n-th of them, so that their order does not depend on n."""

    def __init__(self, stream: Stream, layout: BatchLayout, options: RenderOptions, n_rows: int | None = None) -> None:
        """Take `n_rows` of a finite stream, or None for an endless one."""
        self.stream, self.layout, self.options, self.n_rows = stream, layout, options, n_rows

    def __iter__(self) -> Iterator[KosmosBatch]:
        # None in the training process itself, with num_workers 0.
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        o = self.options
        reader = ImageReader(
            o.image_size,
            o.fit,
            o.tokenizer.special,
            o.max_bad_share,
            ledger=o.ledger,
            blocklist=o.blocklist,
            split=None if self.n_rows is None else "val",  # finite streams are of held-out rows
        )
        corpora = {name: source.corpus for name, source in self.stream.by_name.items()}
        # Several micro-batches belong to one step: its targets are counted once.
        counted, n_targets = range(0), 1
        for k in count(first, step) if self.n_rows is None else range(first, self.n_batches, step):
            # A finite stream has no steps: its loss is not divided by their targets.
            if self.n_rows is None and (step_rows := self.layout.step_rows(k)) != counted:
                counted, n_targets = step_rows, self.stream.n_targets(step_rows.start, step_rows.stop)
            rows, images = reader.read([self._row(number) for number in self.layout.rows(k)], corpora)
            # max: a step may have no target, and the loss is divided by their number.
            yield collate(
                rows, images, tokenizer=o.tokenizer, n_latents=o.n_latents, n_step_targets=max(1, n_targets), unit=o.unit
            )

    def _row(self, number: int) -> Row:
        """Return a row of the stream, and an empty one behind its end: all ranks have equally many batches."""
        if self.n_rows is not None and number >= self.n_rows:
            return empty_row(self.stream.seq_len)
        return self.stream.row(number)

    @property
    def n_batches(self) -> int:
        """Micro-batches of a finite stream, the same on every rank."""
        assert self.n_rows is not None
        # Rounded up: `_row` completes the last one.
        return -(-self.n_rows // (self.layout.micro_batch_rows * self.layout.world_size))


class Loader:
    """A DataLoader that measures how long training waits for it, in `waited_seconds`."""

    def __init__(self, batches: MicroBatches, num_workers: int) -> None:
        self.batches = batches
        self.waited_seconds = 0.0
        self._loader: DataLoader[KosmosBatch] = DataLoader(
            batches,
            batch_size=None,  # the dataset yields whole micro-batches
            num_workers=num_workers,
            pin_memory=torch.cuda.is_available(),  # so that copies to the GPU are asynchronous
            prefetch_factor=4 if num_workers else None,  # torch refuses a number without workers
            worker_init_fn=_ignore_run_signals,
        )

    def __iter__(self) -> Iterator[KosmosBatch]:
        batches = iter(self._loader)
        while True:
            start = time.monotonic()
            batch = next(batches, None)
            self.waited_seconds += time.monotonic() - start
            if batch is None:
                return
            yield batch


def _ignore_run_signals(worker: int) -> None:
    """Make a worker ignore the signals that reach all processes of a run: training still needs its last batches.

    SIGTERM from the training process itself does end the worker: multiprocessing sends it at exit, and then waits for the
    worker. Only on Linux is the sender of a signal known; elsewhere all are ignored.
    """
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    faulthandler.register(signal.SIGUSR2, file=2, all_threads=True)  # the watchdog's question what this process is doing
    if sys.platform == "linux":
        # Blocked, not ignored: sigwaitinfo below takes it, and the new thread inherits the mask.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_exit_on_sigterm_from, args=(os.getppid(),), daemon=True).start()
    else:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _exit_on_sigterm_from(parent: int) -> None:
    """End this process when `parent` sends SIGTERM."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)  # sys.exit would end this thread alone, and another code would count as a failed worker


class FiniteLoader(Loader):
    """A loader with a length."""

    def __len__(self) -> int:
        return self.batches.n_batches


class PromptLoader:
    """Batches of prompts, built while they are read, as often as they are: a bare iterator could be read only once."""

    def __init__(self, build: Callable[[], Iterator[PromptBatch]], seq_len: int) -> None:
        """Take a function that returns the batches, and the positions in a row, for the message if there are none."""
        self._build, self._seq_len = build, seq_len

    def __iter__(self) -> Iterator[PromptBatch]:
        """Raises: UserError if there is no prompt."""
        batches = self._build()
        # An empty generator shows only when it is asked.
        first = next(batches, None)
        if first is None:
            raise UserError(
                f"there are no prompts: every held-out one leaves too little of a row of {self._seq_len} positions for an "
                "answer, or has an image that cannot be decoded; raise data.seq_len, or hold other documents out"
            )
        yield first
        yield from batches
