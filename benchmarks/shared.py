"""The quickstart's training beside other work: as `fit` sets OpenMP up, by OpenMP's own default, and on one thread.

    python -m benchmarks.shared [--seconds 6] [--rounds 3] [--busy 0 2 4] [--spin-counts 0 2000] [--json FILE]

Each setting is one run of `fit -c configs/quickstart.yaml` in a process of its own. All runs are stopped but the one that is
measured, so that they take turns within seconds, beside the same busy processes: endless loops of Python at normal priority.
A number is the median over the rounds of the real tokens of the steps that ended in the measured seconds; a ratio is the
median of the rounds' ratios. Losses of `fit` and of OpenMP's default must agree bit for bit.
`--spin-counts` measures other values of GOMP_SPINCOUNT too.

Linux shares CPUs among sessions first (autogroup), then among the threads of each. Each run has a session of its own, and
the busy processes share one, as if they ran in another terminal; with `--apart` each has its own, and a run gets less.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from benchmarks.step import show
from kosmos_lit.batch import KosmosBatch
from kosmos_lit.checks.device import describe_device

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "configs" / "quickstart.yaml"
FIT, DEFAULT, ONE_THREAD = "fit", "OpenMP's default", "one thread"
DEFAULT_SPIN_COUNT = 300_000
"""libgomp's own (config/linux/wait.h and env.c of GCC)."""
READ_BY_OPENMP = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "OMP_NUM_THREADS")
QUIET_BAR, LOADED_BAR = 0.8, 0.5
"""Least speed of `fit`: over the default's on a quiet machine, and over one thread's beside the same busy processes."""
QUIET_GOAL, LOADED_GOAL = 0.9, 0.7
SETTLE_SECONDS = 0.5
"""Time between a change of what runs and the measurement."""
START_SECONDS = 180
"""Longest time that a run may take up to its first steps."""


class StepTimes(Callback):
    """Writes a line for every step: when it ended, by the machine's monotonic clock, its real tokens and its loss."""

    def __init__(self, path: str) -> None:
        """Set the file.

        Args:
            path: File that is written.
        """
        self.path = path

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: KosmosBatch, batch_idx: int
    ) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(f"{time.monotonic()} {batch.n_real} {float(outputs['loss']).hex()}\n")


@dataclass(frozen=True)
class Step:
    """A line of `StepTimes`."""

    ended: float
    tokens: int
    loss: str


