"""Each verb does what it says, on a small run."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import kosmos_lit
from kosmos_lit.checkpoint import load_checkpoint
from kosmos_lit.cli import VERBS, main
from tests.cli_runs import ROOT, losses, tiny_run

LAST = Path("checkpoints") / "step=00000006.ckpt"


def test_fit_leaves_checkpoints_logs_and_its_configuration(trained: Path) -> None:
    names = {p.name for p in (trained / "checkpoints").iterdir()}

    assert names == {"step=00000003.ckpt", "step=00000006.ckpt"}
    assert (trained / "config.yaml").is_file()
    assert list((trained / "tensorboard").rglob("events.out.*"))
    assert list(losses(trained)) == [1, 2, 3, 4, 5, 6]


def test_fit_logs_every_metric(trained: Path) -> None:
    header = (trained / "csv" / "version_0" / "metrics.csv").read_text(encoding="utf-8").splitlines()[0].split(",")

    columns = {"lr", "grad_norm", "tokens_per_second", "images_per_second", "padding", "data_wait", "bad_images", "rows"}
    for corpus in ("text", "caption", "interleaved"):
        columns |= {f"{p}/{corpus}" for p in ("train/loss", "train/bits_per_byte", "val/loss", "val/bits_per_byte")}
        columns |= {f"mix/{corpus}", f"bad/{corpus}"}
    assert columns <= set(header)


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
    prompt = ["--prompt", "Here <image> and there <image> we see", "--n_beams", beams, "--max_new_tokens", "5"]

    assert main(["generate", "--ckpt_path", str(trained / LAST), *images, *prompt]) == 0

    assert capsys.readouterr().out.endswith("\n")


def test_generate_writes_one_of_the_choices(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    choices = ["a red square", "two circles"]

    assert main(["generate", "--ckpt_path", str(trained / LAST), "--n_beams", "2", "--choices", *choices]) == 0

    assert capsys.readouterr().out.strip() in choices


def test_generate_draws_the_same_again(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--temperature", "1.5", "--top_k", "50", "--top_p", "0.9", "--max_new_tokens", "9", "--seed"]
    texts = []
    for seed in ("3", "3", "4"):
        assert main(["generate", "--ckpt_path", str(trained / LAST), *options, seed]) == 0
        texts.append(capsys.readouterr().out)

    assert texts[0] == texts[1] != texts[2]


def test_generate_scores_candidates_as_the_notebook_does(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    candidates = ["a red square", "two circles"]

    assert main(["generate", "--ckpt_path", str(trained / LAST), "--device", "cpu", "--score", *candidates]) == 0

    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    scored = kosmos_lit.load(trained / LAST).score("An image of", candidates)
    assert [row["text"] for row in rows] == candidates
    scores = [(row["log_prob"], row["n_tokens"], row["mean"]) for row in rows]
    assert scores == [(s.total, s.n_tokens, s.mean) for s in scored]


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


@pytest.mark.parametrize("workers", ["1", "2"])
def test_prepare_tells_a_log_file_how_far_it_is(
    tmp_path: Path, tiny_world: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, workers: str
) -> None:
    monkeypatch.setattr("datamodules.io.pool.terminal.LINE_SECONDS", 0.0)
    files = ["--input", str(tiny_world / "text-*"), "--output", str(tmp_path / "index"), "--workers", workers]

    assert main(["prepare", "corpus", "--format", "jsonl", "--tokenizer", str(tiny_world / "tokenizer"), *files]) == 0

    lines = capsys.readouterr().err.splitlines()
    n_shards = len(list(tiny_world.glob("text-*")))
    assert any(re.match(rf"indexing jsonl  \d of {n_shards} shards \([\d,]+ documents, ", line) for line in lines)
    assert any(re.match(rf"indexing jsonl  {n_shards} shards \([\d,]+ documents, .*/s\) in 0:", line) for line in lines)


def test_training_a_tokenizer_tells_a_log_file_how_far_it_is(
    tmp_path: Path, tiny_world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = ["--input", str(tiny_world / "text-*"), "--output", str(tmp_path / "tokenizer")]

    assert main(["prepare", "tokenizer", "--vocab_size", "100", *files]) == 0

    lines = [line for line in capsys.readouterr().err.splitlines() if line]
    assert re.match(r"reading text  \d files \([\d,]+ texts\) in 0:", lines[0])
    assert lines[1] == "training the tokenizer"


def test_report_run_shows_losses_and_what_differs(
    trained: Path, tmp_path: Path, tiny_world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tiny_run("fit", tmp_path, tiny_world, "--trainer.max_steps=4", "--model.optimizer.lr=0.5")
    assert main(other) == 0
    capsys.readouterr()

    assert main(["report", "run", str(trained), str(tmp_path), "--n_rows", "3"]) == 0

    summary, by_step, settings = capsys.readouterr().out.split("\n\n")
    expected = losses(trained)
    assert [line.split()[1] for line in summary.splitlines()[1:]] == ["6", "4"]
    assert [line.split()[:2] for line in by_step.splitlines()[1:]] == [
        [str(step), f"{float(expected[step]):.3f}"] for step in (2, 4, 6)
    ]
    # Paths within the two runs' folders are the same settings.
    names = [line.split()[0] for line in settings.splitlines()[1:]]
    assert names == ["model.optimizer.lr", "trainer.max_steps"]


def test_report_run_shows_what_runs_measured_at_their_end(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, share in (("a", 0.25), ("b", 1.0)):
        (tmp_path / name / "csv").mkdir(parents=True)
        shutil.copytree(trained / "csv", tmp_path / name / "csv", dirs_exist_ok=True)
        report = {"exact_match": share, "tasks": {"count": {"n": 27, "exact_match": share / 2}}, "steps": 7}
        (tmp_path / name / "report.json").write_text(json.dumps(report), encoding="utf-8")

    assert main(["report", "run", str(tmp_path / "a"), str(tmp_path / "b")]) == 0

    table = capsys.readouterr().out.split("\n\n")[2].splitlines()
    assert [line.split() for line in table[1:]] == [
        ["exact_match", "0.250", "1.000"],
        ["tasks.count.exact_match", "0.125", "0.500"],
    ]


def test_report_run_says_where_no_log_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "run", str(tmp_path)]) == 2
    assert f"no training step is logged in {tmp_path}/csv" in capsys.readouterr().err

    assert main(["report", "run", str(tmp_path / "none")]) == 2
    assert f"no folder {tmp_path}/none" in capsys.readouterr().err


def test_report_data_shows_what_an_index_holds(tiny_world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = sorted(path.parent for path in (tiny_world / "index").glob("*/manifest.json"))

    assert main(["report", "data", *map(str, folders)]) == 0

    out = capsys.readouterr().out
    assert main(["report", "data", str(tiny_world / "index")]) == 0  # their folder stands for all of them
    assert capsys.readouterr().out == out
    lines = out.splitlines()[1 : len(folders) + 1]
    for folder, line in zip(folders, lines, strict=True):
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        assert line.split()[:2] == [str(folder), manifest["format"]]
        assert line.split()[3:5] == [f"{manifest['documents']:,}", f"{manifest['tokens']:,}"]


@pytest.mark.parametrize(
    "command",
    [
        ["fit", "-c", "quickstrat"],
        ["validate", "-c", "quickstart", "--ckpt_path", "none.ckpt"],
        ["test", "--config=quickstart", "--ckpt_path=none.ckpt"],
        ["report", "run", "none"],
    ],
    ids=lambda words: words[0],
)
def test_a_file_that_there_is_not_is_said_before_torch_is_imported(command: list[str]) -> None:
    code = f"import sys; from kosmos_lit.cli import main; print(main({command}), 'torch' in sys.modules)"
    end = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)

    assert end.stdout == "2 False\n"
    assert "error: " in end.stderr


def test_every_verb_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    for verb in VERBS:
        with pytest.raises(SystemExit) as end:
            main([*verb.split(), "--help"])
        assert end.value.code == 0
        assert "usage" in capsys.readouterr().out.lower()


def test_the_program_alone_lists_its_verbs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2

    output = capsys.readouterr().out
    assert all(verb in output for verb in VERBS)


def test_a_checkpoint_is_enough_to_generate_anywhere(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)  # where no config and no tower's description can be found

    assert main(["generate", "--ckpt_path", str(trained / LAST), "--max_new_tokens", "3"]) == 0

    assert capsys.readouterr().out.endswith("\n")
