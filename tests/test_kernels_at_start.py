"""Mistakes in a run's attention end it before its first step."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kosmos_lit.cli import main
from kosmos_lit.layers import attention
from kosmos_lit.lit import KosmosLit
from kosmos_lit.ops.masks import causal
from tests.kosmos_lit.checks.test_leaks import masked
from tests.running import losses, tiny_run

DROPOUT = ("decoder.dropout_rate", "decoder.attention_dropout_rate", "connector.attention_dropout_rate")


def leaky(q: Tensor, k: Tensor, v: Tensor, *_: object, **__: object) -> Tensor:
    """Attend to all earlier documents of the row too."""
    return masked(q, k, v, causal(q.shape[1], k.shape[1], q.device))


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Batch indexes of the training steps that start."""
    started: list[int] = []
    step = KosmosLit.training_step

    def counted(self: KosmosLit, batch: Any, batch_idx: int) -> Tensor:
        started.append(batch_idx)
        return step(self, batch, batch_idx)

    monkeypatch.setattr(KosmosLit, "training_step", counted)
    return started


def test_a_run_whose_kernel_leaks_does_not_start(
    tmp_path: Path, tiny_world: Path, steps: list[int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(attention, "attend", leaky)

    assert main(tiny_run("fit", tmp_path, tiny_world)) == 2

    error = capsys.readouterr().err
    assert "error: attention leaks: the losses of document 1 of row 0 change by up to" in error
    assert "decoder.attention_kernel: auto, torch.float32, cpu" in error
    assert not steps


def test_the_same_kernel_is_right_where_documents_may_see_earlier_ones(
    tmp_path: Path, tiny_world: Path, steps: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "attend", leaky)
    more = ["--model.kosmos.decoder.document_attention=row", "--trainer.max_steps=1", "--trainer.limit_val_batches=0"]

    assert main(tiny_run("fit", tmp_path, tiny_world, *more)) == 0

    assert steps


@pytest.mark.parametrize("kernel", ["xformers", "flex"])
def test_a_kernel_for_gpus_on_a_cpu_is_refused_at_the_start(
    tmp_path: Path, tiny_world: Path, steps: list[int], kernel: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(tiny_run("fit", tmp_path, tiny_world, f"--model.kosmos.decoder.attention_kernel={kernel}")) == 2

    assert f"{kernel} needs a CUDA device, but the run's is cpu; set it to auto or sdpa" in capsys.readouterr().err
    assert not steps


def test_the_check_draws_no_random_number(tmp_path: Path, tiny_world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    states: list[Tensor] = []
    check = KosmosLit._check_leaks

    def watched(self: KosmosLit) -> None:
        states.append(torch.get_rng_state())
        check(self)
        states.append(torch.get_rng_state())

    monkeypatch.setattr(KosmosLit, "_check_leaks", watched)

    assert main(tiny_run("fit", tmp_path, tiny_world, "--trainer.max_steps=1", "--trainer.limit_val_batches=0")) == 0

    assert torch.equal(*states)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("gcc") is None, reason="inductor needs a C compiler")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo looks for it
def test_a_fused_run_has_the_losses_of_a_plain_one(tmp_path: Path, tiny_world: Path) -> None:
    runs = []
    for compiles in ("false", "true"):
        more = [f"--model.kosmos.decoder.compile={compiles}", "--trainer.max_steps=3", "--model.optimizer.total_steps=6"]
        more += [f"--model.kosmos.{part}=0" for part in DROPOUT]
        assert main(tiny_run("fit", tmp_path / compiles, tiny_world, *more)) == 0
        runs.append([float(loss) for loss in losses(tmp_path / compiles).values()])
    assert len(runs[0]) == 3
    assert runs[1] == pytest.approx(runs[0], rel=1e-5)  # fp32, sums in another order