class Run:
    """A training run that stands still except while it is measured."""

    def __init__(self, folder: Path, setting: Mapping[str, str], world: Path, config: Path) -> None:
        """Start it, and stop it after its first steps."""
        folder.mkdir()
        self.times, self.output = folder / "times", folder / "output"
        environment = {k: v for k, v in os.environ.items() if k not in READ_BY_OPENMP}
        command = [
            sys.executable,
            "main.py",
            "fit",
            "-c",
            str(config),
            "--trainer.default_root_dir",
            str(folder / "run"),
            "--data.world.path",
            str(world),
            "--trainer.max_steps=1000000",
            "--trainer.num_sanity_val_steps=0",
            "--trainer.val_check_interval=1000000",
            "--trainer.callbacks+=benchmarks.shared.StepTimes",
            f"--trainer.callbacks.path={self.times}",
        ]
        with self.output.open("wb") as output:
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment | dict(setting),
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a group, so that signals reach the loader's process too
            )
        started = time.monotonic()
        while len(self.steps()) < 3:
            if self.process.poll() is not None or time.monotonic() - started > START_SECONDS:
                self.end()
                tail = self.output.read_text(encoding="utf-8")[-2000:]
                raise RuntimeError(f"the run did not get to its first steps:\n{tail}")
            time.sleep(0.1)
        self._signal(signal.SIGSTOP)

    def _signal(self, number: signal.Signals) -> None:
        os.killpg(self.process.pid, number)

    def end(self) -> None:
        """Kill the run with all its processes."""
        with suppress(ProcessLookupError):  # it has ended
            self._signal(signal.SIGKILL)
        self.process.wait()

    def steps(self) -> list[Step]:
        """Return the steps that have ended."""
        if not self.times.exists():
            return []
        lines = [line for line in self.times.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
        return [Step(float(ended), int(tokens), loss) for ended, tokens, loss in map(str.split, lines)]

    def tokens_per_second(self, seconds: float) -> float:
        """Let the run train for some seconds, and return its speed."""
        self._signal(signal.SIGCONT)
        time.sleep(SETTLE_SECONDS)
        begins = time.monotonic()
        time.sleep(seconds)
        ends = time.monotonic()
        self._signal(signal.SIGSTOP)
        steps = self.steps()
        tokens = sum(step.tokens for step in steps if begins < step.ended <= ends)
        return (tokens or steps[-1].tokens) / (ends - begins)  # where no step ended, its speed is less than of one


@contextmanager
def busy_processes(n: int, *, apart: bool) -> Iterator[None]:
    """Keep CPUs busy with processes in one session, or each in its own."""
    command = [sys.executable, "-c", "while True: pass"]
    processes = [subprocess.Popen(command, start_new_session=apart) for _ in range(n)]
    try:
        time.sleep(SETTLE_SECONDS)
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def same_losses(first: Sequence[Step], second: Sequence[Step]) -> int:
    """Return the number of steps that both runs took; RuntimeError if a loss differs in a bit."""
    for number, (one, other) in enumerate(zip(first, second, strict=False)):
        if one.loss != other.loss:
            values = f"{float.fromhex(one.loss)} and {float.fromhex(other.loss)}"
            raise RuntimeError(f"the losses of step {number} differ: {values}")
    return min(len(first), len(second))


def table(
    speeds: Mapping[tuple[str, int], Sequence[float]], settings: Sequence[str], busy: Sequence[int]
) -> list[dict[str, Any]]:
    """Return a line for each setting and number of busy processes: medians of the speed, and of its ratios by round."""
    lines = []
    for n in busy:
        for name in settings:
            own = speeds[name, n]
            line: dict[str, Any] = {"busy processes": n, "setting": name, "tokens/s": round(statistics.median(own))}
            for reference in (DEFAULT, ONE_THREAD):
                ratios = [speed / other for speed, other in zip(own, speeds[reference, n], strict=True)]
                line[f"over {reference}"] = round(statistics.median(ratios), 2)
            lines.append(line)
    return lines


def verdicts(lines: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return what `fit` reaches of what it must, by number of busy processes."""
    results = []
    for line in lines:
        if line["setting"] == FIT:
            n = line["busy processes"]
            reference, bar, goal = (ONE_THREAD, LOADED_BAR, LOADED_GOAL) if n else (DEFAULT, QUIET_BAR, QUIET_GOAL)
            ratio = line[f"over {reference}"]
            verdict = "goal" if ratio >= goal else "ok" if ratio >= bar else "MISSED"
            results.append(
                {
                    "busy processes": n,
                    "fit over": reference,
                    "ratio": ratio,
                    "bar": bar,
                    "goal": goal,
                    "verdict": verdict,
                }
            )
    return results


def run(
    folder: Path,
    world: Path,
    config: Path,
    *,
    busy: Sequence[int],
    spin_counts: Sequence[int],
    seconds: float,
    n_rounds: int,
    apart: bool = False,
) -> dict[str, Any]:
    """Measure runs of `config` on a drawn world, each in a folder in `folder`; print tables and return the results."""
    settings: dict[str, dict[str, str]] = {
        FIT: {},
        DEFAULT: {"GOMP_SPINCOUNT": str(DEFAULT_SPIN_COUNT)},
        ONE_THREAD: {"OMP_NUM_THREADS": "1"},
    }
    settings |= {f"GOMP_SPINCOUNT={n}": {"GOMP_SPINCOUNT": str(n)} for n in spin_counts}
    results: dict[str, Any] = {
        "machine": describe_device(torch.device("cpu")),
        "seconds": seconds,
        "rounds": n_rounds,
        "apart": apart,
        "load average before": round(os.getloadavg()[0], 2),  # with other work 0 busy processes are not quiet
    }
    print("; ".join(f"{name} {value}" for name, value in results.items()), flush=True)
    speeds: dict[tuple[str, int], list[float]] = {(name, n): [] for n in busy for name in settings}
    with ExitStack() as stack:
        runs: dict[str, Run] = {}
        for number, (name, setting) in enumerate(settings.items()):
            runs[name] = Run(folder / str(number), setting, world, config)
            stack.callback(runs[name].end)
        for number in range(n_rounds):
            for n in busy:
                with busy_processes(n, apart=apart):
                    for name in list(runs) if number % 2 == 0 else list(runs)[::-1]:
                        speeds[name, n].append(runs[name].tokens_per_second(seconds))
        results["equal losses"] = same_losses(runs[FIT].steps(), runs[DEFAULT].steps())
    results["speeds"] = table(speeds, list(settings), busy)
    results["verdicts"] = verdicts(results["speeds"])
    show(results["speeds"])
    show(results["verdicts"])
    print(f"losses of {results['equal losses']} steps are the same bit for bit with {FIT}'s setting and {DEFAULT}")
    return results


def main() -> int:
    """Print the tables; return 1 if `fit` is slower than it must be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--busy", type=int, nargs="+", default=[0, 2, 4], help="numbers of busy processes")
    parser.add_argument("--spin-counts", type=int, nargs="*", default=[], help="further values of GOMP_SPINCOUNT")
    parser.add_argument("--apart", action="store_true", help="each busy process in a session of its own")
    parser.add_argument("--seconds", type=float, default=6.0, help="measured per setting, busy processes and round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--world", type=Path, default=Path("runs/quickstart/world"), help="drawn, if it is not there")
    parser.add_argument("--json", type=Path, help="where the results are written too")
    a = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the runs end too
    with tempfile.TemporaryDirectory() as folder:
        results = run(
            Path(folder),
            a.world.absolute(),
            CONFIG,
            busy=a.busy,
            spin_counts=a.spin_counts,
            seconds=a.seconds,
            n_rounds=a.rounds,
            apart=a.apart,
        )
    if a.json:
        a.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return int(any(verdict["verdict"] == "MISSED" for verdict in results["verdicts"]))


if __name__ == "__main__":
    sys.exit(main())
