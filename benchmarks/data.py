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

ROOT = Path(__file__).parents[1]
FAR = 1_000_000
"""The row at which resuming is tried."""
BARS = {"webdataset": 2.0, "webdataset, our decoder": 1.0}
"""Ratios that are asked for."""
SIDES = {"webdataset": webdataset, "webdataset, our decoder": webdataset_own_decoder, "megatron-energon": energon}
"""Beside ours."""
FIRST_BATCH = """
import sys, time
from pathlib import Path
import torch
from benchmarks.data_inputs import Inputs
from benchmarks.data_pipelines import ours
torch.set_num_threads(1)
begun = time.monotonic()
next(ours(Inputs(Path(sys.argv[1])).data("many"), int(sys.argv[2]), int(sys.argv[3])))
print(time.monotonic() - begun)
"""
Side = Callable[[], Iterator[Count]]


def rates(
    sides: dict[str, Side], n_batches: int, n_rounds: int, workers: int
) -> tuple[dict[str, list[Any]], dict[str, str]]:
    """Return images and rows a second of each side and round, sides taking turns, and why sides are missing."""
    clock = time.monotonic if workers else time.process_time
    found: dict[str, list[Any]] = {name: [] for name in sides}
    reasons: dict[str, str] = {}
    running: dict[str, Iterator[Count]] = {}
    for number in range(n_rounds + 1):
        for name, side in sides.items():
            if name in reasons:
                continue
            try:
                batches = running[name] if name in running else side()
                # Workers are started anew in each round, so that none makes batches while another side is measured; what
                # they had ready is not counted.
                for _ in range(2 * workers if workers else int(not number)):
                    next(batches)
                begun, counted = clock(), [next(batches) for _ in range(n_batches)]
                seconds = clock() - begun
            except MissingError as error:
                reasons[name] = str(error)
                continue
            if not workers:
                running[name] = batches
            batches = iter(())
            if number:  # the first round warms up
                found[name].append(tuple(sum(column) / seconds for column in zip(*counted, strict=True)))
    return found, reasons


def compare(inputs: Inputs, shape: str, workers: int, n_batches: int, n_rounds: int) -> list[dict[str, object]]:
    """Return the lines of the table for pairs of one shape."""
    data = inputs.data(shape)
    totals = data.prepared["caption"].train.plan.totals
    task = Task(inputs.tars(shape), data.tokenizer, round(totals.images / totals.rows), workers)
    sides: dict[str, Side] = {"ours": lambda: ours(data, workers)}
    sides |= {name: partial(side, task) for name, side in SIDES.items()}
    found, reasons = rates(sides, n_batches, n_rounds, workers)
    lines: list[dict[str, object]] = []
    for name in sides:
        line: dict[str, object] = {"pairs": shape, "workers": workers, "side": name}
        if name in reasons:
            lines.append(line | {"skipped": reasons[name]})
            continue
        images, rows = zip(*found[name], strict=True)
        ratio = statistics.median(our[0] / its for our, its in zip(found["ours"], images, strict=True))
        own = name == "ours"
        line["images/s"] = round(statistics.median(images))
        line["rows/s"] = round(statistics.median(rows), 1) if own else None
        line |= {"ours over it": None if own else round(ratio, 2), "asked": BARS.get(name)}
        lines.append(line)
    return lines


def texts(inputs: Inputs, n_rounds: int) -> dict[str, object]:
    """Return rows a second of texts on one core."""
    data = inputs.data("text")
    found, _ = rates({"ours": lambda: ours(data, 0)}, 100, n_rounds, 0)
    per_second = statistics.median(rows for _, rows in found["ours"])
    return {"rows/s": round(per_second), "ms a row": round(1000 / per_second, 2)}


def first_batches(inputs: Inputs, n_starts: int) -> list[dict[str, object]]:
    """Return the seconds from opening to the first batch in fresh processes, at both rows in turn."""
    lines = []
    totals = inputs.data("many").opened["caption"].train.plan.totals
    for workers in (0, 2):
        seconds: dict[int, list[float]] = {0: [], FAR: []}
        for _ in range(n_starts):
            for row, kept in seconds.items():
                command = [sys.executable, "-c", FIRST_BATCH, str(inputs.folder), str(workers), str(row)]
                done = subprocess.run(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, check=True)
                kept.append(float(done.stdout.split()[-1]))
        near, far = (statistics.median(kept) for kept in seconds.values())
        ratio = statistics.median(f / n for n, f in zip(*seconds.values(), strict=True))
        lines.append(
            {"documents": totals.documents, "workers": workers, "row 0, s": round(near, 2), f"row {FAR:,}, s": round(far, 2),
             "ratio": round(ratio, 2)}
        )  # fmt: skip
    return lines


def memory(inputs: Inputs, n_batches: int) -> dict[str, int]:
    """Return the process's peak memory in bytes after reading some batches, and after reading as many again five times."""
    batches = ours(inputs.data("256 px"), 0)
    peaks = []
    for stretch in (n_batches, 5 * n_batches):
        for _ in range(stretch):
            next(batches)
        peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    return {"bytes at first": peaks[0], "bytes at last": peaks[1]}


def show(lines: Sequence[dict[str, object]]) -> None:
    """Print lines as a table; what has a reason instead of figures comes with it."""
    columns = list(next(line for line in lines if "skipped" not in line))
    shown = [dict(zip(columns, columns, strict=True)), *lines]
    cells = [["" if line.get(c) is None else str(line[c]) for c in columns] for line in shown]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line, row in zip(shown, cells, strict=True):
        text = "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        print(f"{text.rstrip()}  {line['skipped']}" if "skipped" in line else text)
    print(flush=True)


def main() -> None:
    """Measure, and print tables and then the same as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=1024, help="of each shape")
    parser.add_argument("--texts", type=int, default=4000)
    parser.add_argument("--documents", type=int, default=200_000, help="of the corpus whose start-up is measured")
    parser.add_argument("--batches", type=int, default=8, help="of a side in a round; with workers six times as many")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--starts", type=int, default=3, help="fresh processes for each row and number of workers")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "bench_data", help="where the made files are kept")
    parser.add_argument("--json", type=Path, help="where the figures go, if not to the terminal")
    a = parser.parse_args()
    torch.set_num_threads(1)

    inputs = make(a.folder, a.pairs, a.texts, a.documents)
    figures: dict[str, Any] = {"machine": describe_device(torch.device("cpu")), "rounds": a.rounds}
    print(figures["machine"])
    figures["memory"] = memory(inputs, 20)  # first: what the others take would hide it
    show([figures["memory"]])
    figures["texts"] = texts(inputs, a.rounds)
    show([figures["texts"]])
    figures["pairs"] = []
    for workers, shape in itertools.product([0] if (os.cpu_count() or 1) < 2 else [0, 2], SHAPES):
        figures["pairs"] += compare(inputs, shape, workers, a.batches * (6 if workers else 1), a.rounds)
        show(figures["pairs"][-len(SIDES) - 1 :])
    figures["first batch"] = first_batches(inputs, a.starts)
    show(figures["first batch"])
    text = json.dumps(figures, indent=1)
    if a.json is None:
        print(text)
    else:
        a.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
