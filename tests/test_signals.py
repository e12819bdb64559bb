"""Signals end a run as one: after the same step on all ranks, with a checkpoint, and with a code that says why."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import yaml

from kosmos_lit.checkpoint import load_checkpoint
from kosmos_lit.cli import main
from kosmos_lit.interruption import PATIENCE, Interruption
from tests.cli_runs import TINY, losses, start, tiny_run
from tests.ranks import on_ranks

CODES = {"SIGINT": 130, "SIGTERM": 143, "SIGUSR1": 85}
DDP = ["--trainer.strategy=ddp"]
FSDP2 = ["-c", "configs/trainer/fsdp.yaml", "--trainer.accelerator=cpu", "--trainer.precision=32-true"]
FSDP1 = ["-c", "configs/trainer/fsdp1.yaml", "--trainer.accelerator=cpu", "--trainer.precision=32-true"]


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    """Put back the handlers of signals, which a run that ended at one leaves ignored."""
    handlers = {getattr(signal, name): signal.getsignal(getattr(signal, name)) for name in CODES}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def sending(folder: Path, name: str, *signals: str, **more: object) -> list[str]:
    """Return the arguments that make a run send itself signals; see `SendSignals`."""
    callbacks = yaml.safe_load(Path(TINY).read_text(encoding="utf-8"))["trainer"]["callbacks"]
    init_args = {"signals": list(signals), **more}
    callbacks.append({"class_path": "tests.recording_callbacks.SendSignals", "init_args": init_args})
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump({"trainer": {"callbacks": callbacks}}), encoding="utf-8")
    return ["-c", str(path)]


def steps_of(folder: Path) -> list[int]:
    return sorted(int(path.stem[5:]) for path in (folder / "checkpoints").iterdir())


def assert_same(one: Path, other: Path) -> None:
    """Two runs have the same losses, each step once, and the same last weights."""
    assert losses(one) == losses(other)
    states = [load_checkpoint(folder / "checkpoints/step=00000006.ckpt")["state_dict"] for folder in (one, other)]
    assert all(states[0][key].equal(states[1][key]) for key in states[0])


@pytest.mark.parametrize("name", CODES)
def test_a_signal_ends_a_run_after_its_step_and_it_goes_on_as_if_undisturbed(
    trained: Path, tmp_path: Path, tiny_world: Path, name: str
) -> None:
    arguments = tiny_run("fit", tmp_path / "run", tiny_world)

    try:
        code = main([*arguments, *sending(tmp_path, "send", name, batch=8)])  # the second micro-batch of step 4
    except SystemExit as end:
        code = end.code  # type: ignore[assignment]
    assert code == CODES[name]
    assert steps_of(tmp_path / "run") == [3, 4]

    assert main([*arguments, "--ckpt_path=last"]) == 0
    assert_same(trained, tmp_path / "run")


def test_the_gravest_of_several_signals_counts_and_repeated_ones_change_nothing(
    tmp_path: Path, tiny_world: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    signals = ["SIGUSR1", "SIGTERM", "SIGTERM", "SIGUSR1"]
    with pytest.raises(SystemExit) as end:
        main([*tiny_run("fit", tmp_path / "run", tiny_world), *sending(tmp_path, "send", *signals, batch=4)])

    assert end.value.code == 143
    assert steps_of(tmp_path / "run") == [2]
    assert capfd.readouterr().err.count("ending this step") == 1


def test_a_signal_in_a_validation_ends_it_after_its_batch(trained: Path, tmp_path: Path, tiny_world: Path) -> None:
    arguments = tiny_run("fit", tmp_path / "run", tiny_world)

    with pytest.raises(SystemExit) as end:
        main([*arguments, *sending(tmp_path, "send", "SIGTERM", hook="on_validation_batch_start")])
    assert end.value.code == 143
    assert steps_of(tmp_path / "run") == [3]

    assert main([*arguments, "--ckpt_path=last"]) == 0
    assert_same(trained, tmp_path / "run")


def test_a_second_ctrl_c_ends_at_once_when_it_is_a_second_one(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("kosmos_lit.interruption.time.monotonic", lambda: now[0])
    before = signal.getsignal(signal.SIGINT)
    with Interruption() as interruption:
        interruption.defer()
        signal.raise_signal(signal.SIGINT)
        now[0] += PATIENCE
        signal.raise_signal(signal.SIGINT)  # the launcher's, beside the terminal's
        assert interruption.agreed() == signal.SIGINT
        now[0] += 0.1
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGUSR1", 85)])
def test_a_signal_outside_training_ends_at_once(name: str, code: int) -> None:
    with Interruption(), pytest.raises(SystemExit) as end:
        signal.raise_signal(getattr(signal, name))
    assert end.value.code == code


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "strategy"), [(2, DDP), (2, FSDP1), (2, FSDP2), (4, FSDP2)], ids=["ddp", "fsdp1", "fsdp2", "fsdp2-4"]
)
def test_a_signal_on_any_rank_ends_all_after_the_same_step(
    tmp_path: Path, tiny_world: Path, ranks: int, strategy: list[str]
) -> None:
    shared = [*strategy, f"--trainer.devices={ranks}", "--data.micro_batch_rows=1"]
    last = ranks - 1
    n = 4 // ranks  # micro-batches of a step
    moments = {
        "term": ("SIGTERM", {"rank": last, "batch": 1 + n}),
        "usr1": ("SIGUSR1", {"rank": 0, "batch": 4 * n}),
        "int": ("SIGINT", {"rank": last, "batch": 5 * n}),
        "validating": ("SIGTERM", {"rank": last, "hook": "on_validation_batch_start"}),
    }
    commands, codes = [tiny_run("fit", tmp_path / "straight", tiny_world, *shared)], [0]
    for name, (number, more) in moments.items():
        arguments = tiny_run("fit", tmp_path / name, tiny_world, *shared)
        commands += [[*arguments, *sending(tmp_path, name, number, **more)], [*arguments, "--ckpt_path=last"]]
        codes += [CODES[number], 0]

    output = on_ranks(ranks, commands, tmp_path / "log", codes=codes)

    for name, step in zip(moments, (2, 4, 5, 3), strict=True):
        assert f"ended after step {step}, checkpoint {tmp_path / name}" in output
        assert_same(tmp_path / "straight", tmp_path / name)
    assert "Traceback" not in output


@pytest.mark.slow
@pytest.mark.parametrize("everybody", [False, True])
def test_ranks_that_a_run_has_started_end_with_it(tmp_path: Path, tiny_world: Path, everybody: bool) -> None:
    endless = ["--trainer.max_steps=100000", "--trainer.val_check_interval=100000", "--data.num_workers=1"]
    more = [*DDP, "--trainer.devices=2", "--data.micro_batch_rows=1", *endless]
    process = start(tiny_run("fit", tmp_path, tiny_world, *more), start_new_session=True)
    deadline = time.monotonic() + 120
    while not (tmp_path / "checkpoints").exists() or not any((tmp_path / "checkpoints").iterdir()):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    family = psutil.Process(process.pid).children(recursive=True)
    (rank,) = [p for p in family if p.environ().get("LOCAL_RANK") == "1" and p.ppid() == process.pid]

    if everybody:  # as Slurm does, to the loader's processes too
        os.killpg(process.pid, signal.SIGTERM)
    else:
        rank.send_signal(signal.SIGTERM)
    try:
        _, err = process.communicate(timeout=150)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise

    assert process.returncode == 143, err
    assert "Traceback" not in err
    assert not psutil.wait_procs(family, timeout=10)[1]
