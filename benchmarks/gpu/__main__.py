"""Measure a GPU within a deadline. Writes one JSON file, anew after every part, so that nothing measured is lost.

    python -m benchmarks.gpu --deadline SECONDS --json PATH [--parts NAME ...] [--profile] [--tiny]

Parts run in the order of this list, which begins with what tells most; one that would not fit into the time left is skipped,
one that takes much longer than expected is cut, and one that fails costs itself alone; the file names each with its reason.
`--parts` selects some of them; MM and the copy rate are measured in every run. A part whose verdict is missed leaves a
profile of its kernels, in the file and as a table beside it, if time is left; `--profile` has every part leave one.
`--tiny` runs everything on a CPU, at sizes whose numbers mean nothing, to check that it runs. The exit code is 1 if a part
failed. docs/gpu_first_run.md says how to use ten minutes of a GPU.

Parts:
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

from benchmarks.gpu.parts import PARTS
from benchmarks.gpu.supervise import Record, Settings, supervise, verdict_lines


def summary(record: Record) -> str:
    """Return one line per verdict, and one per part that is not done."""
    contents = record.contents
    lines = [f"{contents['machine'].get('device')}; " + ", ".join(f"{k} {v:.0f}" for k, v in contents["rates"].items())]
    for name, results in contents["results"].items():
        lines += verdict_lines(name, results)
    lines += [f"{name:<10}{status}" for name, status in contents["status"].items() if status != "done"]
    return "\n".join(lines)


def arguments() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    listed = "\n".join(f"    {name:<10} {part.seconds:>4.0f} s  {part.what}" for name, part in PARTS.items())
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=f"{__doc__}{listed}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--deadline", type=float, metavar="SECONDS", help="everything has ended by then; default: a day")
    parser.add_argument("--json", type=Path, metavar="PATH", default=Path("runs/gpu.json"), help="file of the results")
    parser.add_argument("--parts", nargs="+", choices=PARTS, metavar="NAME", default=list(PARTS), help="default: all")
    parser.add_argument("--steps", type=int, default=20, help="measurements of which the median is taken")
    parser.add_argument("--profile", action="store_true", help="profile every part that has a step")
    parser.add_argument("--tiny", action="store_true", help="on a CPU, at sizes whose numbers mean nothing")
    return parser


def main() -> int:
    """Measure, and print the verdicts."""
    begun = time.monotonic()
    parser = arguments()
    a = parser.parse_args()
    if a.deadline is not None and a.deadline <= 0:
        parser.error(f"--deadline is {a.deadline:g}, but must be positive")
    # A day: infinity is no timeout that a pipe takes.
    deadline = begun + (a.deadline if a.deadline is not None else 86400)
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    parts = {name: part for name, part in PARTS.items() if name in {*a.parts, "rates"}}
    a.json.parent.mkdir(parents=True, exist_ok=True)
    record = Record(a.json, list(parts), tiny=a.tiny, steps=a.steps, **{"deadline, s": a.deadline})
    settings = Settings(a.tiny, a.steps, a.profile, deadline, a.json.with_suffix(""))
    try:
        supervise(parts, settings, record)
    except LookupError as error:
        parser.error(str(error))
    except SystemExit:
        print(summary(record), flush=True)
        raise
    print(summary(record))
    print(a.json)
    return int(any(status.startswith("failed") for status in record.contents["status"].values()))


if __name__ == "__main__":
    sys.exit(main())
