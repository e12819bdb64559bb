"""The shipped scripts on a real Slurm of two virtual nodes, with gloo."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from kosmos_lit.checkpoint import load_checkpoint
from tests.cli_runs import ROOT, TINY, losses
from tests.slurm_cluster import Cluster, NoClusterError

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("slurm"), pytest.mark.timeout(1800)]
SMALL = ["--gpus-per-node=0", "--cpus-per-task=1"]
N_STEPS = 40


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    try:
        with Cluster() as started:
            started.environment |= {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
            for name in ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_PORT", "PYTEST_XDIST_WORKER"):
                started.environment.pop(name, None)
            yield started
    except NoClusterError as reason:
        pytest.skip(str(reason))


@pytest.fixture
def submit(cluster: Cluster, tmp_path: Path) -> Iterator[Callable[..., str]]:
    """Submit a script with options and arguments; return the job's number. All jobs are cancelled in the end."""
    jobs = []

    def call(script: str, *arguments: str, options: tuple[str, ...] = ()) -> str:
        command = ["sbatch", "--parsable", f"--chdir={ROOT}", f"--output={tmp_path}/%j.out", *SMALL, *options]
        jobs.append(cluster.call(*command, str(ROOT / "slurm" / script), *arguments).strip())
        return jobs[-1]

    yield call
    for job in jobs:
        cluster.call("scancel", "--full", "--signal=KILL", job, check=False)
        cluster.call("scancel", job, check=False)


def arguments(world: Path) -> list[str]:
    """Return a run's arguments as slurm/train.sbatch takes them, without the folder."""
    more = ["--trainer.strategy=ddp", "--data.micro_batch_rows=1", "--data.num_workers=1", f"--data.world.path={world}"]
    return ["-c", TINY, *more, f"--trainer.max_steps={N_STEPS}", "--trainer.val_check_interval=100000"]


def tasks(run: Path) -> list[psutil.Process]:
    """Return the processes of a run's ranks on this machine."""
    ranks = []
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if "main.py" in words and str(run) in words and "srun" not in words[0]:
            ranks.append(process)
    return [p for p in ranks if p.ppid() not in {q.pid for q in ranks}]  # the others are the loader's


