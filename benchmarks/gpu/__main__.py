"""Measure a GPU: its components, then the performance goals. Writes one JSON file, after every measurement.

    python -m benchmarks.gpu [--components rates attention ...] [--goals G1 G2 ...] [--json runs/gpu.json] [--profile G1]

Without arguments, it measures all components (within ten minutes) and then all goals, in order. `--components` and `--goals`
select some of them. Components that a goal needs are measured first; MM and the copy rate are measured in every run. A
failure is recorded under `errors`, and the next measurement runs. `--profile` writes a table of the kernels that take most
of the time of one component or goal, to explain a miss. `--tiny` runs everything on a CPU, at sizes whose numbers mean
nothing, to check that it runs.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.bench import Bench, Record, tiny_bench
from benchmarks.gpu.components import COMPONENTS, rates
from benchmarks.gpu.performance_goals import GOALS, profiled


def run(bench: Bench, component_names: Sequence[str], goal_names: Sequence[str], path: Path | None) -> Record:
    """Measure components and goals, and what the goals need, in order."""
    record = Record(path, bench)
    needed = {name for goal in goal_names for name in GOALS[goal][1]}
    components = [name for name in COMPONENTS if name in {*component_names, *needed, "rates"}]
    goals = [name for name in GOALS if name in {*goal_names, *needed}]  # G3 needs G1
    for name in components:
        print(f"{name} ...", flush=True)
        record.take(name, COMPONENTS[name])
    for name in goals:
        print(f"{name} ...", flush=True)
        record.take(name, GOALS[name][0])
        for metric, verdict in bench.results.get(name, {}).get("verdicts", {}).items():
            print(f"  {metric}: {verdict['value']:.3g} ({verdict['verdict']})", flush=True)
    return record


def table(record: Record) -> str:
    """Return one line per verdict, and one per error."""
    lines = [f"{record.contents['machine']}; MM {record.bench.matmul_rate / 1e12:.1f} TFLOP/s, "
             f"copy {record.bench.copy_rate / 1e9:.0f} GB/s"]  # fmt: skip
    for name, results in record.bench.results.items():
        for metric, verdict in results.get("verdicts", {}).items():
            bound = f"at most {verdict['at most']}" if "at most" in verdict else f"at least {verdict['at least']}"
            lines.append(f"{name:<5}{metric:<58}{verdict['value']:>9.3g}  {bound:<15}{verdict['verdict']}")
    lines += [f"{name:<5}{error}" for name, error in record.contents["errors"].items()]
    return "\n".join(lines)


def kernels_of(bench: Bench, name: str, n_rows: int = 40) -> str:
    """Return a table of the operations and kernels that take most of the time of a component or goal."""
    run_once = profiled(bench, name)
    run_once()  # compiled and warm
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if bench.on_gpu else [])]
    with profile(activities=activities) as trace:
        run_once()
    by = "self_device_time_total" if bench.on_gpu else "self_cpu_time_total"
    return trace.key_averages().table(sort_by=by, row_limit=n_rows, max_name_column_width=80)  # type: ignore[no-any-return]


def arguments() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--components", nargs="*", choices=COMPONENTS)
    parser.add_argument("--goals", nargs="*", choices=GOALS)
    parser.add_argument("--steps", type=int, default=20, help="measurements of which the median is taken")
    parser.add_argument("--json", type=Path, default=Path("runs/gpu.json"))
    parser.add_argument(
        "--profile", choices=[*COMPONENTS, *GOALS], metavar="NAME", help="write its profile instead of measuring"
    )
    parser.add_argument("--tiny", action="store_true", help="on a CPU, at sizes whose numbers mean nothing")
    return parser


def main() -> None:
    """Measure, and print the verdicts."""
    parser = arguments()
    a = parser.parse_args()
    if not a.tiny and not torch.cuda.is_available():
        parser.error("no CUDA device; --tiny runs everything on the CPU")
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    bench = tiny_bench() if a.tiny else Bench(torch.device("cuda"), n_steps=a.steps)
    a.json.parent.mkdir(parents=True, exist_ok=True)
    if a.profile:
        rates(bench)
        path = a.json.with_suffix(f".{a.profile.replace(' ', '_')}.txt")
        path.write_text(kernels_of(bench, a.profile) + "\n", encoding="utf-8")
        print(path)
        return
    both = a.components is None and a.goals is None
    record = run(bench, list(COMPONENTS) if both else a.components or [], list(GOALS) if both else a.goals or [], a.json)
    print(table(record))


if __name__ == "__main__":
    main()
