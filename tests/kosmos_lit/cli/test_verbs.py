"""Each verb does what it says, on a small run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

import kosmos_lit
from kosmos_lit.checkpoint import load_checkpoint
from kosmos_lit.cli import VERBS, main
from tests.running import losses, tiny_run

LAST = Path("checkpoints") / "step=00000006.ckpt"


def test_fit_leaves_checkpoints_logs_and_its_configuration(trained: Path) -> None:
    names = {p.name for p in (trained / "checkpoints").iterdir()}

    assert names == {"step=00000003.ckpt", "step=00000006.ckpt"}
    assert (trained / "config.yaml").is_file()
    assert list((trained / "tensorboard").rglob("events.out.*"))
    assert list(losses(trained)) == [1, 2, 3, 4, 5, 6]


def test_fit_logs_what_people_steer_by(trained: Path) -> None:
    header = (trained / "csv" / "version_0" / "metrics.csv").read_text(encoding="utf-8").splitlines()[0].split(",")

    wanted = {"lr", "grad_norm", "tokens_per_second", "images_per_second", "padding", "data_wait", "bad_images", "rows"}
    for corpus in ("text", "caption", "interleaved"):
        wanted |= {f"{p}/{corpus}" for p in ("train/loss", "train/bits_per_byte", "val/loss", "val/bits_per_byte")}
        wanted |= {f"mix/{corpus}", f"bad/{corpus}"}
    assert wanted <= set(header)


def test_fit_logs_the_learning_rate_that_the_step_had(trained: Path) -> None:
    lines = (trained / "csv" / "version_0" / "metrics.csv").read_text(encoding="utf-8").splitlines()
    column = lines[0].split(",").index("lr")

    rates = [float(line.split(",")[column]) for line in lines[1:] if line.split(",")[column]]

    assert rates[:3] == pytest.approx([1.5e-3, 3e-3, 3e-3])  # 2 warm-up steps to 3e-3, decay from there


def test_a_checkpoint_holds_plain_data_only(trained: Path) -> None:
    checkpoint = torch.load(trained / LAST, weights_only=True)

    assert checkpoint["hyper_parameters"]["kosmos"]["decoder"]["dim"] == 24
    assert checkpoint["tokenizer"].dtype == torch.uint8


def test_validate_gives_what_fit_gave_at_that_step(trained: Path, tmp_path: Path, tiny_world: Path) -> None:
    assert main(tiny_run("validate", tmp_path, tiny_world, "--ckpt_path", str(trained / LAST))) == 0

    def last_loss(folder: Path) -> str:
        lines = (folder / "csv" / "version_0" / "metrics.csv").read_text(encoding="utf-8").splitlines()
        column = lines[0].split(",").index("val/loss")
        return [v for line in lines[1:] if (v := line.split(",")[column])][-1]

    assert last_loss(tmp_path) == last_loss(trained)


def test_test_reads_every_held_out_row(
    trained: Path, tmp_path: Path, tiny_world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(tiny_run("test", tmp_path, tiny_world, "--ckpt_path", str(trained / LAST))) == 0

    assert "test/loss/interleaved" in capsys.readouterr().out


def test_predict_writes_an_answer_to_each_question(trained: Path, tmp_path: Path, tiny_world: Path) -> None:
    assert main(tiny_run("predict", tmp_path, tiny_world, "--ckpt_path", str(trained / LAST))) == 0

    rows = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len({row["target"] for row in rows if row["task"] in ("object", "count")}) >= 200
    assert {"task", "prompt", "target", "prediction"} == set(rows[0])


@pytest.mark.parametrize("beams", ["1", "3"])
def test_generate_answers_about_several_images(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], beams: str
) -> None:
    for name, colour in (("a.png", "red"), ("b.jpg", "blue")):
        Image.new("RGB", (31, 17), colour).save(tmp_path / name)
    images = ["--image", str(tmp_path / "a.png"), "--image", str(tmp_path / "b.jpg")]
    prompt = ["--prompt", "Here <image> and there <image> we see", "--beams", beams, "--max-new-tokens", "5"]

    assert main(["generate", "--ckpt_path", str(trained / LAST), *images, *prompt]) == 0

    assert capsys.readouterr().out.endswith("\n")


def test_generate_writes_one_of_the_choices(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    choices = ["a red square", "two circles"]

    assert main(["generate", "--ckpt_path", str(trained / LAST), "--beams", "2", "--choices", *choices]) == 0

    assert capsys.readouterr().out.strip() in choices


def test_generate_draws_the_same_again(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--temperature", "1.5", "--top-k", "50", "--top-p", "0.9", "--max-new-tokens", "9", "--seed"]
    said = []
    for seed in ("3", "3", "4"):
        assert main(["generate", "--ckpt_path", str(trained / LAST), *options, seed]) == 0
        said.append(capsys.readouterr().out)

    assert said[0] == said[1] != said[2]


def test_generate_scores_candidates_as_the_notebook_does(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    candidates = ["a red square", "two circles"]

    assert main(["generate", "--ckpt_path", str(trained / LAST), "--device", "cpu", "--score", *candidates]) == 0

    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    scored = kosmos_lit.load(trained / LAST).score("An image of", candidates)
    assert [row["text"] for row in rows] == candidates
    found = [(row["log_prob"], row["n_tokens"], row["mean"]) for row in rows]
    assert found == [(s.total, s.n_tokens, s.mean) for s in scored]


def test_rows_as_json_are_what_the_loader_feeds(
    tmp_path: Path, tiny_world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(tiny_run("rows", tmp_path, tiny_world, "--start", "11", "--count", "5", "--json")) == 0

    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert [row["row"] for row in rows] == [11, 12, 13, 14, 15]
    assert {len(row[k]) for row in rows for k in ("tokens", "targets", "segments")} == {128}
    assert {"corpus", "documents", "images"} <= set(rows[0])


def test_rows_for_people_mark_images(tmp_path: Path, tiny_world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(tiny_run("rows", tmp_path, tiny_world, "--count", "5")) == 0

    assert "<image> at " in capsys.readouterr().out


def test_rows_of_the_held_out_part_end(tmp_path: Path, tiny_world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(tiny_run("rows", tmp_path, tiny_world, "--split", "val", "--count", "1000", "--json")) == 0

    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert 3 <= len(rows) < 1000


def test_the_runs_configuration_wins_over_the_checkpoints(trained: Path, tmp_path: Path, tiny_world: Path) -> None:
    arguments = tiny_run("fit", tmp_path, tiny_world, "--trainer.max_steps=7", "--model.optimizer.lr=0.5")
    checkpoint = ["--ckpt_path", str(trained / LAST)]

    assert main([*arguments, *checkpoint]) == 0

    saved = load_checkpoint(tmp_path / "checkpoints" / "step=00000007.ckpt")
    assert saved["hyper_parameters"]["optimizer"]["lr"] == 0.5


def test_every_verb_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    for verb in VERBS:
        with pytest.raises(SystemExit) as end:
            main([verb, "--help"])
        assert end.value.code == 0
        assert "usage" in capsys.readouterr().out.lower()


def test_the_program_alone_lists_its_verbs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2

    said = capsys.readouterr().out
    assert all(verb in said for verb in VERBS)


def test_a_checkpoint_is_enough_to_generate_anywhere(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)  # where no config and no tower's description can be found

    assert main(["generate", "--ckpt_path", str(trained / LAST), "--max-new-tokens", "3"]) == 0

    assert capsys.readouterr().out.endswith("\n")
