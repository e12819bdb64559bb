"""From the bytes of tars to collated batches: ours, webdataset and megatron-energon side by side, in one run.

    python -m benchmarks.data [--pairs 1024] [--rounds 9] [--folder runs/bench_data] [--json figures.json]

The caption pairs are generated (data_inputs.py): photographs' statistics, LAION's lengths of captions, img2dataset's three
files a pair. They are read once beforehand, so that the file cache is warm. The pipelines (data_pipelines.py) take turns on
the same tars, with one thread a process. A figure is the median over the rounds, a ratio the median of the rounds' ratios,
ours over the other's. Without workers the measure is CPU time, as a machine may have other work to do; with two workers it
is wall-clock time. Rows have 2048 positions, images 224 pixels and 64 slots; the others' batches hold as many pairs as one
of our rows.

Then texts, which have no images; and how long a fresh process takes, its imports done, from opening the index of a corpus
to the first batch, at row 0 and at row 1,000,000.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.data_inputs import SHAPES, Inputs, make
from benchmarks.data_pipelines import Count, MissingError, Task, energon, ours, webdataset, webdataset_own_decoder
from kosmos_lit.checks.device import describe_device
from kosmos_lit.terminal import table

ROOT = Path(__file__).parents[1]
RESUME_ROW = 1_000_000
"""A row far into the stream, at which resuming is measured."""
GOALS = {"webdataset": 2.0, "webdataset, our decoder": 1.0}
"""Ratios that ours should reach."""
PIPELINES = {"webdataset": webdataset, "webdataset, our decoder": webdataset_own_decoder, "megatron-energon": energon}
"""The pipelines that ours is compared with."""
FIRST_BATCH = """
import sys, time
from pathlib import Path
import torch
from benchmarks.data_inputs import Inputs
from benchmarks.data_pipelines import ours
torch.set_num_threads(1)
start = time.monotonic()
next(ours(Inputs(Path(sys.argv[1])).data("many"), int(sys.argv[2]), int(sys.argv[3])))
print(time.monotonic() - start)
"""
Pipeline = Callable[[], Iterator[Count]]


def rates(
    pipelines: dict[str, Pipeline], n_batches: int, n_rounds: int, workers: int
) -> tuple[dict[str, list[Any]], dict[str, str]]:
    """Return images and rows a second of each pipeline and round, in turns; and the reasons for missing pipelines."""
    clock = time.monotonic if workers else time.process_time
    rates_of: dict[str, list[Any]] = {name: [] for name in pipelines}
    reasons: dict[str, str] = {}
    running: dict[str, Iterator[Count]] = {}
    for number in range(n_rounds + 1):
        for name, pipeline in pipelines.items():
            if name in reasons:
                continue
            try:
                batches = running[name] if name in running else pipeline()
                # Workers start anew in each round, so that none prepares batches while another pipeline is measured; the
                # batches that they had prepared are not counted.
                for _ in range(2 * workers if workers else int(not number)):
                    next(batches)
                start, counts = clock(), [next(batches) for _ in range(n_batches)]
                seconds = clock() - start
            except MissingError as error:
                reasons[name] = str(error)
                continue
            if not workers:
                running[name] = batches
            batches = iter(())
            if number:  # the first round warms up
                rates_of[name].append(tuple(sum(column) / seconds for column in zip(*counts, strict=True)))
    return rates_of, reasons


def compare(inputs: Inputs, shape: str, workers: int, n_batches: int, n_rounds: int) -> list[dict[str, object]]:
    """Return the lines of the table for pairs of one shape."""
    data = inputs.data(shape)
    totals = data.prepared["caption"].train.plan.totals
    task = Task(inputs.tars(shape), data.tokenizer, round(totals.images / totals.rows), workers)
    pipelines: dict[str, Pipeline] = {"ours": lambda: ours(data, workers)}
    pipelines |= {name: partial(pipeline, task) for name, pipeline in PIPELINES.items()}
    rates_of, reasons = rates(pipelines, n_batches, n_rounds, workers)
    lines: list[dict[str, object]] = []
    for name in pipelines:
        line: dict[str, object] = {"pairs": shape, "workers": workers, "pipeline": name}
        if name in reasons:
            lines.append(line | {"skipped": reasons[name]})
            continue
        images, rows = zip(*rates_of[name], strict=True)
        ratio = statistics.median(our[0] / its for our, its in zip(rates_of["ours"], images, strict=True))
        own = name == "ours"
        line["images/s"] = round(statistics.median(images))
        line["rows/s"] = round(statistics.median(rows), 1) if own else None
        line |= {"ours over it": None if own else round(ratio, 2), "goal": GOALS.get(name)}
        lines.append(line)
    return lines


def texts(inputs: Inputs, n_rounds: int) -> dict[str, object]:
    """Return rows a second of texts on one core."""
    data = inputs.data("text")
    rates_of, _ = rates({"ours": lambda: ours(data, 0)}, 100, n_rounds, 0)
    per_second = statistics.median(rows for _, rows in rates_of["ours"])
    return {"rows/s": round(per_second), "ms a row": round(1000 / per_second, 2)}


def first_batches(inputs: Inputs, n_starts: int) -> list[dict[str, object]]:
    """Return the seconds from opening to the first batch in fresh processes, at both rows in turn."""
    lines = []
    totals = inputs.data("many").prepared["caption"].train.plan.totals
    for workers in (0, 2):
        seconds: dict[int, list[float]] = {0: [], RESUME_ROW: []}
        for _ in range(n_starts):
            for row, values in seconds.items():
                command = [sys.executable, "-c", FIRST_BATCH, str(inputs.folder), str(workers), str(row)]
                process = subprocess.run(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, check=True)
                values.append(float(process.stdout.split()[-1]))
        near, far = (statistics.median(values) for values in seconds.values())
        ratio = statistics.median(f / n for n, f in zip(*seconds.values(), strict=True))
        lines.append(
            {
                "documents": totals.documents,
                "workers": workers,
                "row 0, s": round(near, 2),
                f"row {RESUME_ROW:,}, s": round(far, 2),
                "ratio": round(ratio, 2),
            }
        )
    return lines


def memory(inputs: Inputs, n_batches: int) -> dict[str, int]:
    """Return the process's peak memory in bytes after `n_batches`, and after five times as many more."""
    batches = ours(inputs.data("256 px"), 0)
    peaks = []
    for n in (n_batches, 5 * n_batches):
        for _ in range(n):
            next(batches)
        peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    return {"bytes at first": peaks[0], "bytes at last": peaks[1]}


