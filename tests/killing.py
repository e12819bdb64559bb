"""Kill a run again and again: `python -m tests.killing FOLDER SEED KILLS -- fit ...` prints the step that each death left.

Every start is a fork of one process that has imported everything and run nothing, so that starting takes a second.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path


def newest(folder: Path) -> str:
    """Return the name of a run's last checkpoint, or nothing."""
    return max((path.name for path in (folder / "checkpoints").glob("*.ckpt")), default="")


def begin(arguments: list[str]) -> int:
    """Fork a run and return its process id."""
    child = os.fork()
    if child:
        return child
    from kosmos_lit.cli import main

    code = 1
    try:
        sys.stdout = sys.stderr
        code = main(arguments)
    finally:
        os._exit(code)


def main(folder: Path, seed: int, kills: int, arguments: list[str]) -> int:
    import kosmos_lit.cli.trainer  # noqa: F401  # imported once, before any fork

    draw = random.Random(seed)
    for _ in range(kills):
        before, process = newest(folder), begin(arguments)
        deadline = time.monotonic() + 120
        while newest(folder) == before and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(draw.uniform(0, 0.7))
        os.kill(process, signal.SIGKILL)
        _, status = os.waitpid(process, 0)
        print(newest(folder), "killed" if os.WIFSIGNALED(status) else "ended", flush=True)
    _, status = os.waitpid(begin(arguments), 0)
    return os.waitstatus_to_exitcode(status)


if __name__ == "__main__":
    at = sys.argv.index("--")
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[at + 1 :]))
