"""Runs parts in a process of their own, and writes one JSON file after each: whatever ends that process, its results stay.

The worker holds the device. It reports as it goes; a worker that dies, hangs beyond a part's limit, or has lost its device
(after an illegal access all later calls of CUDA fail) costs the part that it was in, and another one takes the parts that
are left. Deadlines are those of `time.monotonic()`, one clock for all processes of a machine.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import pkgutil
import platform
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.gpu.parts import Part

MARGIN = 3.0
"""Seconds before the deadline when everything is cut, to write the file and to end processes."""
NOT_STARTED = "not started"


@dataclass(frozen=True)
class Settings:
    """What a worker is told."""

    tiny: bool
    n_steps: int
    profile: bool
    deadline: float
    """`time.monotonic()` when everything must have ended."""
    tables: Path | None
    rates: dict[str, float] = field(default_factory=dict)
    """Yardsticks that an earlier worker measured."""


class Record:
    """The file of results. Each part has a status: done, failed, cut, skipped or not started, with the reason."""

    def __init__(self, path: Path, parts: Sequence[str], **about: Any) -> None:
        self.path = path
        self.contents: dict[str, Any] = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": sys.argv,
            **about,
            "machine": {},
            "rates": {},
            "status": dict.fromkeys(parts, NOT_STARTED),
            "results": {},
        }

    def write(self) -> None:
        """Replace the file as a whole."""
        text = json.dumps(plain(self.contents), indent=1, allow_nan=False) + "\n"
        temporary = self.path.with_name(self.path.name + ".part")
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(self.path)


def plain(value: Any) -> Any:
    """Return data as strict JSON has it, which knows neither NaN nor infinity: these become words."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if hasattr(value, "item"):  # of numpy and torch
        return plain(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, str | int | float | None) else str(value)


