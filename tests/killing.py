"""Kill a run again and again: `python -m tests.killing FOLDER SEED MOMENT,MOMENT... -- fit ...` prints what each death left.

Every start is a fork of one process that has imported everything and run nothing, so that starting takes a second or two.
Moments are counted from what the run does, not by the clock alone, so that a slow machine sees the same kinds of them:

- starting: up to two seconds after the start;
- writing: while a checkpoint is being written;
- a number: up to one checkpoint's time after so many new ones;
- own: wherever the run kills itself, as `DieInSteps` does.
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

PATIENCE = 120
"""Seconds until a run that does not get on is given up."""


class DieInSteps(Callback):
    """Kills its own process in the middle of a step, between two micro-batches, at a different one in each life."""

    def __init__(self, steps: list[int]) -> None:
        """Take the steps, the first being 1; every step must leave a checkpoint."""
        self.steps = steps

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # The step that the last life died in is the next one now.
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
        os.setpgid(child, child)  # here too: the child may not have come to it when it is to be killed
        return child
    from kosmos_lit.cli import main

    code = 1
    try:
        os.setpgid(0, 0)
        sys.stdout = sys.stderr
        code = main(arguments)
    except BaseException:  # noqa: BLE001  # whatever it is, it must be seen: nothing runs behind `_exit`
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def over(process: int) -> bool:
    """Tell whether a process has ended; it can still be waited for."""
    return os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def watch(process: int, until: Callable[[], bool]) -> None:
    """Wait until something holds, or the process has ended."""
    deadline = time.monotonic() + PATIENCE
    while not until() and not over(process) and time.monotonic() < deadline:
        time.sleep(0.002)


def wait_for(moment: str, folder: Path, process: int, draw: random.Random, pace: float) -> None:
    """Return at a drawn moment of a run's life."""
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
        if not over(process):
            os.killpg(process, signal.SIGKILL)  # its loader's processes too, as the loss of a machine does
        _, status = os.waitpid(process, 0)
        left = checkpoints(folder)
        times = [(folder / "checkpoints" / name).stat().st_mtime for name in left[len(before) :]]
        pace = times[-1] - times[-2] if len(times) > 1 else pace
        print(moment, left[-1] if left else "-", "killed" if os.WIFSIGNALED(status) else "ended", flush=True)
    _, status = os.waitpid(begin(arguments), 0)
    return os.waitstatus_to_exitcode(status)


if __name__ == "__main__":
    at = sys.argv.index("--")
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3].split(","), sys.argv[at + 1 :]))
