"""What ends a run from outside: a signal sets a flag, and all ranks agree on it where a step or a validation batch ends."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.distributed as dist

from kosmos_lit.agreement import is_distributed

REQUEUE = 85
"""Exit code of a run that was asked by SIGUSR1 to end and to be started again."""
EXIT_CODES = {signal.SIGUSR1: REQUEUE, signal.SIGTERM: 128 + signal.SIGTERM, signal.SIGINT: 128 + signal.SIGINT}
"""Exit codes by signal, which are a shell's but for SIGUSR1. Of several signals the last one here counts."""
PATIENCE = 2.0
"""Seconds within which a second SIGINT is taken for the first: a terminal and a launcher both deliver it."""


class Interruption:
    """The signals that a process receives between `with` and its end: SIGINT, SIGTERM and SIGUSR1.

    At first a signal ends the process at once: SIGINT raises KeyboardInterrupt, the others exit with their code. While
    training, from `defer` on, it is kept until `agreed` tells all ranks of it. A repeated signal changes nothing, but a
    second SIGINT after two seconds ends the process at once. After an agreed end all of them are ignored.
    """

    def __init__(self) -> None:
        self._handlers: dict[int, Any] = {}
        self._is_deferred = False
        self.is_agreed = False
        """Whether all ranks end together at a signal."""
        self._received = 0  # 1 + place in EXIT_CODES, 0 for none
        self._first_sigint: float | None = None
        self._group: Any = None  # torch's default group

    def __enter__(self) -> Interruption:
        # Python sets handlers in the main thread only.
        if threading.current_thread() is threading.main_thread():
            self._handlers = {number: signal.signal(number, self._receive) for number in EXIT_CODES}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        while self._handlers:
            number, handler = self._handlers.popitem()
            # A rank that ends with the others must keep its exit code: srun sends SIGTERM as soon as the first has ended.
            signal.signal(number, signal.SIG_IGN if self.is_agreed else handler)

    def defer(self) -> None:
        """Keep signals from now on until `agreed` is asked. Collective: all ranks must call it."""
        # Gloo's, on the host: no queue of a GPU has to run empty for an answer.
        if is_distributed() and self._group is None and dist.get_backend() != "gloo":
            self._group = dist.new_group(backend="gloo")
        self._is_deferred = True

    def agreed(self) -> signal.Signals | None:
        """Return the signal that any rank has received, the same on all ranks. Collective: all ranks must call it."""
        received = torch.tensor(self._received, device="cpu")
        if is_distributed():
            dist.all_reduce(received, dist.ReduceOp.MAX, group=self._group)
        return list(EXIT_CODES)[int(received) - 1] if received else None

    def end(self, number: signal.Signals) -> None:
        """End this process as a signal demands, together with all ranks. Collective: all ranks must call it."""
        self.is_agreed = True
        if is_distributed():
            dist.barrier(group=self._group)
        raise_end(number)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        name, now = signal.Signals(number), time.monotonic()
        if not self._is_deferred:
            raise_end(name)
        if name == signal.SIGINT:
            if self._first_sigint is None:
                self._first_sigint = now
            elif now - self._first_sigint > PATIENCE:
                raise_end(name)
        if not self._received:
            # Not `print`: the signal may have come in the middle of one, which raises when it is entered again.
            message = f"\n{name.name}: ending this step and writing a checkpoint; a second Ctrl-C stops without one\n"
            os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, message.encode())
        self._received = max(self._received, 1 + list(EXIT_CODES).index(name))


def raise_end(number: signal.Signals) -> None:
    """Raises: KeyboardInterrupt for SIGINT, else SystemExit with the signal's code."""
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    sys.exit(EXIT_CODES[number])
