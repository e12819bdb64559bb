"""Gradients that are not finite, and losses that leap: found in their step, named with their rows."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from kosmos_lit.callbacks import Checkpoints, LossSpikes
from kosmos_lit.checkpoint import load_checkpoint
from kosmos_lit.cli import main
from kosmos_lit.config import OptimizerConfig
from kosmos_lit.errors import UserError
from kosmos_lit.nonfinite import NonFiniteSteps
from tests.cli_runs import TINY, losses, tiny_run
from tests.ranks import on_ranks


def breaking(folder: Path, steps: list[int], rank: int = 0) -> list[str]:
    callbacks = yaml.safe_load(Path(TINY).read_text(encoding="utf-8"))["trainer"]["callbacks"]
    callbacks.append({"class_path": "tests.recording_callbacks.BreakGradients", "init_args": {"steps": steps, "rank": rank}})
    path = folder / "breaking.yaml"
    path.write_text(yaml.safe_dump({"trainer": {"callbacks": callbacks}}), encoding="utf-8")
    return ["-c", str(path)]


def test_a_gradient_that_is_not_finite_ends_a_run_in_its_step(
    tmp_path: Path, tiny_world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = [*breaking(tmp_path, [5]), "--trainer.log_every_n_steps=100"]

    assert main([*tiny_run("fit", tmp_path / "run", tiny_world), *more]) == 2

    assert "step 5: the gradient's norm is nan, of rows 16 to 19" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step=00000003.ckpt"]


def test_steps_are_left_out_as_if_they_had_not_been(trained: Path, tmp_path: Path, tiny_world: Path) -> None:
    more = [*breaking(tmp_path, [3]), "--model.optimizer.on_nonfinite=skip", "--trainer.max_steps=3"]

    assert main([*tiny_run("fit", tmp_path / "run", tiny_world), *more]) == 0
    assert main([*tiny_run("fit", tmp_path / "two", tiny_world), "--trainer.max_steps=2"]) == 0

    after = load_checkpoint(tmp_path / "run/checkpoints/step=00000003.ckpt")
    before = load_checkpoint(tmp_path / "two/checkpoints/step=00000002.ckpt")
    assert all(after["state_dict"][name].equal(before["state_dict"][name]) for name in before["state_dict"])
    states = [c["optimizer_states"][0]["state"] for c in (before, after)]
    assert all(states[0][i][k].equal(states[1][i][k]) for i in states[0] for k in states[0][i])  # Adam's step count too
    assert losses(tmp_path / "run")[2] == losses(trained)[2]


def test_more_steps_than_may_be_left_out_end_a_run(
    tmp_path: Path, tiny_world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = [*breaking(tmp_path, [2, 4, 5]), "--model.optimizer.on_nonfinite=skip", "--model.optimizer.max_skipped=2"]

    assert main([*tiny_run("fit", tmp_path / "run", tiny_world), *more]) == 2

    assert "step 5: the gradient's norm is nan, of rows 16 to 19 (3 left out within 1000 steps" in capsys.readouterr().err


def test_steps_count_within_a_window_and_are_read_together() -> None:
    config = OptimizerConfig(on_nonfinite="skip", max_skipped=1, skip_window=10)
    guard, optimizer = NonFiniteSteps(config, 4), torch.optim.AdamW([torch.zeros(1)], fused=True)

    for step in (1, 11, 21):
        guard.watch(optimizer, torch.tensor(float("inf")), step)
        assert optimizer.found_inf.item() == 1.0  # type: ignore[attr-defined]
    guard.watch(optimizer, torch.tensor(2.0), 22)
    assert optimizer.found_inf.item() == 0.0  # type: ignore[attr-defined]
    with pytest.raises(UserError, match=r"step 24: .* of rows 92 to 95"):
        guard.watch(optimizer, torch.tensor(float("nan")), 24)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_nan_of_one_rank_is_left_out_by_all(tmp_path: Path, tiny_world: Path, strategy: str) -> None:
    shared = ["-c", f"configs/trainer/{strategy}.yaml", "--trainer.accelerator=cpu", "--trainer.precision=32-true"]
    shared += ["--trainer.devices=2", "--data.micro_batch_rows=1", "--model.optimizer.on_nonfinite=skip"]
    commands = [
        [*tiny_run("fit", tmp_path / "run", tiny_world, *shared), *breaking(tmp_path, [2], rank=1), "--trainer.max_steps=2"],
        [*tiny_run("fit", tmp_path / "one", tiny_world, *shared), "--trainer.max_steps=1"],
    ]

    output = on_ranks(2, commands, tmp_path / "log")

    assert output.count("step 2: the gradient's norm is nan, of rows 4 to 7; 1 left out") == 1
    after, before = (
        load_checkpoint(tmp_path / name / f"checkpoints/step={step:08d}.ckpt")["state_dict"]
        for name, step in (("run", 2), ("one", 1))
    )
    assert all(after[name].equal(before[name]) for name in before)


def test_a_spike_is_named_and_the_checkpoint_before_it_kept(tmp_path: Path) -> None:
    checkpoints = Checkpoints(str(tmp_path / "checkpoints"), keep=1)
    (tmp_path / "checkpoints").mkdir()
    printed: list[str] = []
    trainer: Any = SimpleNamespace(
        global_step=0,
        log_every_n_steps=2,
        default_root_dir=tmp_path,
        is_global_zero=True,
        checkpoint_callbacks=[checkpoints],
        progress_bar_callback=SimpleNamespace(print=printed.append),
        strategy=SimpleNamespace(remove_checkpoint=lambda path: path.unlink()),
        callback_metrics={},
    )
    module, spikes = _Module(), LossSpikes(sigmas=6, window=20, min_rows=10)
    for step in range(1, 61):
        trainer.global_step = step
        caption = {40: 9.0, 50: float("nan")}.get(step, 3 + 0.01 * (step % 7))
        trainer.callback_metrics = {
            "train/loss/caption": torch.tensor(caption),
            "train/loss/text": torch.tensor(5 - step / 60),
        }
        spikes.on_train_batch_end(trainer, module)
        if step % 15 == 0:
            (tmp_path / f"checkpoints/step={step:08d}.ckpt").touch()
            checkpoints._remove_old(trainer)

    [row] = [json.loads(line) for line in (tmp_path / "spikes.jsonl").read_text().splitlines()]
    assert (row["step"], row["corpus"], row["loss"], row["rows"]) == (40, "caption", 9.0, [312, 319])
    assert row["kept"].endswith("step=00000030.ckpt")
    assert printed == [f"step 40 spike of the caption loss: 9.000, median 3.030; rows 312 to 319; {row['kept']} is kept"]
    assert sorted(p.name for p in (tmp_path / "checkpoints").glob("*.ckpt")) == ["step=00000030.ckpt", "step=00000060.ckpt"]


class _Module:
    rows_per_step = 8


@pytest.mark.parametrize("wrong", [{"sigmas": 0.0}, {"min_rows": 1}, {"min_rows": 200}])
def test_settings_that_watch_nothing_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="loss_spikes"):
        LossSpikes(**wrong)