def show(lines: Sequence[dict[str, object]]) -> None:
    """Print lines as a table; the last column is the reason for figures that are missing."""
    columns = list(next(line for line in lines if "skipped" not in line))
    rows = [[line.get(column) for column in (*columns, "skipped")] for line in lines]
    print(table([*columns, ""], rows, "r" * len(columns) + "l"), flush=True)
    print(flush=True)


def main() -> None:
    """Measure, and print tables and then the same as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=1024, help="of each shape")
    parser.add_argument("--texts", type=int, default=4000)
    parser.add_argument("--documents", type=int, default=200_000, help="of the corpus whose start-up is measured")
    parser.add_argument("--batches", type=int, default=8, help="of a pipeline in a round; with workers six times as many")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--starts", type=int, default=3, help="fresh processes for each row and number of workers")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "bench_data", help="folder of the generated files")
    parser.add_argument("--json", type=Path, help="file for the figures; default: the terminal")
    a = parser.parse_args()
    torch.set_num_threads(1)

    inputs = make(a.folder, a.pairs, a.texts, a.documents)
    figures: dict[str, Any] = {"machine": describe_device(torch.device("cpu")), "rounds": a.rounds}
    print(figures["machine"])
    figures["memory"] = memory(inputs, 20)  # first: the peak memory of the others would hide it
    show([figures["memory"]])
    figures["texts"] = texts(inputs, a.rounds)
    show([figures["texts"]])
    figures["pairs"] = []
    for workers, shape in itertools.product([0] if (os.cpu_count() or 1) < 2 else [0, 2], SHAPES):
        figures["pairs"] += compare(inputs, shape, workers, a.batches * (6 if workers else 1), a.rounds)
        show(figures["pairs"][-len(PIPELINES) - 1 :])
    figures["first batch"] = first_batches(inputs, a.starts)
    show(figures["first batch"])
    text = json.dumps(figures, indent=1)
    if a.json is None:
        print(text)
    else:
        a.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
