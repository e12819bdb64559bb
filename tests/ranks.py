"""Several commands in turn in the same processes, one process a rank, so that imports run once."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tests.cli_runs import ROOT


def on_ranks(n: int, commands: Sequence[Sequence[str]], folder: Path, limit: float = 1200, codes: Sequence[int] = ()) -> str:
    """Run `python main.py ...` for each command on n ranks; return the output of all ranks.

    All ranks must succeed, or exit with the command's code in `codes`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "NODE_RANK": "0", "OMP_NUM_THREADS": "1"}
    logs = [folder / f"rank-{rank}.txt" for rank in range(n)]
    turns = json.dumps([[code, *c] for code, c in zip(codes or [0] * len(commands), commands, strict=True)])
    ranks = []
    for rank, log in enumerate(logs):
        environment = {**os.environ, **shared, "LOCAL_RANK": str(rank)}
        command = [sys.executable, "-m", "tests.ranks", turns]
        with log.open("w") as file:
            ranks.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT))
    end = time.monotonic() + limit
    try:
        # A failed rank leaves the others waiting in a collective.
        while any(r.poll() is None for r in ranks) and not any(r.poll() for r in ranks) and time.monotonic() < end:
            time.sleep(0.05)
    finally:
        for r in ranks:
            if r.poll() is None:
                r.kill()
            r.wait()
    output = "".join(log.read_text() for log in logs)
    assert [r.returncode for r in ranks] == [0] * n, output
    return output


def _main() -> None:
    import torch
    import torch.distributed as dist

    from kosmos_lit.cli import main

    torch.set_num_threads(1)
    for expected, *command in json.loads(sys.argv[1]):
        try:
            code: object = main(command)
        except SystemExit as end:
            code = end.code
        if code != expected:
            sys.exit(f"exit code {code} instead of {expected}: {command}")
    dist.destroy_process_group()


if __name__ == "__main__":
    _main()
