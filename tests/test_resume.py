"""A run that is killed and resumed is the run that was not."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch

from kosmos_lit.checkpoint import load_checkpoint
from kosmos_lit.cli import main
from tests.running import losses, run, start, tiny_run

STEPS = ["--trainer.max_steps=23", "--trainer.val_check_interval=7", "--data.num_workers=1"]


def weights(folder: Path, step: int) -> dict[str, torch.Tensor]:
    return load_checkpoint(folder / "checkpoints" / f"step={step:08d}.ckpt")["state_dict"]  # type: ignore[no-any-return]


def assert_same(one: Path, other: Path, step: int) -> None:
    assert losses(one) == losses(other)
    a, b = weights(one, step), weights(other, step)
    assert a.keys() == b.keys()
    assert [k for k in a if not torch.equal(a[k], b[k])] == []


def test_a_run_in_two_parts_equals_one_run(trained: Path, tmp_path: Path, tiny_world: Path) -> None:
    assert main(tiny_run("fit", tmp_path, tiny_world, "--trainer.max_steps=4")) == 0
    assert main(tiny_run("fit", tmp_path, tiny_world, "--ckpt_path=last")) == 0

    assert_same(tmp_path, trained, 6)


@pytest.mark.parametrize("micro_batch_rows", [1, 4])
def test_a_run_goes_on_with_other_micro_batches(tmp_path: Path, tiny_world: Path, micro_batch_rows: int) -> None:
    rates = ["decoder.dropout_rate", "decoder.attention_dropout_rate", "connector.attention_dropout_rate"]
    plain = [f"--model.kosmos.{name}=0" for name in rates]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main(tiny_run("fit", whole, tiny_world, *plain)) == 0
    assert main(tiny_run("fit", parts, tiny_world, *plain, "--trainer.max_steps=3")) == 0

    more = ["--ckpt_path=last", f"--data.micro_batch_rows={micro_batch_rows}"]
    assert main(tiny_run("fit", parts, tiny_world, *plain, *more)) == 0

    # fp32 sums in another order: measured 2e-6
    assert list(map(float, losses(parts).values())) == pytest.approx(list(map(float, losses(whole).values())), rel=2e-5)


def test_a_checkpoint_is_named_after_its_own_step(tmp_path: Path, tiny_world: Path) -> None:
    assert main(tiny_run("fit", tmp_path, tiny_world, "--trainer.log_every_n_steps=2")) == 0

    for path in (tmp_path / "checkpoints").iterdir():
        assert path.name == f"step={load_checkpoint(path)['global_step']:08d}.ckpt"


def test_a_resumed_run_uses_its_own_optimizer_settings(tmp_path: Path, tiny_world: Path) -> None:
    assert main(tiny_run("fit", tmp_path, tiny_world, "--trainer.max_steps=3")) == 0

    more = ["--ckpt_path=last", "--model.optimizer.lr=1e-4", "--model.optimizer.weight_decay=0.5"]
    assert main(tiny_run("fit", tmp_path, tiny_world, *more)) == 0

    checkpoint = load_checkpoint(tmp_path / "checkpoints" / "step=00000006.ckpt")
    group = checkpoint["optimizer_states"][0]["param_groups"][0]
    assert group["weight_decay"] == 0.5
    assert group["lr"] < 1e-4


def test_a_run_whose_gradient_is_not_finite_ends_and_keeps_its_checkpoints(
    tmp_path: Path, tiny_world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(tiny_run("fit", tmp_path, tiny_world, "--trainer.max_steps=3")) == 0
    before = {p.name: p.read_bytes() for p in (tmp_path / "checkpoints").iterdir()}

    code = main(tiny_run("fit", tmp_path, tiny_world, "--ckpt_path=last", "--model.optimizer.lr=1e38"))

    assert code == 2
    assert "the gradient's norm is" in capsys.readouterr().err
    assert {p.name: p.read_bytes() for p in (tmp_path / "checkpoints").iterdir()} == before


def test_a_trial_run_leaves_no_checkpoint(tmp_path: Path, tiny_world: Path) -> None:
    assert main(tiny_run("fit", tmp_path, tiny_world, "--trainer.fast_dev_run=2", "--data.micro_batch_rows=4")) == 0

    assert not list(tmp_path.rglob("*.ckpt"))


def test_the_last_step_is_kept_even_between_two_checkpoints(tmp_path: Path, tiny_world: Path) -> None:
    assert main(tiny_run("fit", tmp_path, tiny_world, "--trainer.max_steps=4")) == 0

    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step=00000003.ckpt", "step=00000004.ckpt"]


def test_resuming_without_a_checkpoint_starts_from_the_beginning(
    tmp_path: Path, tiny_world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(tiny_run("fit", tmp_path, tiny_world, "--trainer.max_steps=1", "--ckpt_path=last")) == 0

    assert "starting from the beginning" in capsys.readouterr().out


def test_a_damaged_last_checkpoint_is_passed_over(trained: Path, tmp_path: Path, tiny_world: Path) -> None:
    assert main(tiny_run("fit", tmp_path, tiny_world)) == 0
    newest = tmp_path / "checkpoints" / "step=00000006.ckpt"
    newest.write_bytes(newest.read_bytes()[:1000])

    assert main(tiny_run("fit", tmp_path, tiny_world, "--ckpt_path=last")) == 0

    assert_same(tmp_path, trained, 6)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_step_and_writes_a_checkpoint(tmp_path: Path, tiny_world: Path, number: int, code: int) -> None:
    endless = ["--trainer.max_steps=100000", "--trainer.val_check_interval=100000", "--data.num_workers=1"]
    process = start(tiny_run("fit", tmp_path, tiny_world, *endless), start_new_session=True)
    _wait_for_checkpoint(tmp_path)

    os.killpg(process.pid, number)  # as a terminal does: to the loader's processes too
    _, err = process.communicate(timeout=60)

    assert process.returncode == code
    assert "writing a checkpoint" in err
    assert "Traceback" not in err


@pytest.mark.slow
@pytest.mark.parametrize("seed", [2, 3])
def test_a_run_killed_at_any_moment_and_resumed_equals_the_uninterrupted_run(
    tmp_path: Path, tiny_world: Path, seed: int
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert run(tiny_run("fit", whole, tiny_world, *STEPS)).returncode == 0
    draw = random.Random(seed)
    deaths = 0
    for _ in range(3):
        process = start(tiny_run("fit", killed, tiny_world, *STEPS, "--ckpt_path=last"))
        _wait_for_checkpoint(killed)
        time.sleep(draw.uniform(0, 1.5))
        process.kill()
        process.communicate()
        deaths += process.returncode == -signal.SIGKILL

    end = run(tiny_run("fit", killed, tiny_world, *STEPS, "--ckpt_path=last"))

    assert end.returncode == 0, end.stderr
    assert deaths
    assert_same(killed, whole, 23)


def _wait_for_checkpoint(folder: Path) -> None:
    """Wait until a run has come some way."""
    for _ in range(600):
        if list((folder / "checkpoints").glob("*.ckpt")):
            return
        time.sleep(0.1)
    raise AssertionError(f"no checkpoint appears in {folder}")
