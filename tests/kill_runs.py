"""Kill a run repeatedly, then let it end: `python -m tests.kill_runs FOLDER SEED MOMENT,MOMENT... -- fit ...`.

Prints the last checkpoint after each kill. Every start is a fork of one process that has imported everything and run
nothing, so that it takes a second or two. Moments depend on the run's progress, not on the clock alone, so that
a slow machine sees the same kinds of them:

- starting: up to two seconds after the start;
- writing: while a checkpoint is being written;
- a number N: after N new checkpoints, and up to the time of one more;
- own: when the run kills itself, as `DieInSteps` does.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

TIMEOUT = 120
"""Seconds after which a run without progress is killed."""


class DieInSteps(Callback):
    """Kills its own process between two micro-batches of a step, at a later step after each restart."""

    def __init__(self, steps: list[int]) -> None:
        """Take the steps, counted from 1; every step must leave a checkpoint."""
        self.steps = steps

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # The step in which the last process died is the next one now.
        self._step = next((step for step in self.steps if step > trainer.global_step + 1), None)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        middle = (batch_idx + 1) % trainer.accumulate_grad_batches != 0
        if middle and trainer.global_step + 1 == self._step:
            os.kill(os.getpid(), signal.SIGKILL)


def checkpoints(folder: Path) -> list[str]:
    """Return the names of a run's checkpoints by step."""
    return sorted(path.name for path in (folder / "checkpoints").glob("*.ckpt"))


def begin(arguments: list[str]) -> int:
    """Fork a run, in a process group of its own, and return its process id."""
    child = os.fork()
    if child:
        os.setpgid(child, child)  # in the parent too: a kill may come before the child's own call
        return child
    from kosmos_lit.cli import main

    code = 1
    try:
        os.setpgid(0, 0)
        sys.stdout = sys.stderr
        code = main(arguments)
    except BaseException:  # noqa: BLE001  # `_exit` skips the interpreter's own traceback
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def has_ended(process: int) -> bool:
    """Check whether a process has ended, and leave it to be waited for."""
    return os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def watch(process: int, until: Callable[[], bool]) -> None:
    """Wait until a condition holds or the process has ended."""
    deadline = time.monotonic() + TIMEOUT
    while not until() and not has_ended(process) and time.monotonic() < deadline:
        time.sleep(0.002)


def wait_for(moment: str, folder: Path, process: int, draw: random.Random, pace: float) -> None:
    """Wait for a moment of the run; `pace` is the time between two checkpoints in seconds."""
    before = len(checkpoints(folder))
    match moment:
        case "starting":
            time.sleep(draw.uniform(0.1, 2))
        case "writing":
            watch(process, lambda: any((folder / "checkpoints").glob(".*.tmp")))
        case "own":
            watch(process, lambda: False)
        case _:
            watch(process, lambda: len(checkpoints(folder)) >= before + int(moment))
            time.sleep(draw.uniform(0, pace))


def main(folder: Path, seed: int, moments: list[str], arguments: list[str]) -> int:
    import kosmos_lit.cli.trainer  # noqa: F401  # imported once, before any fork

    draw, pace = random.Random(seed), 0.3
    for moment in moments:
        before, process = checkpoints(folder), begin(arguments)
        wait_for(moment, folder, process, draw, pace)
        if not has_ended(process):
            os.killpg(process, signal.SIGKILL)  # the whole group with its loader workers, as a machine failure would
        _, status = os.waitpid(process, 0)
        after = checkpoints(folder)
        times = [(folder / "checkpoints" / name).stat().st_mtime for name in after[len(before) :]]
        pace = times[-1] - times[-2] if len(times) > 1 else pace
        print(moment, after[-1] if after else "-", "killed" if os.WIFSIGNALED(status) else "ended", flush=True)
    _, status = os.waitpid(begin(arguments), 0)
    return os.waitstatus_to_exitcode(status)


if __name__ == "__main__":
    at = sys.argv.index("--")
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3].split(","), sys.argv[at + 1 :]))
