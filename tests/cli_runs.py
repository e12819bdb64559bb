"""Run the command line as a user does, on a world of a few hundred images."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import count
from pathlib import Path

from kosmos_lit.cli.run_log import read_log

ROOT = Path(__file__).parents[1]
# Ranks that two test workers start at the same moment would draw the same free port, and wait for each other for ever.
_ports = count(20_000 + 500 * int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")))
TINY = str(ROOT / "tests" / "configs" / "tiny.yaml")


def tiny_run(verb: str, folder: Path, world: Path, *more: str) -> list[str]:
    """Return the arguments of a small run in `folder` on the drawn world."""
    return [verb, "-c", TINY, "--trainer.default_root_dir", str(folder), "--data.world.path", str(world), *more]


def start(arguments: list[str], **kwargs: object) -> subprocess.Popen[str]:
    """Start `python main.py ...` in a process of its own."""
    # A run of several ranks within this process leaves its rank in the environment, which would stand for a launcher's.
    environment = {
        name: value for name, value in os.environ.items() if name not in ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE")
    }
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "default", "MASTER_PORT": str(next(_ports))}
    command = [sys.executable, str(ROOT / "main.py"), *arguments]
    return subprocess.Popen(  # type: ignore[call-overload, no-any-return]
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **kwargs
    )


def run(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """Run `python main.py ...` and wait for it."""
    process = start(arguments)
    out, err = process.communicate()
    return subprocess.CompletedProcess(arguments, process.returncode, out, err)


def losses(folder: Path) -> dict[int, str]:
    """Return the training loss of each step over all starts of a run, as it was written."""
    return {step: row["train/loss"] for step, row in read_log(folder).items()}
