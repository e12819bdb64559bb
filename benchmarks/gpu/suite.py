"""Every test marked `gpu`, by pytest in a process of its own."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.gpu.bench import Bench, Results, verdict

ROOT = Path(__file__).parents[2]
WORKERS = 6
"""pytest-xdist's processes: the tests wait for compilers more than for the GPU, which they share."""
PYTEST = "import signal, sys, pytest; signal.signal(signal.SIGINT, signal.default_int_handler); sys.exit(pytest.main())"
"""As `python -m pytest`, but interrupted by SIGINT also where that is ignored, as in commands in the background."""
GRACE = 12.0
"""Seconds that pytest has to sum up when its time is over."""
_WORD = "PASSED|FAILED|SKIPPED|ERROR|XFAIL|XPASS"
OUTCOME = re.compile(
    rf"^(?:\[gw\d+\] \[ *\d+%\] (?P<first>{_WORD}) (?P<parallel>tests/.+)|(?P<test>tests/\S+::.+?) (?P<last>{_WORD})\b.*)$"
)
"""A test's line, which pytest-xdist prints the other way round."""
REASON = re.compile(r"^(?:FAILED|ERROR) (?P<test>tests/.+?)(?: - (?P<reason>.*))?$")


def gpu_tests(bench: Bench) -> Results:
    """Run them as the suite is configured, warnings as errors; those that fail again, with warnings allowed.

    Raises: RuntimeError if pytest is missing, or if it ran no test.
    """
    if not _is_installed("pytest"):
        raise RuntimeError("pytest is not installed: no test was run")
    files = gpu_files(ROOT / "tests")
    if bench.tiny:  # without a GPU they are all skipped
        files = files[:2]
    missing = [name for name in ("xdist", "hypothesis") if not _is_installed(name)]
    parallel = [] if bench.tiny or "xdist" in missing else ["-n", str(min(WORKERS, os.cpu_count() or 1))]
    results = summed(run_pytest([*parallel, "-m", "gpu", *files], bench.left() - GRACE))
    results |= {"files": files, "missing": missing, "processes": int(parallel[1]) if parallel else 1}
    bench.report(results)
    if not any(results[outcome] for outcome in ("passed", "failed", "errors", "skipped")):
        raise RuntimeError(f"pytest ran no test: {results['end']}")
    if (failed := list(results["reasons"])[:50]) and bench.left() > 2 * GRACE:
        again = summed(run_pytest([*parallel, "-m", "gpu", "-W", "default", *failed], bench.left() - GRACE))
        results["again, with warnings allowed"] = {key: again[key] for key in ("passed", "failed", "errors", "reasons")}
    share = results["passed"] / max(1, results["passed"] + results["failed"] + results["errors"])
    # On a machine without a GPU nothing passes, and nothing fails.
    verdicts = {"share of tests that pass": verdict(share, 1.0, 1.0)} if results["passed"] or results["failed"] else {}
    return {"verdicts": verdicts, **results}


def gpu_files(folder: Path) -> list[str]:
    """Return the files with tests marked `gpu`: to collect all others would take longer, and more packages."""
    paths = sorted(path for path in folder.rglob("test_*.py") if "mark.gpu" in path.read_text(encoding="utf-8"))
    return [str(path.relative_to(folder.parent)) for path in paths]


def run_pytest(arguments: Sequence[str], seconds: float) -> list[str]:
    """Return the lines that pytest prints; when the time is over it is interrupted, and sums up what it has run."""
    command = [
        sys.executable,
        "-c",
        PYTEST,
        "-v",
        "--tb=no",
        "--no-header",
        "-rfE",
        "-p",
        "no:cacheprovider",
        "--continue-on-collection-errors",
        *arguments,
    ]
    with tempfile.TemporaryFile("w+", encoding="utf-8") as output:
        # A width at which no reason is cut off.
        environment = os.environ | {"COLUMNS": "400", "OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "4"}
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT)
        try:
            process.wait(max(1.0, seconds))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(GRACE - 2)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        output.seek(0)
        return output.read().splitlines()


def summed(lines: Iterable[str]) -> Results:
    """Return the counts of outcomes, the first line of each failure, and the last lines, from what pytest printed."""
    lines = list(lines)
    outcomes: dict[str, str] = {}
    reasons: dict[str, str] = {}
    for line in lines:
        if reason := REASON.match(line):
            reasons[reason["test"]] = reason["reason"] or ""
        elif test := OUTCOME.match(line):
            outcomes[(test["parallel"] or test["test"]).strip()] = test["first"] or test["last"]
    counts = Counter(outcomes.values())
    collection = {test: reason for test, reason in reasons.items() if "::" not in test}
    return {
        "passed": counts["PASSED"],
        "failed": counts["FAILED"],
        "skipped": counts["SKIPPED"],
        "errors": counts["ERROR"] + len(collection),
        "reasons": reasons,
        "end": [line.strip("= ") for line in lines[-3:]],
    }


def _is_installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None
