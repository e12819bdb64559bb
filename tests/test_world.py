"""The world's evaluation suite from drawing to table, on a model of two training steps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from datamodules.world.families import FAMILIES
from kosmos_lit.cli import main
from tests.cli_runs import ROOT, tiny_run

OVERLAY = ROOT / "configs" / "eval" / "world.yaml"
BASELINE = ROOT / "configs" / "world_text_only.yaml"
SIZE = [
    "--data.families={n_examples: 23}",
    "--data.sets={n: 6, n_matrices: 2}",
    "--data.vocab_size=300",
    "--data.seq_len=256",
    "--data.ratio.instruct=5",
    "--model.kosmos.decoder.max_seq_len=256",
    "--model.kosmos.decoder.vocab_size=307",
    "--trainer.max_steps=2",
    "--trainer.val_check_interval=2",
]


@pytest.mark.slow
def test_the_commands_train_evaluate_with_both_controls_and_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    world, multimodal, text_only = (tmp_path / name for name in ("world", "multimodal", "text_only"))
    with_text = ["-c", str(BASELINE), "--data.world.path", str(world), "--trainer.default_root_dir", str(text_only)]
    suite = ["-c", str(OVERLAY), "--ckpt_path", "last", "--eval.max_samples=2"]
    assert main(tiny_run("fit", multimodal, world, *SIZE)) == 0
    assert main(tiny_run("fit", text_only, world, *with_text, *SIZE)) == 0
    assert main(tiny_run("test", multimodal, world, *SIZE, *suite)) == 0
    assert main(tiny_run("test", multimodal, world, *SIZE, *suite, "--eval.image_control=shuffled")) == 0
    assert main(tiny_run("test", text_only, world, *with_text, *SIZE, *suite, "--eval.image_control=none")) == 0
    folders = [multimodal / "eval", multimodal / "eval-shuffled", text_only / "eval-none"]

    output = ["--names", "model,shuffled,text only", "--output", str(tmp_path / "report")]
    assert main(["report", "eval", *map(str, folders), *output]) == 0

    printed = capsys.readouterr().out
    tasks = yaml.safe_load(OVERLAY.read_text(encoding="utf-8"))["eval"]["tasks"]
    for folder in folders:
        metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["tasks"]
        assert set(metrics) == set(tasks)
        assert all(task["n_samples"] == 2 and not task["n_failed"] for task in metrics.values())
    assert all(name in printed for name in ("model", "shuffled", "text only"))


def test_the_worlds_configuration_reads_every_family() -> None:
    config = yaml.safe_load((ROOT / "configs" / "world.yaml").read_text(encoding="utf-8"))
    weights = config["data"]["init_args"]["families"].get("weights", dict.fromkeys(FAMILIES, 1))
    assert set(weights) == set(FAMILIES)
