"""Row plans at scale: their time, memory and padding.

    python benchmarks/plan.py [--documents 100000000] [--workers 2] [--folder DIR] [--index INDEX ...]

Writes a synthetic index of caption pairs with LAION-like lengths (its columns of tokens and images are sparse files, as
nothing reads them), makes its row plans, and opens them again in fresh processes. Opening is measured after the imports: the
index, the row plans of training and validation, and the segments of one row. Memory is what that adds to the process.
Padding is printed for these lengths, for wider and narrower ones, and for the corpora of `--index`.

Lengths are 67 positions (<s>, <image>, 64 slots, </image>) and a log-normal number of text tokens of median 17, at most 512.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from datamodules.corpus import COLUMNS, MANIFEST, PLACE_BITS, VERSION, IndexedCorpus
from datamodules.packing import RowLayout, RowPlan
from datamodules.packing.pack import CROWDED, Array, best_fit, exact_fill
from datamodules.packing.split import Split
from kosmos_lit.checks.device import describe_device

SEQ_LEN, N_LATENTS, MEDIAN, SIGMA, MOST = 2048, 64, 17, 0.6, 512
LAYOUT = RowLayout(seq_len=SEQ_LEN, n_latents=N_LATENTS, seed=0)
VAL_SHARE = 0.001
SHARD = 10_000
"""Pairs in a shard."""
CHUNK = 1 << 22
TARGET = 2 * 10**9
"""Documents of the corpus that the results are extrapolated to."""


def text_lengths(n: int, seed: int, sigma: float = SIGMA) -> Array:
    """Return the text tokens of n captions."""
    lengths = MEDIAN * np.exp(np.random.default_rng(seed).normal(0, sigma, n))
    return np.clip(np.rint(lengths), 1, MOST).astype(np.int64)


def write_index(folder: Path, n: int) -> None:
    """Write an index of n caption pairs whose tokens and images are holes in sparse files."""
    folder.mkdir(parents=True, exist_ok=True)

    def column(name: str, length: int, dtype: str) -> np.memmap:
        return np.lib.format.open_memmap(folder / f"{name}.npy", "w+", dtype, (length,))

    tokens, images, records = (
        column(c, n + extra, COLUMNS[c]) for c, extra in (("token_offsets", 1), ("image_offsets", 1), ("records", 0))
    )
    for name in ("image_places", "image_lengths", "image_positions"):
        column(name, n, COLUMNS[name])
    at = 0
    for first in range(0, n, CHUNK):
        numbers = np.arange(first, min(first + CHUNK, n))
        ends = at + np.cumsum(text_lengths(len(numbers), first) + 1)
        tokens[numbers[0] + 1 : numbers[-1] + 2], at = ends, int(ends[-1])
        images[numbers[0] + 1 : numbers[-1] + 2] = numbers + 1
        records[numbers[0] : numbers[-1] + 1] = (numbers // SHARD << PLACE_BITS) + numbers % SHARD
    column("tokens", at, "<u2")
    shards = [{"path": f"pairs/{i:08d}.tar", "bytes": 1} for i in range(-(-n // SHARD))]
    manifest = {
        "version": VERSION,
        "format": "img2dataset",
        "tokenizer": "none",
        "options": {},
        "shards": shards,
        "documents": n,
        "tokens": at,
        "images": n,
    }
    (folder / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")


def make_plans(folder: Path, workers: int) -> list[RowPlan]:
    """Return the row plans of training and validation."""
    corpus = IndexedCorpus(folder)
    split = Split(corpus, VAL_SHARE, None)
    train = RowPlan("caption", corpus, split, "train", LAYOUT, workers=workers)
    return [train, RowPlan("caption", corpus, split, "val", LAYOUT, shuffle=False, workers=workers)]


def resident() -> tuple[float, float]:
    """Return the resident MB of this process: private memory, and mapped files, which processes share."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    sizes = dict(line.split(":") for line in lines)
    own, mapped = (int(sizes[name].split()[0]) * 1024 / 1e6 for name in ("RssAnon", "RssFile"))
    return own, mapped


