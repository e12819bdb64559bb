"""Kill a run again and again: `python -m tests.killing FOLDER SEED KILLS -- fit ...` prints what each death left.

Every start is a fork of one process that has imported everything and run nothing, so that starting takes a second or two.
Moments are counted from what the run does, not by the clock alone, so that a slow machine sees the same kinds of them:
while it starts, while a checkpoint is being written, and up to one checkpoint's time after one, two or three new ones.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

PATIENCE = 120
"""Seconds until a run that does not get on is given up."""


def checkpoints(folder: Path) -> list[str]:
    """Return the names of a run's checkpoints by step."""
    return sorted(path.name for path in (folder / "checkpoints").glob("*.ckpt"))


def begin(arguments: list[str]) -> int:
    """Fork a run, in a process group of its own, and return its process id."""
    child = os.fork()
    if child:
        return child
    from kosmos_lit.cli import main

    code = 1
    try:
        os.setpgid(0, 0)
        sys.stdout = sys.stderr
        code = main(arguments)
    finally:
        os._exit(code)


def watch(process: int, until: Callable[[], bool]) -> bool:
    """Wait until something holds; return whether it came so far before the process ended."""
    deadline = time.monotonic() + PATIENCE
    while not until():
        if os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT) or time.monotonic() > deadline:
            return False
        time.sleep(0.002)
    return True


def wait_for_moment(folder: Path, process: int, moment: str, draw: random.Random, pace: float) -> bool:
    """Return at a drawn moment of a run's life, True unless the run ended before it."""
    before = len(checkpoints(folder))
    match moment:
        case "starting":
            time.sleep(draw.uniform(0, 2))
            return watch(process, lambda: True)
        case "writing":
            return watch(process, lambda: any((folder / "checkpoints").glob(".*.tmp")))
        case _:
            arrived = watch(process, lambda: len(checkpoints(folder)) >= before + int(moment))
            time.sleep(draw.uniform(0, pace))
            return arrived


def main(folder: Path, seed: int, kills: int, arguments: list[str]) -> int:
    import kosmos_lit.cli.trainer  # noqa: F401  # imported once, before any fork

    draw, pace = random.Random(seed), 0.3
    for _ in range(kills):
        moment = draw.choice(("starting", "writing", "1", "1", "1", "2", "3"))
        process, before = begin(arguments), checkpoints(folder)
        arrived = wait_for_moment(folder, process, moment, draw, pace)
        os.killpg(process, signal.SIGKILL)  # its loader's processes too, as the loss of a machine does
        _, status = os.waitpid(process, 0)
        times = [(folder / "checkpoints" / name).stat().st_mtime for name in checkpoints(folder)[len(before) :]]
        pace = times[-1] - times[-2] if len(times) > 1 else pace
        how = "killed" if arrived and os.WIFSIGNALED(status) else "ended"
        print(moment, (checkpoints(folder) or ["-"])[-1], how, flush=True)
    _, status = os.waitpid(begin(arguments), 0)
    return os.waitstatus_to_exitcode(status)


if __name__ == "__main__":
    at = sys.argv.index("--")
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[at + 1 :]))
