"""The frozen tower's matrices are bfloat16 in a bf16-mixed run, and nobody notices: neither losses nor checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback

from kosmos_lit.checkpoint import load_checkpoint
from kosmos_lit.cli import main
from kosmos_lit.vision import VisionTower
from tests.cli_runs import losses, tiny_run

BF16 = ["--trainer.precision=bf16-mixed", "--model.kosmos.vision.trainable=none"]
DTYPES: list[set[torch.dtype]] = []


class RecordDtypes(Callback):
    """Notes the dtypes of the tower's frozen matrices at each training batch, and after the run."""

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        DTYPES.append({p.dtype for p in pl_module.net.vision.frozen_matrices().values()})

    def teardown(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        DTYPES.append({p.dtype for p in pl_module.net.vision.frozen_matrices().values()})


@pytest.fixture
def dtypes() -> list[set[torch.dtype]]:
    DTYPES.clear()
    return DTYPES


RECORD = "--trainer.callbacks+=tests.kosmos_lit.test_frozen_tower.RecordDtypes"


def state(folder: Path, step: int) -> dict[str, torch.Tensor]:
    return load_checkpoint(folder / "checkpoints" / f"step={step:08d}.ckpt")["state_dict"]  # type: ignore[no-any-return]


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


def test_a_run_and_its_resume_are_those_of_float32_matrices(
    tmp_path: Path, tiny_world: Path, monkeypatch: pytest.MonkeyPatch, dtypes: list[set[torch.dtype]]
) -> None:
    rounded, plain = tmp_path / "rounded", tmp_path / "plain"
    assert main(tiny_run("fit", rounded, tiny_world, *BF16, RECORD, "--trainer.max_steps=3")) == 0
    assert dtypes == [*[{torch.bfloat16}] * 6, {torch.float32}]
    assert main(tiny_run("fit", rounded, tiny_world, *BF16, "--ckpt_path=last")) == 0
    monkeypatch.setattr(VisionTower, "round_frozen", lambda *_: None)
    dtypes.clear()
    assert main(tiny_run("fit", plain, tiny_world, *BF16, RECORD)) == 0

    assert dtypes == [{torch.float32}] * 13
    assert losses(rounded) == losses(plain)
    assert len(losses(plain)) == 6
    for step in (3, 6):
        assert same(state(rounded, step), state(plain, step))
        assert {t.dtype for t in state(rounded, step).values() if t.is_floating_point()} == {torch.float32}


@pytest.mark.parametrize(
    "flags", [["--trainer.precision=32-true", BF16[1]], [BF16[0], "--model.kosmos.vision.trainable=all"]]
)
def test_matrices_that_train_or_multiply_in_float32_stay_float32(
    tmp_path: Path, tiny_world: Path, dtypes: list[set[torch.dtype]], flags: list[str]
) -> None:
    assert main(tiny_run("fit", tmp_path, tiny_world, *flags, RECORD, "--trainer.max_steps=2")) == 0

    assert set().union(*dtypes) <= {torch.float32}