def cpu_seconds() -> float:
    """Return the CPU time of this process and of its children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


def open_and_read(folder: Path, number: int) -> dict[str, float]:
    """Open an index and its row plans, and read the segments of a row; return seconds and MB."""
    own, mapped = resident()
    began = time.perf_counter()
    plan = make_plans(folder, 1)[0]
    open_end, open_own, open_mapped = time.perf_counter(), *resident()
    n = len(plan.segments(plan.row(0, number)))
    read, read_own, read_mapped = time.perf_counter(), *resident()
    assert n
    return {
        "open": open_end - began,
        "open_own": open_own - own,
        "open_mapped": open_mapped - mapped,
        "row": read - open_end,
        "row_own": read_own - own,
        "row_mapped": read_mapped - mapped,
    }


def padding(widths: Array) -> str:
    """Return the padding of all rows, and of all but the least full one: a block has one such row, however large it is."""
    crowded = widths.mean() * CROWDED <= SEQ_LEN
    lines = []
    for fill in (best_fit, exact_fill) if crowded else (best_fit,):
        rows = np.sort(np.bincount(fill(widths, SEQ_LEN), widths))
        overall, but_last = (1 - r.mean() / SEQ_LEN for r in (rows, rows[1:]))
        lines.append(f"{fill.__name__} {overall:.3%}, {but_last:.3%} without the last row")
    return "; ".join(lines)


def report_padding(folders: Sequence[Path]) -> None:
    for n in (3500, 1 << 17):
        for sigma in (0.4, SIGMA, 0.8):
            text = text_lengths(n, 1, sigma)
            print(f"padding  {n:>7,} pairs, median {MEDIAN} text tokens, sigma {sigma}: {padding(text + N_LATENTS + 3)}")
    for folder in folders:
        corpus = IndexedCorpus(folder)
        plan = RowPlan("real", corpus, Split(corpus, 0.0, None), "train", LAYOUT)
        filled = np.sort(plan.blocks.packed(0)[0].row_positions) / SEQ_LEN
        print(
            f"padding  {folder}: {plan.totals.begun:,} documents in {plan.n_rows:,} rows: {1 - filled.mean():.3%}, "
            f"{1 - filled[1:].mean():.3%} without the last row; {plan.totals.dropped or 'none'} dropped"
        )


def report_scale(folder: Path, n: int, workers: int) -> None:
    began = time.perf_counter()
    write_index(folder, n)
    print(f"\n{n:,} caption pairs: index written in {time.perf_counter() - began:.0f} s")
    for file in folder.glob("plans/*.npz"):  # of an earlier run
        file.unlink()
    began, cpu = time.perf_counter(), cpu_seconds()
    plan, val = make_plans(folder, workers)
    seconds, busy = time.perf_counter() - began, cpu_seconds() - cpu
    totals = plan.totals
    plan_bytes = sum(file.stat().st_size for file in folder.glob("plans/*.npz"))
    print(
        f"planned in {seconds:.0f} s by {workers} processes, {n / busy:,.0f} documents a second of CPU: "
        f"{plan.n_rows:,} rows, padding {1 - totals.positions / totals.rows / SEQ_LEN:.4%}; validation {val.n_rows:,} rows, "
        f"padding {1 - val.totals.positions / val.totals.rows / SEQ_LEN:.3%}; "
        f"{plan_bytes:,} bytes of counts\n{plan.window()}"
    )
    for number in 2 * (0, min(10**6, plan.n_rows // 2), plan.n_rows - 1):
        command = [sys.executable, __file__, "--open", str(folder), "--row", str(number)]
        costs = json.loads(subprocess.run(command, capture_output=True, check=True, text=True).stdout)
        print(
            f"row {number:>9,}: opened in {costs['open']:.2f} s with {costs['open_own']:.0f} MB and "
            f"{costs['open_mapped']:.0f} MB mapped; block packed in {costs['row']:.2f} s, "
            f"{costs['row_own']:.0f} MB and {costs['row_mapped']:.0f} MB mapped in all"
        )
    times = TARGET / n
    print(
        f"{TARGET:,} documents: {plan.blocks.n_blocks * times:,.0f} blocks, {plan.blocks.n_runs * times:,.0f} runs, "
        f"{plan_bytes * times / 1e6:.1f} MB of counts, {busy * times / 3600:.2f} hours of CPU to plan"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=10**8)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="folder of the index; default: a temporary one")
    parser.add_argument("--index", type=Path, nargs="*", default=[], help="prepared corpora whose padding is measured")
    parser.add_argument("--open", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--row", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.open:
        print(json.dumps(open_and_read(options.open, options.row)))
        return
    print(describe_device(torch.device("cpu")))
    report_padding(options.index)
    with tempfile.TemporaryDirectory() as temporary:
        report_scale(options.folder or Path(temporary), options.documents, options.workers)


if __name__ == "__main__":
    main()
