"""Options are fields of dataclasses; a name that does not exist is answered with the nearest, or with what became of it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest

from datamodules.sources import ReadOptions
from kosmos_lit.cli import FUNCTIONS, TRAINER_VERBS, VERBS, main
from kosmos_lit.cli.generate import generate_parser
from kosmos_lit.cli.overlays import with_files_resolved
from kosmos_lit.cli.plan import PlanCLI, plan_parser
from kosmos_lit.cli.prepare import corpus_parser
from kosmos_lit.cli.renamed import CLASSES, FLAGS, KEYS, check_flags, check_names
from kosmos_lit.cli.trainer import user_errors
from kosmos_lit.errors import UserError
from kosmos_lit.inference.config import GenerationConfig
from kosmos_lit.terminal import program
from tests.cli_runs import ROOT

MODEL = ("--ckpt_path", "model")


def message_of(run: Callable[[], object]) -> str:
    with pytest.raises(UserError) as error:
        run()
    return str(error.value)


def parse_run(*words: str) -> None:
    """Parse arguments of `fit` over the quickstart."""
    arguments = with_files_resolved(["-c", "quickstart", *words])
    with user_errors(arguments):
        PlanCLI(arguments)


def config(tmp_path: Path, text: str) -> str:
    (tmp_path / "old.yaml").write_text(text, encoding="utf-8")
    return f"--config={tmp_path / 'old.yaml'}"


# ---- options


def test_the_options_of_a_verb_are_the_fields_of_its_dataclasses() -> None:
    assert {f.name for f in fields(GenerationConfig)} < set(generate_parser().option_names())
    assert {f.name for f in fields(ReadOptions)} < set(corpus_parser().option_names())


def test_help_has_the_units_that_the_fields_document(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["generate", "--help"])

    text = " ".join(capsys.readouterr().out.split())
    assert "Longest continuation in tokens, </s> included. (type: int, default: 64)" in text


def test_help_of_a_verb_that_takes_fits_options_shows_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["plan", "-c", "quickstart", "--help"])

    text = capsys.readouterr().out
    assert "--peak_share" in text
    assert "--trainer." not in text


@pytest.mark.parametrize("text", ["1", "null", "true", "{a: b}", "- a", "1e3", "a, b", "<image> and: that"])
def test_a_text_is_taken_as_it_is_written(text: str) -> None:
    options, settings = generate_parser().read([*MODEL, "--prompt", text, "--choices", text, "other"])

    assert options.prompt == text
    assert list(settings.choices) == [text, "other"]


def test_a_list_is_written_word_after_word_or_as_in_a_config() -> None:
    words = ["--image", "a.png", "b.png", "--image=c.png", "--stop", "[x, '1']"]

    options, settings = generate_parser().read([*MODEL, *words])

    assert options.image == (Path("a.png"), Path("b.png"), Path("c.png"))
    assert list(settings.stop) == ["x", "1"]


@pytest.mark.parametrize(("words", "value"), [([], False), (["--json"], True), (["--json", "false"], False)])
def test_a_switch_alone_means_true(words: list[str], value: bool) -> None:
    options, others = plan_parser().read_known([*words, "-c", "quickstart"])

    assert options.json is value
    assert others == ["-c", "quickstart"]


def test_options_of_a_verb_and_those_of_fit_may_be_mixed() -> None:
    words = ["--trainer.max_steps", "3", "--memory", "8GB", "-c", "quickstart", "--nodes=2", "--data.seed=7"]

    options, others = plan_parser().read_known(words)

    assert (options.memory, options.nodes) == ("8GB", 2)
    assert others == ["--trainer.max_steps", "3", "-c", "quickstart", "--data.seed=7"]


# ---- names that do not exist


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["generate", *MODEL, "--n_beam", "3"], "generate: unknown option --n_beam; did you mean --n_beams?"),
        (["prepare", "corpus", "--tokeniser", "t"], "prepare corpus: unknown option --tokeniser; did you mean --tokenizer?"),
        (["plan", "-c", "quickstart", "--memroy", "8GB"], "did you mean --memory?"),
        (["rows", "-c", "quickstart", "--cuont", "8"], "did you mean --count?"),
        (["verify-resume", "a", "b", "--tolerence=1"], "did you mean --tolerance?"),
        (["report", "evla"], "unknown verb 'report evla'"),
        (["report", "runs/a/eval"], "`report FOLDER` is `report eval FOLDER` now"),
        (["prepar", "corpus"], "did you mean prepare"),
    ],
)
def test_a_misspelt_word_is_answered_with_the_nearest(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "nearest"),
    [
        (["--model.kosmos.decoder.n_layer=3"], "--model.kosmos.decoder.n_layers"),
        (["--trainr.max_steps=3"], "--trainer.max_steps"),
        (["--data.global_batch_row=1"], "global_batch_rows"),
        (["--data.ratio.captoin=1"], "ratio.caption"),
        (["-c", "{model: {kosmos: {decoder: {n_layer: 3}}}}"], "model.kosmos.decoder.n_layers"),
        (["-c", "{modle: {kosmos: {decoder: {n_layers: 3}}}}"], "model.kosmos.decoder.n_layers"),
        (["-c", "{data: {init_args: {global_batch_row: 1}}}"], "global_batch_rows"),
        (["-c", "{trainer: {callbacks+: [{class_path: kosmos_lit.callbacks.StepLg}]}}"], "StepLog"),
        (["-c", "{trainer: {callbacks+: [{class_path: kosmos_lit.callbacks.Checkpoints, init_args: {kep: 3}}]}}"], "keep"),
        (["-c", "{eval: {tasks: {a: {class_path: kosmos_lit.tasks.Vqav2, init_args: {path: x, n_shot: 3}}}}}"], "n_shots"),
        (["-c", "kosmos2"], "model/kosmos2"),
        (["--ffn_dim=3"], "--model.kosmos.decoder.ffn_dim"),
    ],
)
def test_a_misspelt_name_of_a_run_is_answered_with_the_nearest(words: list[str], nearest: str) -> None:
    assert f"did you mean {nearest}?" in message_of(lambda: parse_run(*words))


def test_a_missing_base_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("kosmos_lit.cli.overlays.BASE", tmp_path / "base.yaml")

    assert "base.yaml, which every run begins with" in message_of(lambda: parse_run())


# ---- names of earlier versions


@pytest.mark.parametrize(
    ("words", "new"),
    [
        (["generate", *MODEL, "--beams", "3"], "--n_beams"),
        (["generate", *MODEL, "--max-new-tokens=3"], "--max_new_tokens"),
        (["generate", *MODEL, "--no-repeat-ngram", "3"], "--no_repeat_ngram_size"),
        (["prepare", "tokenizer", "--vocab-size", "100"], "--vocab_size"),
        (["prepare", "corpus", "--max-bad-share", "1"], "--max_bad_share"),
        (["plan", "-c", "quickstart", "--peak-share", "0.3"], "--peak_share"),
    ],
)
def test_an_old_flag_is_answered_with_the_new_one(words: list[str], new: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    assert f" is {new} now" in capsys.readouterr().err


def test_a_config_of_another_version_says_what_changed(tmp_path: Path) -> None:
    text = "eval: {pictures: blank, tasks: {a: {class_path: kosmos_lit.evals.CocoCaption, init_args: {measures: [cider]}}}}"

    message = message_of(lambda: parse_run(config(tmp_path, text)))

    assert "old.yaml is of an earlier version: eval.pictures is eval.image_control now" in message
    assert "kosmos_lit.evals.CocoCaption is kosmos_lit.tasks.CocoCaption now" in message
    assert "eval.tasks.*.init_args.measures is eval.tasks.*.init_args.metrics now" in message


def test_a_flag_of_another_version_says_what_changed() -> None:
    assert "feature_length" in message_of(lambda: check_flags(["--model.kosmos.vision.l2_normalise=true"]))


def test_no_old_name_is_a_name_of_today() -> None:
    options = set(PlanCLI(["-c", "quickstart"]).parser.option_names())

    assert not options & set(KEYS)
    assert {new.split(":")[0] for new in KEYS.values() if "*" not in new} <= options
    assert all(new.removeprefix("--") in generate_parser().option_names() for new in FLAGS["generate"].values())
    check_names({"class_path": list(CLASSES.values())}, "today's names")


# ---- the program


@pytest.mark.parametrize(
    ("called", "name"),
    [
        ("/somewhere/bin/kosmos-lit", "kosmos-lit"),
        ("main.py", "python main.py"),
        ("/lib/kosmos_lit/__main__.py", "python -m kosmos_lit"),
        ("/lib/pytest/__main__.py", "kosmos-lit"),
    ],
)
def test_usage_says_how_the_program_was_called(monkeypatch: pytest.MonkeyPatch, called: str, name: str) -> None:
    monkeypatch.setattr(sys, "argv", [called, "--help"])

    assert program() == name
    assert generate_parser().prog == f"{name} generate"


@pytest.mark.parametrize(
    "words",
    [["--help"], ["report", "--help"], ["generate", "--help"], ["prepare", "corpus", "--help"], ["import", "--help"]],
)
def test_help_needs_no_torch(words: list[str]) -> None:
    code = f"""
import sys
from kosmos_lit.cli import main
try:
    main({words})
except SystemExit:
    pass
assert not {{"torch", "lightning"}} & set(sys.modules)
"""
    end = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)

    assert end.returncode == 0, end.stderr
    assert "usage: " in end.stdout


def test_help_has_a_line_for_each_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0

    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("  ")] == [f"  {verb:<19}{text}" for verb, text in VERBS.items()]
    assert set(VERBS) == {*TRAINER_VERBS, *FUNCTIONS}


def test_python_m_is_the_same_program() -> None:
    command = [sys.executable, "-m", "kosmos_lit"]
    end = subprocess.run([*command, "--help"], cwd=ROOT, capture_output=True, text=True, check=True)

    assert end.stdout.startswith("usage: python -m kosmos_lit VERB")
