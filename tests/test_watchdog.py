"""A run that makes no progress ends with its own exit code, and says what every process did last."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from kosmos_lit.callbacks import Watchdog
from kosmos_lit.errors import UserError
from kosmos_lit.watchdog import HUNG, LAUNCHER, Watch
from tests.cli_runs import start, tiny_run

ENDLESS = ["--trainer.max_steps=1000000", "--trainer.val_check_interval=1000000"]


def limits(**more: float) -> dict[str, float]:
    return {"start": 100.0, "step": 10.0, "validation": 20.0, "evaluation": 30.0, "save": 40.0} | more


def test_each_phase_has_its_limit_and_a_step_that_of_the_usual_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("kosmos_lit.watchdog.time.monotonic", lambda: now[0])
    watch = Watch(tmp_path, 0, 1, limits(), factor=10)
    assert watch.limit == 100
    for seconds in (0.0, 0.5, 0.5, 90.0):  # one slow step changes nothing
        now[0] += seconds
        watch.enter("step", 1)
    assert watch.limit == 10
    for _ in range(9):
        now[0] += 3
        watch.enter("step", 2)
    assert watch.limit == 30
    watch.enter("save", 2)
    assert watch.limit == 40
    now[0] += 1000  # the time of a checkpoint is no step's
    watch.enter("step", 3)
    assert watch.limit == 30


@pytest.mark.parametrize("name", ["min_seconds", "factor", "save_seconds"])
def test_a_limit_that_is_no_time_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="must be positive"):
        Watchdog(**{name: 0.0})


@pytest.mark.parametrize(
    ("environment", "launcher"), [({}, None), ({"LOCAL_RANK": "0"}, None), ({"LOCAL_RANK": "1"}, "parent")]
)
def test_only_a_rank_that_another_process_has_started_may_end_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], launcher: str | None
) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    for name, value in {LAUNCHER: str(os.getppid()), **environment}.items():
        monkeypatch.setenv(name, value)

    watch = Watch(tmp_path, 0, 1, limits(), factor=10)

    assert watch._launcher == (os.getppid() if launcher else None)


def test_a_run_leaves_no_launcher_behind(trained: Path) -> None:
    assert os.environ.get(LAUNCHER) != str(os.getpid())


def _begin(folder: Path, world: Path, *more: str) -> subprocess.Popen[str]:
    """Start a run without end, and wait for its first checkpoint."""
    arguments = ["--watchdog.min_seconds=8", "--watchdog.factor=1e-3", *ENDLESS, *more]
    process = start(tiny_run("fit", folder, world, *arguments), start_new_session=True)
    deadline = time.monotonic() + 180
    while not list(folder.glob("checkpoints/*.ckpt")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return process


def _end(process: subprocess.Popen[str], family: list[psutil.Process]) -> str:
    """Wait for the end of a run and of all its processes; return what it wrote to stderr."""
    try:
        _, err = process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert not psutil.wait_procs(family, timeout=20)[1]
    return err


@pytest.mark.slow
def test_a_stopped_loader_process_ends_the_run(tmp_path: Path, tiny_world: Path) -> None:
    process = _begin(tmp_path, tiny_world, "--data.num_workers=2")
    family = psutil.Process(process.pid).children(recursive=True)
    worker = family[-1]  # the first ones are those of validation, which nothing waits for

    worker.send_signal(signal.SIGSTOP)
    err = _end(process, family)

    assert process.returncode == HUNG, err
    assert f"loader process {worker.pid} is stopped" in err
    assert "no progress for" in err
    assert "steps done" in err
    assert err.count("most recent call first") > 2  # this process's threads, and the other worker's


@pytest.mark.slow
def test_a_killed_loader_process_is_a_sentence(tmp_path: Path, tiny_world: Path) -> None:
    process = _begin(tmp_path, tiny_world, "--data.num_workers=2", "--watchdog.min_seconds=null")
    family = psutil.Process(process.pid).children(recursive=True)

    family[0].kill()
    err = _end(process, family)

    assert process.returncode == 2, err
    assert "a process of the data loader was killed" in err
    assert "Traceback" not in err


@pytest.mark.slow
@pytest.mark.parametrize("stopped", [0, 1])
def test_a_stopped_rank_ends_all_and_is_named(tmp_path: Path, tiny_world: Path, stopped: int) -> None:
    # Longer than the silence by which the others take a rank for dead.
    more = [
        "--watchdog.min_seconds=15",
        "--trainer.devices=2",
        "--trainer.strategy=ddp",
        "--data.micro_batch_rows=1",
        "--data.num_workers=1",
    ]
    process = _begin(tmp_path, tiny_world, *more)
    family = psutil.Process(process.pid).children(recursive=True)
    (child,) = [p for p in family if p.ppid() == process.pid and p.environ().get("LOCAL_RANK") == "1"]

    (child if stopped else psutil.Process(process.pid)).send_signal(signal.SIGSTOP)
    err = _end(process, family)

    # The other rank ends a rank 0 that cannot exit by itself.
    assert process.returncode == (HUNG if stopped else -signal.SIGKILL), err
    assert f"[rank {1 - stopped}] no progress for" in err
    assert f"rank {stopped}: " in err
    assert "NO SIGN OF LIFE" in err
    assert "most recent call first" in err
