"""The quickstart reaches the accuracy that README states."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from tests.cli_runs import ROOT, run

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("quickstart")]  # one worker: its run is made once


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a whole quickstart run."""
    folder = tmp_path_factory.mktemp("quickstart")
    config = str(ROOT / "configs" / "quickstart.yaml")
    end = run(["fit", "-c", config, "--trainer.default_root_dir", str(folder), "--trainer.log_every_n_steps=500"])
    assert end.returncode == 0, end.stderr
    return folder


@pytest.fixture(scope="module")
def report(quickstart: Path) -> dict[str, object]:
    return json.loads((quickstart / "report.json").read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def test_it_captions_combinations_that_training_held_out(report: dict[str, float]) -> None:
    assert report["n_distinct"] >= 200
    assert report["exact_match"] >= 0.8


def test_it_needs_the_image(report: dict[str, float]) -> None:
    assert report["exact_match_shuffled"] <= 0.1


def test_the_loss_of_each_corpus_falls(report: dict[str, dict[str, float]]) -> None:
    before, after = report["loss_before"], report["loss_after"]

    assert set(before) == set(after) == {"text", "caption", "interleaved"}
    assert all(after[name] < before[name] / 3 for name in before)


def test_it_leaves_a_sheet_of_images(quickstart: Path) -> None:
    with Image.open(quickstart / "sheet.png") as sheet:
        assert min(sheet.size) > 400


def test_its_model_learns_a_new_task_from_200_examples_and_keeps_its_captions(
    quickstart: Path, report: dict[str, float], tmp_path: Path
) -> None:
    config = ["fit", "-c", str(ROOT / "configs" / "finetune_world.yaml"), "--trainer.default_root_dir", str(tmp_path)]
    base = [f"--model.init_from={quickstart}/checkpoints/step=00002200.ckpt", f"--data.world.path={quickstart}/world"]

    end = run([*config, *base])

    assert end.returncode == 0, end.stderr
    after = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert after["tasks"]["instruct"]["exact_match"] >= 0.9
    assert after["tasks"]["instruct"]["exact_match_shuffled"] <= 0.25  # the question alone gives some 0.15
    assert after["exact_match"] > report["exact_match"] - 0.05
