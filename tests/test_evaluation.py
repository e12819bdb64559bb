"""Evaluation by the command line: without corpora, on several ranks, killed and resumed, and during training."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from kosmos_lit.checkpoint import load_checkpoint
from kosmos_lit.cli import main
from kosmos_lit.tokenizer import Tokenizer
from kosmos_lit.weights.folder import save_folder
from kosmos_lit.weights.load import load_model
from tests.cli_runs import TINY, losses, tiny_run
from tests.kosmos_lit.evaluation.toy_tasks import draw_images
from tests.ranks import on_ranks

TASKS = "tests.kosmos_lit.evaluation.toy_tasks."
DDP = ["--trainer.devices=2", "--trainer.strategy=ddp"]
FSDP = ["-c", "configs/trainer/fsdp.yaml", "--trainer.accelerator=cpu", "--trainer.devices=2", "--trainer.precision=32-true"]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    draw_images(folder, 5)
    return folder


def overlay(path: Path, **tasks: Any) -> list[str]:
    """Write a config file with tasks, and return the flags that name it."""
    path.write_text(yaml.safe_dump({"eval": {"tasks": tasks}}), encoding="utf-8")
    return ["-c", str(path)]


def rounds(folder: Path, n: int, name: str = "TwoRounds", **options: Any) -> dict[str, Any]:
    return {"class_path": TASKS + name, "init_args": {"path": str(folder), "n": n, **options}}


def eval_command(trained: Path, *more: str) -> list[str]:
    """Return the arguments of an evaluation of a trained run, without its corpora."""
    return ["test", "-c", TINY, "--trainer.default_root_dir", str(trained), "--data.world.path", "nowhere", *more]


def entries(folder: Path) -> dict[str, Any]:
    metrics: dict[str, Any] = json.loads((folder / "metrics.json").read_text())
    return metrics["tasks"]  # type: ignore[no-any-return]


def keys(folder: Path, task: str) -> list[str]:
    return [json.loads(line)["key"] for line in (folder / task / "samples.jsonl").read_text().splitlines()]


def test_tasks_of_several_files_are_evaluated_without_corpora(
    trained: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = overlay(tmp_path / "one.yaml", rounds=rounds(images, 7), gone=rounds(images, 3))
    two = overlay(tmp_path / "two.yaml", shots=rounds(images, 5, n_shots=2), rounds={"init_args": {"n": 11}}, gone=None)
    out = tmp_path / "out"

    code = main(eval_command(trained, *one, *two, f"--eval.folder={out}", "--ckpt_path=last"))

    output = capsys.readouterr().out
    assert code == 0
    assert {name: entry["n_samples"] for name, entry in entries(out).items()} == {"rounds": 11, "shots": 5}
    model_info = json.loads((out / "metrics.json").read_text())["model"]
    assert model_info["step"] == 6
    assert model_info["checkpoint"].endswith("step=00000006.ckpt")
    for name in ("metrics.json", "report.md", "report.html"):
        assert f"{out / name}" in output
        assert (out / name).stat().st_size > 100
    assert "rounds  accuracy" in output


def test_controls_have_folders_of_their_own_in_the_run(trained: Path, images: Path, tmp_path: Path) -> None:
    run = shutil.copytree(trained, tmp_path / "run")
    tasks = overlay(tmp_path / "one.yaml", rounds=rounds(images, 7))

    for image_control in ("true", "blank"):
        assert main(eval_command(run, *tasks, f"--eval.image_control={image_control}", "--ckpt_path=last")) == 0

    assert keys(run / "eval", "rounds") == keys(run / "eval-blank", "rounds")


def test_an_untrained_model_is_called_untrained(
    images: Path, tmp_path: Path, tiny_world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tasks = overlay(tmp_path / "one.yaml", rounds=rounds(images, 3))

    assert main(tiny_run("test", tmp_path / "run", tiny_world, *tasks)) == 0

    assert "untrained" in capsys.readouterr().out


def test_weights_without_a_checkpoint_are_evaluated(trained: Path, images: Path, tmp_path: Path) -> None:
    tasks = overlay(tmp_path / "one.yaml", rounds=rounds(images, 7))
    save_folder(*load_model(trained / "checkpoints" / "step=00000006.ckpt"), tmp_path / "model")

    for out, start in (("one", "--ckpt_path=last"), ("other", f"--model.init_from={tmp_path / 'model'}")):
        assert main(eval_command(trained, *tasks, start, f"--eval.folder={tmp_path / out}")) == 0

    assert entries(tmp_path / "one")["rounds"]["metrics"] == entries(tmp_path / "other")["rounds"]["metrics"]
    digests = [json.loads((tmp_path / out / "fingerprint.json").read_text())["weights"] for out in ("one", "other")]
    assert digests[0] == digests[1]


def test_an_evaluation_in_training_needs_tasks(tmp_path: Path, tiny_world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(tiny_run("fit", tmp_path, tiny_world, "--eval.every_n_steps=2")) == 2

    assert "eval.every_n_steps is 2, but there are no eval.tasks" in capsys.readouterr().err


def test_an_interrupted_evaluation_says_how_to_continue(
    trained: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kosmos_lit.evaluation.scheduler.WINDOW", 2)
    folder = shutil.copytree(images, tmp_path / "images")
    (folder / "die").write_text("interrupt")
    tasks = overlay(tmp_path / "one.yaml", dying=rounds(folder, 7, "Crashing"))
    command = eval_command(trained, *tasks, f"--eval.folder={tmp_path / 'out'}", "--ckpt_path=last")

    assert main(command) == 130

    assert "run the same command again to continue" in capsys.readouterr().err
    lines = (tmp_path / "out/dying/samples.0.part").read_text().splitlines()
    assert [json.loads(line)["key"] for line in lines] == ["s0", "s1", "s2", "s3"]
    assert main(command) == 0
    assert keys(tmp_path / "out", "dying") == [f"s{i}" for i in range(7)]


def test_a_tokenizer_that_is_not_the_checkpoints_is_an_error(
    trained: Path, tokenizer: Tokenizer, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer.save(tmp_path / "world/tokenizer")
    tasks = overlay(tmp_path / "one.yaml", rounds=rounds(images, 3))
    command = eval_command(trained, *tasks, f"--data.world.path={tmp_path / 'world'}", "--ckpt_path=last")

    assert main(command) == 2

    assert "was trained with tokenizer" in capsys.readouterr().err


def test_a_checkpoint_without_a_tower_is_an_error(
    trained: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    checkpoint = load_checkpoint(trained / "checkpoints" / "step=00000006.ckpt")
    checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if ".vision." not in k}
    torch.save(checkpoint, tmp_path / "blind.ckpt")
    tasks = overlay(tmp_path / "one.yaml", rounds=rounds(images, 3))

    code = main(eval_command(trained, *tasks, f"--eval.folder={tmp_path / 'out'}", f"--ckpt_path={tmp_path / 'blind.ckpt'}"))

    message = capsys.readouterr().err
    assert code == 2
    assert "blind.ckpt does not fit the model" in message
    assert "missing: vision." in message


def test_an_evaluation_in_training_does_not_change_training(
    trained: Path, images: Path, tmp_path: Path, tiny_world: Path
) -> None:
    tasks = overlay(tmp_path / "one.yaml", rounds=rounds(images, 7))
    more = [*tasks, "--eval.every_n_steps=2", "--eval.max_samples=5"]

    # stopped where it has just evaluated, and resumed
    assert main(tiny_run("fit", tmp_path / "run", tiny_world, *more, "--trainer.max_steps=4")) == 0
    assert main(tiny_run("fit", tmp_path / "run", tiny_world, *more, "--ckpt_path=last")) == 0

    assert losses(tmp_path / "run") == losses(trained)
    name = "checkpoints/step=00000006.ckpt"
    one, other = (load_checkpoint(folder / name)["state_dict"] for folder in (trained, tmp_path / "run"))
    assert all(one[key].equal(other[key]) for key in one)
    folders = sorted((tmp_path / "run/eval").iterdir())
    assert [folder.name for folder in folders] == [f"step={n:08d}" for n in (2, 4, 6)]
    assert {entries(folder)["rounds"]["n_samples"] for folder in folders} == {5}
    logged = "".join(path.read_text() for path in (tmp_path / "run/csv").rglob("metrics.csv"))
    assert "eval/rounds/accuracy" in logged


@pytest.mark.slow
def test_ranks_share_an_evaluation_and_resume_it_exactly(trained: Path, images: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(images, tmp_path / "images")
    tasks = overlay(tmp_path / "one.yaml", seven=rounds(folder, 7), eleven=rounds(folder, 11, "Crashing"))

    def command(name: str, *more: str) -> list[str]:
        return eval_command(trained, *tasks, *more, f"--eval.folder={tmp_path / name}", "--ckpt_path=last")

    assert main(command("alone")) == 0
    (folder / "die").write_text("kill")
    with pytest.raises(AssertionError):
        on_ranks(2, [command("killed", *DDP)], tmp_path / "first")
    left = [path.name for path in (tmp_path / "killed/eleven").iterdir()]

    on_ranks(2, [command("killed", *FSDP), command("ddp", *DDP), command("fsdp", *FSDP)], tmp_path / "then")

    assert not (folder / "die").exists()
    assert "samples.jsonl" not in left
    for name in ("killed", "ddp", "fsdp"):
        for task, n in (("seven", 7), ("eleven", 11)):
            assert keys(tmp_path / name, task) == [f"s{i}" for i in range(n)], name
            assert entries(tmp_path / name)[task]["metrics"] == entries(tmp_path / "alone")[task]["metrics"], name


@pytest.mark.slow
def test_an_evaluation_does_not_change_a_sharded_training(images: Path, tmp_path: Path, tiny_world: Path) -> None:
    tasks = overlay(tmp_path / "one.yaml", rounds=rounds(images, 7))
    more = [*FSDP, "--data.micro_batch_rows=1", "--trainer.max_steps=3"]
    plain = tiny_run("fit", tmp_path / "plain", tiny_world, *more)
    with_tasks = tiny_run("fit", tmp_path / "tasks", tiny_world, *more, *tasks, "--eval.every_n_steps=1")

    on_ranks(2, [plain, with_tasks], tmp_path / "ranks")

    assert losses(tmp_path / "tasks") == losses(tmp_path / "plain")
    assert [keys(tmp_path / f"tasks/eval/step=0000000{n}", "rounds") for n in (1, 2, 3)] == [[f"s{i}" for i in range(7)]] * 3