def merged(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Return a table with the values of another one put in, table by table."""
    both = {k: merged(old[k], v) for k, v in new.items() if isinstance(v, dict) and isinstance(old.get(k), dict)}
    return {**old, **new, **both}


# ---- this process


def supervise(parts: Mapping[str, Part], settings: Settings, record: Record) -> None:
    """Measure parts in order; the record is written after each, and when anything ends the run.

    Raises: LookupError if there is no device; SystemExit on SIGTERM and SIGINT, after the record is written.
    """
    # SIGINT too: a shell that starts a command in the background has it ignore that signal.
    before = {number: signal.signal(number, _exit_by) for number in (signal.SIGTERM, signal.SIGINT)}
    remaining = list(parts)
    try:
        while remaining and settings.deadline - time.monotonic() > MARGIN:
            known = Settings(**(vars(settings) | {"rates": record.contents["rates"]}))
            remaining = _one_worker({name: parts[name] for name in remaining}, known, record)
        for name in remaining:
            record.contents["status"][name] = "skipped: no time is left"
    except SystemExit:
        record.contents["status"]["run"] = "interrupted by a signal"
        record.write()
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    record.write()


def _exit_by(number: int, _: Any) -> None:
    raise SystemExit(128 + number)


def _one_worker(parts: Mapping[str, Part], settings: Settings, record: Record) -> list[str]:
    """Let one worker measure parts until it has ended; return those that it has not come to."""
    context = multiprocessing.get_context("spawn")  # a fork would share a state of CUDA
    ours, theirs = context.Pipe(duplex=False)
    worker = context.Process(target=work, args=(theirs, dict(parts), settings))
    worker.start()
    theirs.close()
    state, results, remaining = record.contents["status"], record.contents["results"], list(parts)
    name, begun, end = "", time.monotonic(), settings.deadline - MARGIN
    reason = ""
    try:
        while remaining:
            if not ours.poll(max(0.0, end - time.monotonic())):
                reason = f"cut after {time.monotonic() - begun:.0f} s"
                break
            try:
                kind, content = ours.recv()
            except EOFError:
                worker.join(5)
                reason = f"failed: its process ended with exit code {worker.exitcode}"
                break
            match kind:
                case "machine":
                    record.contents["machine"] = content
                case "no device":
                    raise LookupError(content)
                case "began":
                    name, begun = content, time.monotonic()
                    end = min(settings.deadline - MARGIN, begun + parts[name].limit)
                    state[name] = "running"
                    print(f"{name} ({parts[name].what}) ...", flush=True)
                case "so far":
                    results[name] = merged(results.get(name, {}), content)
                case "skipped":
                    state[content[0]] = f"skipped: {content[1]}"
                    remaining.remove(content[0])
                case "done":
                    results[name], record.contents["rates"] = content
                    state[name] = "done"
                    remaining.remove(name)
                    end = settings.deadline - MARGIN
                    for line in verdict_lines(name, results[name]):
                        print(f"  {line}", flush=True)
                case "failed":
                    state[name], has_lost_device = f"failed: {content[0]}", content[1]
                    remaining.remove(name)
                    end = settings.deadline - MARGIN
                    print(f"  {state[name]}", flush=True)
                    if has_lost_device:
                        break  # the worker ends itself
            record.write()
    finally:
        if name and state[name] == "running":
            state[name] = reason or "cut: the run was interrupted"
            print(f"  {state[name]}", flush=True)
            remaining.remove(name)
        elif reason and remaining:  # before the first part, or between two: not to be tried for ever
            state[remaining[0]] = f"{reason} before it began"
            remaining.pop(0)
        ours.close()
        _end(worker)
    return remaining


def _end(worker: Any) -> None:
    """End a worker with all processes that it has started."""
    worker.join(1 if worker.exitcode is None else 0)
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(worker.pid, signal.SIGKILL)  # its group lives on while a process in it does
    worker.kill()
    worker.join()


# ---- the worker


def work(connection: Connection, parts: Mapping[str, Part], settings: Settings) -> None:
    """Measure parts in order, and report: runs in a process of its own."""
    os.setsid()  # a group of processes, which ends as one
    import torch

    from benchmarks.gpu.bench import Bench, first_line, is_fatal, tiny_bench

    if not settings.tiny and not torch.cuda.is_available():
        connection.send(("no device", "no CUDA device; --tiny runs everything on the CPU"))
        return
    bench = tiny_bench() if settings.tiny else Bench(torch.device("cuda"), n_steps=settings.n_steps)
    bench.always_profiles, bench.tables = settings.profile, settings.tables
    bench.matmul_rate = settings.rates.get("MM, TFLOP/s", math.nan) * 1e12
    bench.copy_rate = settings.rates.get("copy, GB/s", math.nan) * 1e9
    bench.report = lambda results: connection.send(("so far", plain(results)))
    connection.send(("machine", describe(bench)))
    for name, part in parts.items():
        left = settings.deadline - MARGIN - time.monotonic()
        expected = part.seconds * (0.02 if bench.tiny else 1)
        if left < expected:
            connection.send(("skipped", (name, f"it takes about {expected:.0f} s, and {left:.0f} s are left")))
            continue
        connection.send(("began", name))
        begun = time.monotonic()
        bench.part, bench.end = name, begun + min(left, part.limit)
        try:
            results = pkgutil.resolve_name(part.function)(bench)
        except Exception as error:  # noqa: BLE001  # one failure must not cost the other results
            traceback.print_exc()
            connection.send(("failed", (first_line(error), is_fatal(error))))
            if is_fatal(error):
                return
            del error
        else:
            rates = {"MM, TFLOP/s": bench.matmul_rate / 1e12, "copy, GB/s": bench.copy_rate / 1e9}
            took = {"took, s": round(time.monotonic() - begun, 1)}
            connection.send(("done", (plain(results | rates | took), rates)))
        bench.free()


def describe(bench: Any) -> dict[str, object]:
    """Return what a figure depends on beside the code."""
    import torch

    from kosmos_lit.checks.device import describe_device

    about: dict[str, object] = {
        "device": describe_device(bench.device),
        "torch": torch.__version__,
        "CUDA": torch.version.cuda,
        "Python": platform.python_version(),
        "cores": os.cpu_count(),
        "driver": None,
        "xformers": None,
    }
    with suppress(metadata.PackageNotFoundError):
        about["xformers"] = metadata.version("xformers")
    if bench.on_gpu:
        properties = torch.cuda.get_device_properties(bench.device)
        about["memory, bytes"], about["capability"] = properties.total_memory, f"{properties.major}.{properties.minor}"
        with suppress(OSError, subprocess.SubprocessError):
            query = ["nvidia-smi", "--query-gpu=driver_version,name", "--format=csv,noheader"]
            about["driver"] = subprocess.run(query, text=True, capture_output=True, timeout=20, check=True).stdout.strip()
    return about


def verdict_lines(name: str, results: Mapping[str, Any]) -> list[str]:
    """Return one line for each verdict of a part."""
    lines = []
    for metric, v in results.get("verdicts", {}).items():
        bound = f"at most {v['at most']}" if "at most" in v else f"at least {v['at least']}"
        lines.append(f"{name:<10}{metric:<52}{float(v['value']):>9.3g}  {bound:<15}{v['verdict']}")
    return lines
