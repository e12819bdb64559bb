"""TF32 is a switch: off unless asked for, on during a run, and recorded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from kosmos_lit.callbacks.throughput import matmul_precision
from kosmos_lit.checkpoint import load_checkpoint
from kosmos_lit.cli import main
from kosmos_lit.lit import KosmosLit
from kosmos_lit.preflight.devices import find_device
from tests.cli_runs import tiny_run


@pytest.mark.parametrize(("flags", "during", "name"), [([], "highest", "fp32"), (["--model.tf32=true"], "high", "tf32")])
def test_float32_products_are_tf32_during_a_run_that_asks_for_it(
    tmp_path: Path, tiny_world: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str], during: str, name: str
) -> None:
    seen: set[tuple[str, str | None]] = set()
    step = KosmosLit.training_step

    def recorded(*args: Any) -> Any:
        seen.add((torch.get_float32_matmul_precision(), matmul_precision("32-true")))
        return step(*args)

    monkeypatch.setattr(KosmosLit, "training_step", recorded)

    assert main(tiny_run("fit", tmp_path, tiny_world, "--trainer.max_steps=1", *flags)) == 0

    assert seen == {(during, name)}
    assert torch.get_float32_matmul_precision() == "highest"
    checkpoint = load_checkpoint(tmp_path / "checkpoints" / "step=00000001.ckpt")
    assert checkpoint["hyper_parameters"]["tf32"] is bool(flags)


def test_a_plan_reckons_with_the_peak_of_tf32() -> None:
    fp32, tf32 = (find_device("h100", None, None, 0.4, "32-true", on_cpu=False, tf32=on).peak for on in (False, True))

    assert (fp32, tf32) == pytest.approx((66.9e12, 494.7e12))
