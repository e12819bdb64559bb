"""One real optimizer step of the paper's full-size model in bfloat16: its time and memory.

Runs `fit` in a process of its own, on a machine with 24 GB. Prints a table, or JSON with --json.
"""

from __future__ import annotations

import argparse
import csv
import json
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

from kosmos_lit.checks.device import describe_device

ROOT = Path(__file__).parents[1]
ROWS, POSITIONS = 2, 128
"""Rows of the step and positions of a row, as in benchmarks/full_size_step.yaml."""


def measure(folder: Path) -> dict[str, object]:
    """Run the step in `folder` and return its metrics.

    Raises: RuntimeError with the program's output if it fails.
    """
    shutil.rmtree(folder, ignore_errors=True)
    configs = ["-c", str(ROOT / "configs/kosmos1.yaml"), "-c", str(ROOT / "benchmarks/full_size_step.yaml")]
    paths = ["--trainer.default_root_dir", str(folder), "--data.world.path", str(folder / "world")]
    started = time.monotonic()
    process = subprocess.run(
        [sys.executable, str(ROOT / "main.py"), "fit", *configs, *paths],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    seconds = time.monotonic() - started
    if process.returncode:
        raise RuntimeError(process.stdout)
    with (folder / "csv" / "version_0" / "metrics.csv").open(encoding="utf-8", newline="") as file:
        [row] = [r for r in csv.DictReader(file) if r.get("train/loss")]
    return {
        "loss": float(row["train/loss"]),
        "grad_norm": float(row["grad_norm"]),
        "step_seconds": round(ROWS * POSITIONS * (1 - float(row["padding"])) / float(row["tokens_per_second"]), 1),
        "all_seconds": round(seconds, 1),
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024,
        "machine": describe_device(torch.device("cpu")),
    }


def main() -> None:
    """Print the metrics."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "full_size_step")
    arguments = parser.parse_args()
    metrics = measure(arguments.folder)
    print(json.dumps(metrics) if arguments.json else "\n".join(f"{key:<20}{value}" for key, value in metrics.items()))


if __name__ == "__main__":
    main()