def wait_for_checkpoint(run: Path, after: int, seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while max([0, *(int(p.stem[5:]) for p in run.glob("checkpoints/step=*.ckpt"))]) <= after:
        assert time.monotonic() < end, "no new checkpoint"
        time.sleep(0.2)


def newest(run: Path) -> int:
    return max(int(p.stem[5:]) for p in run.glob("checkpoints/step=*.ckpt"))


def test_a_run_that_everything_happens_to_is_the_undisturbed_one(
    cluster: Cluster, submit: Callable[..., str], tmp_path: Path, tiny_world: Path
) -> None:
    two = ("--nodes=2", "--ntasks-per-node=1")
    straight, run = tmp_path / "straight", tmp_path / "run"
    job = submit("train.sbatch", str(straight), *arguments(tiny_world), options=two)
    assert cluster.wait(job, "COMPLETED FAILED", 300)["ExitCode"] == "0:0", (tmp_path / f"{job}.out").read_text()

    # SIGUSR1, as before a time limit: all save, and the job is queued again.
    job = submit("train.sbatch", str(run), *arguments(tiny_world), options=two)
    log = tmp_path / f"{job}.out"
    wait_for_checkpoint(run, 0)
    cluster.call("scancel", "--signal=USR1", job)
    assert cluster.wait(job, "PENDING", 90)["Restarts"] == "1", log.read_text()
    stopped_at = newest(run)
    assert "exit code 85, " in log.read_text()
    assert f"SIGUSR1: ended after step {stopped_at}" in log.read_text()

    # A task that is killed ends the job within a minute, and the log says so.
    cluster.call("scontrol", "update", f"JobId={job}", "StartTime=now", check=False)
    cluster.wait(job, "RUNNING", 200)
    wait_for_checkpoint(run, stopped_at)
    assert f"from {run}/checkpoints/step={stopped_at:08d}.ckpt" in log.read_text()
    killed_at = time.monotonic()
    tasks(run)[0].send_signal(signal.SIGKILL)
    assert cluster.wait(job, "FAILED COMPLETED", 90)["JobState"] == "FAILED"
    assert time.monotonic() - killed_at < 60
    assert "Killed" in log.read_text()

    # SIGTERM, as of scancel: all save, and the job ends.
    job = submit("train.sbatch", str(run), *arguments(tiny_world), options=two)
    log, before = tmp_path / f"{job}.out", newest(run)
    wait_for_checkpoint(run, before)
    cluster.call("scancel", "--signal=TERM", job)
    ended = cluster.wait(job, "FAILED COMPLETED CANCELLED PENDING", 90)
    assert (ended["JobState"], ended["ExitCode"]) == ("FAILED", "143:0"), log.read_text()
    assert f"SIGTERM: ended after step {newest(run)}" in log.read_text()

    job = submit("train.sbatch", str(run), *arguments(tiny_world), options=two)
    assert cluster.wait(job, "COMPLETED FAILED", 300)["ExitCode"] == "0:0", (tmp_path / f"{job}.out").read_text()
    logged, expected = losses(run), losses(straight)
    # The step behind the checkpoint at which the task was killed may be missing.
    assert logged == {step: expected[step] for step in logged}
    assert len(logged) >= N_STEPS - 2
    name = f"checkpoints/step={N_STEPS:08d}.ckpt"
    one, other = (load_checkpoint(folder / name)["state_dict"] for folder in (straight, run))
    assert all(one[key].equal(other[key]) for key in one)


def test_a_run_that_stands_still_is_not_queued_for_ever(
    cluster: Cluster, submit: Callable[..., str], tmp_path: Path, tiny_world: Path
) -> None:
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\nexit 85\n")
    script.chmod(0o755)
    run = tmp_path / "run"
    run.mkdir()
    (run / "stalls").write_text("2\n")

    job = submit("train.sbatch", str(run), options=("--ntasks-per-node=1", f"--export=ALL,PYTHON={script}"))

    ended = cluster.wait(job, "FAILED COMPLETED", 60)
    assert (ended["JobState"], ended["ExitCode"]) == ("FAILED", "85:0")
    assert "not requeued: no new checkpoint in 3 starts" in (tmp_path / f"{job}.out").read_text()


def test_runs_of_an_array_are_lines_of_a_file(
    cluster: Cluster, submit: Callable[..., str], tmp_path: Path, tiny_world: Path
) -> None:
    runs = tmp_path / "runs.txt"
    more = ["-c", TINY, f"--data.world.path={tiny_world}", "--trainer.max_steps=2"]
    runs.write_text("".join(" ".join([str(tmp_path / n), *more, "--seed_everything", n]) + "\n" for n in ("1", "2")))

    job = submit("array.sbatch", str(runs), options=("--array=1-2", f"--output={tmp_path}/%A_%a.out"))

    for n in ("1", "2"):
        log = tmp_path / f"{job}_{n}.out"
        assert cluster.wait(f"{job}_{n}", "COMPLETED FAILED", 240)["JobState"] == "COMPLETED", log.read_text()
        assert newest(tmp_path / n) == 2


def test_a_corpus_is_prepared(cluster: Cluster, submit: Callable[..., str], tmp_path: Path, tiny_world: Path) -> None:
    options = ["--format", "jsonl", "--input", f"{tiny_world}/text-*.jsonl.zst", "--tokenizer", f"{tiny_world}/tokenizer"]

    job = submit("prepare.sbatch", *options, "--output", str(tmp_path / "index"), options=("--cpus-per-task=2",))

    log = tmp_path / f"{job}.out"
    assert cluster.wait(job, "COMPLETED FAILED", 240)["JobState"] == "COMPLETED", log.read_text()
    assert (tmp_path / "index").is_dir()
    assert "shards" in log.read_text()  # plain lines of progress


def srun(cluster: Cluster, world: Path, run: Path, *more: str, options: tuple[str, ...] = (), **environment: str) -> str:
    """Run `fit` as two tasks of two nodes, which must fail; return what it printed."""
    command = ["srun", "--kill-on-bad-exit=1", f"--chdir={ROOT}", "--nodes=2", "--ntasks-per-node=1", *SMALL, *options]
    command += [sys.executable, "main.py", "fit", *arguments(world), f"--trainer.default_root_dir={run}", *more]
    end = subprocess.run(command, env=cluster.environment | environment, text=True, capture_output=True, timeout=120)
    # srun's code is the highest one, and it ends the other task, by force if that waits in the library for its peer.
    assert end.returncode in (2, 143, 137), end.stdout + end.stderr
    assert "Traceback" not in end.stderr
    return end.stderr


def test_what_would_make_tasks_wait_for_ever_is_a_sentence(cluster: Cluster, tiny_world: Path, tmp_path: Path) -> None:
    nodes = "--trainer.num_nodes=2"
    assert "Slurm started 2 tasks, but trainer.num_nodes x trainer.devices are 2 x 2" in srun(
        cluster, tiny_world, tmp_path / "a", nodes, "--trainer.devices=2", options=("--ntasks=2",)
    )
    for name in ("bash", "interactive"):
        assert f"the Slurm job is called '{name}'" in srun(
            cluster, tiny_world, tmp_path / "b", nodes, options=(f"--job-name={name}",)
        )
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = str(other.getsockname()[1])
        assert f"port {port}, at which the ranks meet, cannot be used" in srun(
            cluster, tiny_world, tmp_path / "c", nodes, MASTER_PORT=port
        )
    assert "the address of rank 0, n1.nowhere.invalid, is unknown here" in srun(
        cluster, tiny_world, tmp_path / "d", nodes, MASTER_ADDR="n1.nowhere.invalid"
    )


def test_a_job_without_srun_is_a_sentence(
    cluster: Cluster, submit: Callable[..., str], tmp_path: Path, tiny_world: Path
) -> None:
    script = tmp_path / "wrong.sbatch"
    command = " ".join([sys.executable, "main.py", "fit", *arguments(tiny_world), "--trainer.num_nodes=2"])
    script.write_text(f"#!/bin/bash\n{command} --trainer.default_root_dir={tmp_path / 'run'}\n")

    job = submit(str(script), options=("--nodes=2", "--ntasks-per-node=1"))

    assert cluster.wait(job, "FAILED COMPLETED", 90)["ExitCode"] == "2:0"
    assert "put srun before it" in (tmp_path / f"{job}.out").read_text()
