"""Ends a run that hangs: a thread of each rank waits for signs of progress, and tells what every process was doing."""

from __future__ import annotations

import faulthandler
import json
import multiprocessing
import os
import signal
import socket
import statistics
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from subprocess import Popen
from typing import Any

import psutil

HUNG = 86
"""Exit code of a run that made no progress."""
FOLDER = "ranks"
"""Where in a run's folder the ranks leave signs of life."""
TICK = 1.0
"""Seconds between two looks at the clock."""
BEAT = 5.0
"""Seconds between two signs of life of a rank, which the others see."""
ANSWER = 3.0
"""Seconds in which the processes of a run tell what they are doing, before it ends."""
LAUNCHER = "KOSMOS_LIT_LAUNCHER"
"""Environment variable with the process that has started this one as a rank."""


class Watch:
    """Ends this process, and through it the run, when a phase of a run takes longer than its limit.

    Stacks of all threads go to stderr, those of the loader's processes too; other ranks that see the file `hang` do the
    same. The first rank that is alive tells of all ranks what they did last.
    """

    def __init__(
        self,
        folder: Path,
        rank: int,
        n_ranks: int,
        limits: Mapping[str, float],
        factor: float,
        started_ranks: Callable[[], Sequence[Popen[Any]]] = lambda: (),
    ) -> None:
        """Set what is watched.

        Args:
            folder: of the run; all ranks share it.
            rank: of this process.
            n_ranks: of the run.
            limits: seconds by phase.
            factor: a step may also take that many times the usual.
            started_ranks: returns the processes of the ranks that this one has started.
        """
        self.folder, self.rank, self.n_ranks = folder / FOLDER, rank, n_ranks
        self.limits, self.factor, self.started_ranks = limits, factor, started_ranks
        self.phase, self.step = next(iter(limits)), 0
        self._since = time.monotonic()
        self._durations: deque[float] = deque(maxlen=50)
        self._ends = threading.Event()
        self._thread: threading.Thread | None = None
        self._started = 0.0
        # Rank 0 is nobody's, whatever a process that has run one before left in the environment.
        is_started = os.environ.get(LAUNCHER) == str(os.getppid()) and os.environ.get("LOCAL_RANK", "0") != "0"
        self._launcher = os.getppid() if is_started else None

    def start(self) -> None:
        """Start to watch."""
        if self.n_ranks > 1:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._own.unlink(missing_ok=True)
            self._sign()
        self._since = time.monotonic()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Watch no longer."""
        if self._thread is not None:
            self._ends.set()
            self._thread.join()
            self._thread = None
            self._own.unlink(missing_ok=True)

    def enter(self, phase: str, step: int) -> None:
        """Tell of progress: a phase begins, or goes on, after a number of optimizer steps."""
        now = time.monotonic()
        if phase == self.phase == "step":
            self._durations.append(now - self._since)
        self.phase, self.step, self._since = phase, step, now

    @property
    def limit(self) -> float:
        """Seconds that the current phase may take."""
        limit = self.limits[self.phase]
        if self.phase == "step" and self._durations:
            limit = max(limit, self.factor * statistics.median(self._durations))
        return limit

    @property
    def _own(self) -> Path:
        return self.folder / f"{self.rank:05d}.json"

    @property
    def _hang(self) -> Path:
        return self.folder / "hang"

    def _watch(self) -> None:
        last, signed = time.monotonic(), time.monotonic()
        while not self._ends.wait(TICK):
            now = time.monotonic()
            # The process itself was stopped, as when Slurm suspends a job: that time does not count.
            if now - last > 10 * TICK:
                self._since += now - last
            last = now
            if self.n_ranks > 1 and now - signed >= BEAT:
                self._sign()
                signed = now
            if self._launcher and os.getppid() != self._launcher:
                self._end("the process that has started this rank is gone")
            elif (waited := now - self._since) > (limit := self.limit):
                self._end(f"no progress for {waited:.0f} s, the limit of this phase is {limit:.0f} s")
            elif self.n_ranks > 1 and self._others_hang():
                self._end("another rank makes no progress")

    def _sign(self) -> None:
        with suppress(OSError):  # a file server that is away for a while
            about = {"host": socket.gethostname(), "pid": os.getpid(), "step": self.step, "phase": self.phase}
            temporary = self._own.with_suffix(".tmp")
            temporary.write_text(json.dumps(about), encoding="utf-8")
            if not self._own.exists():
                self._started = temporary.stat().st_mtime
            temporary.replace(self._own)

    def _others_hang(self) -> bool:
        try:
            # By the file server's clock; an older file is of a former start.
            return self._hang.stat().st_mtime >= self._started
        except OSError:
            return False

    def _end(self, reason: str) -> None:
        """Tell what this process and those below it are doing, and exit."""
        self._tell(f"{reason}; {self.phase}, {self.step} steps done", with_stacks=True)
        if self.n_ranks > 1:
            self._sign()
            with suppress(OSError):
                self._hang.touch()
        workers = multiprocessing.active_children()
        for worker in workers:
            with suppress(psutil.Error, OSError):
                state = psutil.Process(worker.pid).status()
                self._tell(f"loader process {worker.pid} is {state}")
                if state != psutil.STATUS_STOPPED:
                    os.kill(worker.pid or 0, signal.SIGUSR2)  # its stacks, see `answer_with_stacks`
        time.sleep(ANSWER)
        states = self._states() if self.n_ranks > 1 else []
        alive = [rank for rank, (_, is_alive) in enumerate(states) if is_alive]
        if states and self.rank == min(alive, default=self.rank):
            self._tell("\n".join(["the ranks of this run:", *(text for text, _ in states)]))
        # A stopped process answers to nothing but SIGKILL.
        for worker in workers:
            worker.kill()
        for rank in self.started_ranks():
            rank.kill()
        if self._launcher:
            time.sleep(ANSWER)  # its exit code is the run's, if it can exit
            with suppress(OSError):
                os.kill(self._launcher, signal.SIGKILL)
        os._exit(HUNG)

    def _states(self) -> list[tuple[str, bool]]:
        """Return a line about each rank, and whether it has given a sign of life lately."""
        self._sign()
        lines = []
        for rank in range(self.n_ranks):
            path = self.folder / f"{rank:05d}.json"
            try:
                about = json.loads(path.read_text(encoding="utf-8"))
                age = self._own.stat().st_mtime - path.stat().st_mtime
            except (OSError, ValueError):
                lines.append((f"  rank {rank}: has left no sign of life", False))
                continue
            is_alive = age < 3 * BEAT
            silent = "" if is_alive else f"; NO SIGN OF LIFE for {age:.0f} s: stopped, killed, or its machine is gone"
            where = f"process {about['pid']} on {about['host']}"
            lines.append((f"  rank {rank}: {about['phase']}, {about['step']} steps done, {where}{silent}", is_alive))
        return lines

    def _tell(self, text: str, *, with_stacks: bool = False) -> None:
        stacks = ""
        if with_stacks:
            with tempfile.TemporaryFile("w+", encoding="utf-8") as file:
                faulthandler.dump_traceback(file, all_threads=True)
                file.seek(0)
                stacks = "\n" + file.read().rstrip()
        # One write, as other processes write to the same place.
        os.write(2, "".join(f"[rank {self.rank}] {line}\n" for line in f"{text}{stacks}".split("\n")).encode())


def answer_with_stacks() -> None:
    """Let this process write the stacks of its threads to stderr when it receives SIGUSR2."""
    if hasattr(signal, "SIGUSR2"):
        faulthandler.register(signal.SIGUSR2, file=2, all_threads=True)
