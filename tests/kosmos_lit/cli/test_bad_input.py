"""A user's mistake gets one message that names place and values, exit code 2, and no traceback."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from kosmos_lit.cli import main
from tests.cli_runs import ROOT, tiny_run

Mistake = Callable[..., str]


@pytest.fixture
def mistake(capsys: pytest.CaptureFixture[str]) -> Mistake:
    """Return a function that runs a command, expects it to be refused, and returns the message."""

    def run(*arguments: str) -> str:
        code = main(list(arguments))
        err = capsys.readouterr().err
        assert code == 2
        assert "Traceback" not in err
        return next(line for line in reversed(err.splitlines()) if line.startswith("error: "))

    return run


@pytest.fixture
def fit(tmp_path: Path, tiny_world: Path) -> list[str]:
    return tiny_run("fit", tmp_path / "run", tiny_world)


def overlay(folder: Path, text: str) -> list[str]:
    path = folder / "overlay.yaml"
    path.write_text(text, encoding="utf-8")
    return ["-c", str(path)]


# ---- configuration


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("model: {kosmos: {decoder: {n_layer: 3}}}", "model.kosmos.decoder.n_layer"),
        ("modle: {kosmos: {decoder: {n_layers: 3}}}", "modle"),
        ("trainer: {max_step: 3}", "trainer.max_step"),
        ("data: {init_args: {ratio: {captoin: 1}}}", "captoin"),
        ("data: {init_args: {global_batch_row: 1}}", "global_batch_row"),
    ],
)
def test_a_misspelt_key_in_a_file(mistake: Mistake, fit: list[str], tmp_path: Path, text: str, named: str) -> None:
    message = mistake(*fit, *overlay(tmp_path, text))

    assert named in message
    assert "overlay.yaml" in message


@pytest.mark.parametrize(
    "flag",
    ["--model.kosmos.decoder.n_layer=3", "--trainer.max_step=3", "--model.optimizer.warmup=3", "--data.ratio.videos=1"],
)
def test_a_misspelt_or_abbreviated_flag(mistake: Mistake, fit: list[str], flag: str) -> None:
    assert flag.split("=")[0].split(".")[-1] in mistake(*fit, flag)


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--model.kosmos.decoder.n_layers=three", "three"),
        ("--model.kosmos.decoder.n_heads=5", "dim 24 is not a multiple of n_heads 5"),
        ("--model.kosmos.decoder.norm=subb", "'sub', 'pre'"),
        ("--model.kosmos.vision.image_size=32", "vision.image_size is 32"),
        ("--model.kosmos.vision.architecture=ViT-nothing", "ViT-nothing"),
        ("--model.kosmos.vision.pretrained=nothing.pt", "nothing.pt"),
        ("--model.optimizer.lr=-1", "lr must be positive, got -1"),
        ("--data.seq_len=512", "data.seq_len is 512, but model.kosmos.decoder.max_seq_len is 128"),
        ("--trainer.gradient_clip_algorithm=value", "only norm is supported"),
        ("--data.seq_len=6", "seq_len 6 has no room for an image of 3 latents"),
    ],
)
def test_a_value_that_makes_no_sense(mistake: Mistake, fit: list[str], flag: str, message: str) -> None:
    assert message in mistake(*fit, flag)


def test_a_config_file_that_is_not_there(mistake: Mistake, fit: list[str], tmp_path: Path) -> None:
    assert "absent.yaml" in mistake(*fit, "-c", str(tmp_path / "absent.yaml"))


def test_a_config_file_that_is_no_yaml(mistake: Mistake, fit: list[str], tmp_path: Path) -> None:
    assert "overlay.yaml is no YAML" in mistake(*fit, *overlay(tmp_path, "data: {init_args: [\n"))


@pytest.mark.parametrize("form", ["flag", "short flag", "file"])
def test_a_value_that_follows_from_another_one(mistake: Mistake, fit: list[str], tmp_path: Path, form: str) -> None:
    arguments = {
        "flag": ["--data.init_args.n_latents=5"],
        "short flag": ["--data.n_latents", "5"],
        "file": overlay(tmp_path, "data: {init_args: {n_latents: 5}}"),
    }[form]

    assert "it follows from model.kosmos.connector.n_latents" in mistake(*fit, *arguments)


def test_a_verb_that_does_not_exist(mistake: Mistake) -> None:
    assert "unknown verb 'fitt'; did you mean fit? (there are fit, validate" in mistake("fitt")
    assert "unknown verb 'prepare corpsu'; did you mean prepare corpus?" in mistake("prepare", "corpsu")


# ---- ratio and batch


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"text": "-1"}, "[-1.0, 5.0, 2.0, 0.0]"),
        ({"text": "0", "caption": "0", "interleaved": "0"}, "[0.0, 0.0, 0.0, 0.0]"),
    ],
)
def test_a_ratio_that_is_none(mistake: Mistake, fit: list[str], values: dict[str, str], message: str) -> None:
    assert message in mistake(*fit, *(f"--data.ratio.{k}={v}" for k, v in values.items()))


def test_a_ratio_for_a_corpus_that_is_not_given(mistake: Mistake, tmp_path: Path) -> None:
    config = overlay(
        tmp_path,
        "data: {class_path: datamodules.MixtureData, init_args: {tokenizer: {path: t}, ratio: {text: 1, caption: 2}}}",
    )

    assert "data.ratio.text is 1, but data.text is not given" in mistake("fit", *config)


def test_rows_that_do_not_divide(mistake: Mistake, fit: list[str]) -> None:
    message = mistake(*fit, "--data.global_batch_rows=15")

    assert "global_batch_rows 15 is not divisible by 1 ranks x 2 micro_batch_rows" in message
    assert "1, 3, 5, 15" in message


def test_accumulation_that_is_set_by_hand(mistake: Mistake, fit: list[str]) -> None:
    assert "it follows from the data's numbers" in mistake(*fit, "--trainer.accumulate_grad_batches=3")


# ---- tokenizer, index, checkpoint


def test_a_tokenizer_that_does_not_match_the_index(
    mistake: Mistake, fit: list[str], tmp_path: Path, tiny_world: Path
) -> None:
    shutil.copytree(tiny_world, tmp_path / "world")
    shutil.rmtree(tmp_path / "world" / "tokenizer")
    assert main([*fit, "--data.world.path", str(tmp_path / "nothing"), "--data.vocab_size", "100000"]) == 2
    made = ["prepare", "tokenizer", "--input", str(tiny_world / "text-*"), "--vocab_size", "250"]
    assert main([*made, "--output", str(tmp_path / "world" / "tokenizer")]) == 0

    message = mistake(*fit, "--data.world.path", str(tmp_path / "world"), "--data.vocab_size=250")

    assert str(tmp_path / "world" / "index") in message
    assert "was made with tokenizer" in message


def test_a_tokenizer_of_another_size(mistake: Mistake, fit: list[str]) -> None:
    assert "has 290 pieces, but the config's vocab_size for it is 280" in mistake(*fit, "--data.vocab_size=280")


def test_raw_files_that_the_index_does_not_have(mistake: Mistake, fit: list[str], tmp_path: Path, tiny_world: Path) -> None:
    shutil.copytree(tiny_world, tmp_path / "world")
    shutil.copy(tmp_path / "world" / "text-00000.jsonl.zst", tmp_path / "world" / "text-00009.jsonl.zst")

    assert "text-00009.jsonl.zst" in mistake(*fit, "--data.world.path", str(tmp_path / "world"))


def test_a_shard_with_images_that_is_gone(mistake: Mistake, fit: list[str], tmp_path: Path, tiny_world: Path) -> None:
    shutil.copytree(tiny_world, tmp_path / "world")
    (tmp_path / "world" / "caption-00001.tar").unlink()

    assert "caption-00001.tar" in mistake(*fit, "--data.world.path", str(tmp_path / "world"))


def test_a_vocabulary_smaller_than_the_tokenizers(mistake: Mistake, fit: list[str]) -> None:
    assert "the tokenizer has 297 ids" in mistake(*fit, "--model.kosmos.decoder.vocab_size=200")


def test_a_world_that_is_another_one(mistake: Mistake, fit: list[str]) -> None:
    assert "seed is 0 on disk, 5 in the run" in mistake(*fit, "--data.world.seed=5")


def test_a_checkpoint_of_another_architecture(mistake: Mistake, trained: Path, tmp_path: Path, tiny_world: Path) -> None:
    checkpoint = str(trained / "checkpoints" / "step=00000006.ckpt")
    arguments = tiny_run("validate", tmp_path, tiny_world, "--ckpt_path", checkpoint)

    message = mistake(*arguments, "--model.kosmos.decoder.ffn_dim=96", "--model.kosmos.decoder.norm=pre")

    assert "decoder.ffn_dim is 48 in the checkpoint, 96 in the run" in message
    assert "decoder.norm is 'sub' in the checkpoint, 'pre' in the run" in message


def test_a_checkpoint_that_is_not_there(mistake: Mistake, fit: list[str], tmp_path: Path) -> None:
    assert str(tmp_path / "none.ckpt") in mistake(*fit, "--ckpt_path", str(tmp_path / "none.ckpt"))


def test_a_new_run_in_an_old_runs_folder(mistake: Mistake, trained: Path, tiny_world: Path) -> None:
    before = sorted(trained.rglob("*"))

    message = mistake(*tiny_run("fit", trained, tiny_world))

    assert "--ckpt_path last" in message
    assert sorted(trained.rglob("*")) == before


def test_a_resume_with_other_data(mistake: Mistake, trained: Path, tmp_path: Path, tiny_world: Path) -> None:
    shutil.copytree(trained / "checkpoints", tmp_path / "run" / "checkpoints")

    message = mistake(*tiny_run("fit", tmp_path / "run", tiny_world, "--ckpt_path=last", "--data.ratio.text=7"))

    assert "shares of rows were from row 24: text 41.7%" in message
    assert "they are from row 24: text 50.0%" in message
    assert "Set data.accept_changes" in message


# ---- prepare, generate, rows


@pytest.mark.parametrize("what", ["tokenizer", "corpus"])
def test_a_pattern_without_files(mistake: Mistake, tmp_path: Path, tiny_world: Path, what: str) -> None:
    options = {
        "tokenizer": ["--vocab_size", "100"],
        "corpus": ["--format", "jsonl", "--tokenizer", str(tiny_world / "tokenizer")],
    }[what]
    pattern = str(tmp_path / "no*.jsonl")

    assert pattern in mistake("prepare", what, "--input", pattern, *options, "--output", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_misspelt_option_of_prepare(mistake: Mistake) -> None:
    arguments = ["--format", "jsonl", "--input", "x", "--tokeniser", "t", "--output", "o"]

    assert "unknown option --tokeniser; did you mean --tokenizer?" in mistake("prepare", "corpus", *arguments)


def test_a_pattern_with_empty_files_only(mistake: Mistake, tmp_path: Path, tiny_world: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    arguments = ["--format", "jsonl", "--tokenizer", str(tiny_world / "tokenizer"), "--output", str(tmp_path / "out")]

    assert "empty files only" in mistake("prepare", "corpus", "--input", str(tmp_path / "*.jsonl"), *arguments)


def test_a_fit_whose_files_are_missing(mistake: Mistake, tmp_path: Path) -> None:
    config = str(ROOT / "configs" / "small_cpu.yaml")
    arguments = ["--data.text.input=[nowhere/*.zst]", f"--data.tokenizer.path={tmp_path / 'tokenizer'}"]

    assert "nowhere/*.zst" in mistake("fit", "-c", config, "--trainer.default_root_dir", str(tmp_path), *arguments)


def test_more_pieces_than_the_text_has(mistake: Mistake, tmp_path: Path, tiny_world: Path) -> None:
    arguments = ["--input", str(tiny_world / "text-*"), "--vocab_size", "100000", "--output", str(tmp_path / "out")]

    assert "enough for at most" in mistake("prepare", "tokenizer", *arguments)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--image", "nothing.jpg"], "nothing.jpg"),
        (["--prompt", "<image> and <image>"], "2 <image> marks, but 0 images"),
        (["--max_new_tokens", "500"], "500 new tokens exceed the model's 128 positions"),
        (["--n_beams", "0"], "n_beams must be positive, got 0"),
        (["--beam", "3"], "unknown option --beam"),
        (["--device", "gpu"], "--device gpu cannot be used"),
    ],
)
def test_a_question_that_cannot_be_answered(mistake: Mistake, trained: Path, options: list[str], message: str) -> None:
    assert message in mistake("generate", "--ckpt_path", str(trained / "checkpoints" / "step=00000006.ckpt"), *options)


def test_a_file_that_is_no_checkpoint(mistake: Mistake, tmp_path: Path) -> None:
    (tmp_path / "x.ckpt").write_bytes(b"nothing of the kind")

    assert "x.ckpt is no checkpoint" in mistake("generate", "--ckpt_path", str(tmp_path / "x.ckpt"))


def test_an_image_that_is_none(mistake: Mistake, trained: Path, tmp_path: Path) -> None:
    (tmp_path / "x.jpg").write_bytes(b"nothing of the kind")
    arguments = ["--ckpt_path", str(trained / "checkpoints" / "step=00000006.ckpt"), "--image", str(tmp_path / "x.jpg")]

    assert "x.jpg: not an image" in mistake("generate", *arguments)


def test_rows_before_the_first_one(mistake: Mistake, tmp_path: Path, tiny_world: Path) -> None:
    assert "--start -3" in mistake(*tiny_run("rows", tmp_path, tiny_world, "--start", "-3"))
