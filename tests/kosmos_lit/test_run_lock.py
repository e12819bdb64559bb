"""A run's folder belongs to one run at a time, and is free again whatever ended that run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kosmos_lit import run_lock
from kosmos_lit.errors import UserError
from kosmos_lit.run_lock import NAME, STALE, RunLock

HOLD = """
import sys, time
from kosmos_lit.run_lock import RunLock
RunLock(sys.argv[1]).acquire()
print("held", flush=True)
time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path: Path):
    """A process that holds the lock of `tmp_path`."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def changed(folder: Path, **values: object) -> None:
    path = folder / NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_a_second_run_is_refused_and_the_first_one_named(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    with pytest.raises(UserError, match=rf"another run writes to .*: process {holder.pid} on .*, last seen \d s ago"):
        RunLock(tmp_path).acquire()


def test_the_lock_of_a_killed_process_is_taken_over(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    holder.kill()
    holder.wait()

    lock = RunLock(tmp_path)
    lock.acquire()
    assert json.loads((tmp_path / NAME).read_text())["pid"] == os.getpid()
    lock.release()
    assert list(tmp_path.iterdir()) == []


def test_a_process_that_has_the_number_of_a_dead_one_holds_nothing(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    changed(tmp_path, started=1.0)
    lock = RunLock(tmp_path)
    lock.acquire()
    assert json.loads((tmp_path / NAME).read_text())["pid"] == os.getpid()
    lock.release()


def test_who_saw_a_dead_holder_takes_nothing_from_the_one_that_came_first(
    tmp_path: Path, holder: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = RunLock(tmp_path)
    before = (tmp_path / NAME).read_text()
    dead = json.loads(before) | {"started": 1.0}
    seen = [dead]  # what was there a moment ago, and then the file as it is
    read = lock._holder
    monkeypatch.setattr(lock, "_holder", lambda path=None: seen.pop() if seen and path is None else read(path))

    with pytest.raises(UserError, match=f"another run writes to .*: process {holder.pid}"):
        lock.acquire()

    assert (tmp_path / NAME).read_text() == before
    assert [path.name for path in tmp_path.iterdir()] == [NAME]


def test_a_holder_on_another_machine_counts_as_dead_without_a_sign_of_life(
    tmp_path: Path, holder: subprocess.Popen[str]
) -> None:
    changed(tmp_path, host="elsewhere")
    with pytest.raises(UserError, match=f"process {holder.pid} on elsewhere"):
        RunLock(tmp_path).acquire()

    past = time.time() - STALE - 5
    os.utime(tmp_path / NAME, (past, past))
    lock = RunLock(tmp_path)
    lock.acquire()
    lock.release()


@pytest.mark.parametrize(("restarts", "is_free"), [("1", True), ("0", False)])
def test_the_next_start_of_a_slurm_job_takes_over(
    tmp_path: Path, holder: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch, restarts: str, is_free: bool
) -> None:
    changed(tmp_path, host="elsewhere", job="1234")
    monkeypatch.setenv("SLURM_JOB_ID", "1234")
    monkeypatch.setenv("SLURM_RESTART_COUNT", restarts)
    lock = RunLock(tmp_path)
    if is_free:
        lock.acquire()
        lock.release()
    else:
        with pytest.raises(UserError, match=r"on elsewhere \(Slurm job 1234\)"):
            lock.acquire()


def test_a_stopped_holder_is_alive_on_its_own_machine(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    os.kill(holder.pid, signal.SIGSTOP)
    with pytest.raises(UserError, match=f"process {holder.pid}"):
        RunLock(tmp_path).acquire()


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"host": "x"}'])
def test_a_file_that_names_nobody_is_waited_for_and_then_taken(tmp_path: Path, content: str) -> None:
    (tmp_path / NAME).write_text(content)
    with pytest.raises(UserError, match="a process that starts now"):
        RunLock(tmp_path).acquire()

    os.utime(tmp_path / NAME, (1.0, 1.0))
    lock = RunLock(tmp_path)
    lock.acquire()
    lock.release()


def test_it_shows_signs_of_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "BEAT", 0.01)
    lock = RunLock(tmp_path)
    lock.acquire()
    os.utime(tmp_path / NAME, (1.0, 1.0))
    end = time.monotonic() + 10
    while (tmp_path / NAME).stat().st_mtime < 2 and time.monotonic() < end:
        time.sleep(0.01)
    lock.release()
    assert time.monotonic() < end


def test_what_another_one_has_taken_over_is_not_removed(tmp_path: Path) -> None:
    lock = RunLock(tmp_path)
    lock.acquire()
    changed(tmp_path, pid=1)
    lock.release()
    assert (tmp_path / NAME).exists()


def test_a_folder_that_is_none_is_the_users_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write to the run's folder"):
        RunLock(tmp_path / "file" / "run").acquire()
