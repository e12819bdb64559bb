"""Mistakes in a run's attention end it before its first step."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import lightning as L
import pytest
import torch
from torch import Tensor

from kosmos_lit.checkpoint import load_checkpoint
from kosmos_lit.checks.device import check_device
from kosmos_lit.cli import main
from kosmos_lit.config import DecoderConfig
from kosmos_lit.errors import UserError
from kosmos_lit.layers import attention
from kosmos_lit.lit import KosmosLit
from kosmos_lit.ops import kernels
from kosmos_lit.ops.masks import causal
from tests.cli_runs import losses, tiny_run
from tests.kosmos_lit.checks.test_leaks import masked

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


@pytest.mark.parametrize("kernel", ["xformers", "cudnn", "flex"])
def test_a_kernel_for_gpus_on_a_cpu_is_refused_at_the_start(
    tmp_path: Path, tiny_world: Path, steps: list[int], kernel: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(tiny_run("fit", tmp_path, tiny_world, f"--model.kosmos.decoder.attention_kernel={kernel}")) == 2

    assert f"{kernel} needs a CUDA device, but the run's is cpu; set it to auto or sdpa" in capsys.readouterr().err
    assert not steps


def test_the_kernel_is_in_the_log_and_in_the_checkpoint_and_resume_says_if_it_differs(
    tmp_path: Path, tiny_world: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    steps = ["--trainer.limit_val_batches=0", "--model.optimizer.total_steps=6"]
    assert main(tiny_run("fit", tmp_path, tiny_world, "--trainer.max_steps=1", *steps)) == 0

    assert "attention kernel: sdpa (auto)" in caplog.text
    logged = [path.read_text(encoding="utf-8") for path in tmp_path.rglob("hparams.yaml")]
    assert any("\nattention_kernel: sdpa" in text for text in logged)
    (path,) = (tmp_path / "checkpoints").glob("*.ckpt")
    assert load_checkpoint(path)["attention_kernel"] == "sdpa"

    for kernel, says in (("sdpa", False), ("reference", True)):
        caplog.clear()
        more = [f"--model.kosmos.decoder.attention_kernel={kernel}", "--trainer.max_steps=2", "--ckpt_path", str(path)]
        assert main(tiny_run("fit", tmp_path / kernel, tiny_world, *more, *steps)) == 0
        assert f"attention kernel: {kernel}\n" in caplog.text
        assert ("attention was computed by sdpa so far, and is by reference" in caplog.text) is says


@pytest.mark.parametrize(
    ("capability", "precision", "fields", "message"),
    [
        ((9, 0), "bf16-mixed", {}, None),
        ((8, 0), "bf16-mixed", {}, "cudnn needs a device of capability 9 or 10 .*; set it to auto, xformers or sdpa"),
        ((9, 0), "bf16-mixed", {"attention_dropout_rate": 0.1}, "cudnn has no dropout .*; set the rate to 0, or"),
        ((9, 0), "32-true", {}, "cudnn does not take float32; set trainer.precision to bf16-mixed"),
        ((9, 0), "bf16-mixed", {"n_heads": 8}, "cudnn takes heads of at most 128, but decoder.dim / n_heads is 256"),
        ((8, 0), "bf16-mixed", {"attention_kernel": "sdpa", "fp8": "rowwise"}, "fp8 needs .* 8.9 .* Some GPU; set it to"),
    ],
)
def test_what_an_imagined_gpu_lacks_is_said_before_the_first_step(
    capability: tuple[int, int],
    precision: str,
    fields: dict[str, Any],
    message: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kernels, "torch_version", lambda: (2, 15))
    monkeypatch.setattr(kernels, "cudnn_version", lambda: 92600)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Some GPU")
    config = DecoderConfig(**{"attention_kernel": "cudnn", "attention_dropout_rate": 0.0} | fields)
    strategy = SimpleNamespace(root_device=torch.device("cuda"))
    trainer = SimpleNamespace(strategy=strategy, precision=precision, num_devices=1)

    if message is None:
        assert check_device(cast(L.Trainer, trainer), config, 2048, trains=True) == "cudnn"
        return
    with pytest.raises(UserError, match=message):
        check_device(cast(L.Trainer, trainer), config, 2048, trains=True)


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
