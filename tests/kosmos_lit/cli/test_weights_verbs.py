"""The verbs import and export, and what they say to a mistake."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from kosmos_lit.cli import main
from kosmos_lit.tokenizer import MODEL_FILE, Tokenizer
from kosmos_lit.weights.kosmos2 import export_transformers, from_transformers
from kosmos_lit.weights.load import load_model
from tests.kosmos_lit.weights import test_fairseq as released
from tests.kosmos_lit.weights.malicious_pickle import MaliciousPickle
from tests.kosmos_lit.weights.reference_kosmos2 import reference_model
from tests.kosmos_lit.weights.test_clip import SIDE as TOWER_SIDE
from tests.kosmos_lit.weights.test_clip import reference_tower

LAST = Path("checkpoints") / "step=00000006.ckpt"


@pytest.fixture
def stdout_of(capsys):
    """Return a function that runs a command to its good end, and returns what it printed."""

    def run(*arguments: object) -> str:
        code = main([str(a) for a in arguments])
        out, err = capsys.readouterr()
        assert code == 0, err
        return out

    return run


@pytest.fixture
def mistake(capsys):
    """Return a function that runs a command, expects it to be refused, and returns the whole message."""

    def run(*arguments: object) -> str:
        code = main([str(a) for a in arguments])
        out, err = capsys.readouterr()
        assert (code, out) == (2, "")
        assert err.startswith("error: ")
        assert "Traceback" not in err
        return err.removeprefix("error: ").removesuffix("\n")

    return run


@pytest.fixture(scope="module")
def reference(tmp_path_factory, kosmos_vocabulary) -> Path:
    """A folder as transformers has it."""
    tokenizer = Tokenizer(kosmos_vocabulary)
    model = from_transformers(reference_model("wide", vocab_size=tokenizer.vocab_size)).model
    folder = tmp_path_factory.mktemp("theirs") / "kosmos2"
    export_transformers(model, tokenizer, folder)
    return folder


# ---- what they do


def test_an_export_as_safetensors_generates_what_the_checkpoint_does(trained, tmp_path, stdout_of):
    image = tmp_path / "a.png"
    Image.linear_gradient("L").resize((53, 31)).convert("RGB").save(image)
    question = ("--image", image, "--prompt", "Here <image> we see", "--max_new_tokens", 11, "--n_beams", 3)

    message = stdout_of("export", "--ckpt_path", trained / LAST, "--format", "safetensors", "--output", tmp_path / "model")

    assert message.startswith(f"{tmp_path}/model: ")
    assert {p.name for p in (tmp_path / "model").iterdir()} == {"config.json", "model.safetensors", MODEL_FILE}
    expected = stdout_of("generate", "--ckpt_path", trained / LAST, *question)
    assert stdout_of("generate", "--ckpt_path", tmp_path / "model", *question) == expected


def test_an_exported_folder_runs_anywhere(trained, tmp_path, stdout_of, monkeypatch):
    stdout_of("export", "--ckpt_path", trained / LAST, "--format", "safetensors", "--output", tmp_path / "model")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")  # where no description of the tower can be found

    assert stdout_of("generate", "--ckpt_path", "../model", "--max_new_tokens", 3).endswith("\n")


def test_a_folder_of_transformers_goes_in_and_out_bit_by_bit(reference, tmp_path, stdout_of):
    stdout_of("import", "--format", "transformers", "--input", reference, "--output", tmp_path / "ours")
    stdout_of("export", "--ckpt_path", tmp_path / "ours", "--format", "transformers", "--output", tmp_path / "back")

    expected, actual = (load_file(folder / "model.safetensors") for folder in (reference, tmp_path / "back"))
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())
    for name in ("config.json", "tokenizer.json", "processor_config.json"):
        assert json.loads((tmp_path / "back" / name).read_text()) == json.loads((reference / name).read_text())


def test_import_prints_the_counts_of_parameters_and_ids(reference, tmp_path, stdout_of):
    message = stdout_of("import", "--format", "transformers", "--input", reference, "--output", tmp_path / "ours")

    n = sum(p.numel() for p in load_model(reference).model.parameters())
    assert message == f"{tmp_path}/ours: {n:,} parameters, 68 ids\n"


def test_generate_reads_a_folder_of_transformers_as_it_is(reference, tmp_path, stdout_of):
    stdout_of("import", "--format", "transformers", "--input", reference, "--output", tmp_path / "ours")
    question = ("--prompt", "the cat", "--max_new_tokens", 7)

    expected = stdout_of("generate", "--ckpt_path", tmp_path / "ours", *question)
    assert stdout_of("generate", "--ckpt_path", reference, *question) == expected


def test_a_released_checkpoint_is_imported(tmp_path, kosmos_vocabulary, stdout_of):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / MODEL_FILE).write_bytes(kosmos_vocabulary)
    file = released.save(tmp_path, released.released_tensors())

    out = tmp_path / "ours"
    stdout_of("import", "--format", "fairseq", "--input", file, "--tokenizer", tmp_path / "data", "--output", out)

    assert load_model(out).model.config.decoder.vocab_size == released.N_GROUNDED


@pytest.mark.parametrize("format_", ["transformers", "open_clip"])
def test_a_clip_folder_of_transformers_is_imported_as_a_tower(tmp_path, stdout_of, format_):
    reference_tower("gelu").save_pretrained(tmp_path / "clip")

    message = stdout_of("import", "--format", format_, "--input", tmp_path / "clip", "--output", tmp_path / "tower")

    assert "an image tower" in message
    tower = tmp_path / "tower"
    assert f"architecture: {tower}/architecture.json, image_size: {TOWER_SIDE}, pretrained: {tower}" in message


# ---- mistakes


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["import", "--format", "tensorflow", "--input", "a", "--output", "b"], "tensorflow"),
        (["import", "--format", "fairseq", "--output", "b"], "--input"),
        (["import", "--format", "fairseq", "--input", "no/such.pt", "--output", "b"], "no file or folder no/such.pt"),
        (["import", "--format", "transformers", "--input", ".", "--output", "b", "--tokenizer", "c"], "--tokenizer is for"),
        (["export", "--ckpt_path", "a", "--format", "fairseq", "--output", "b"], "fairseq"),
        (["export", "--ckpt_path", "no/a.ckpt", "--format", "safetensors", "--output", "b"], "no checkpoint no/a.ckpt"),
        (["export", "--ckptpath", "a", "--format", "safetensors", "--output", "b"], "did you mean --ckpt_path"),
    ],
)
def test_a_wrong_option_is_named(mistake, arguments, named):
    assert named in mistake(*arguments)


def test_an_export_names_all_that_would_be_lost(trained, tmp_path, mistake):
    message = mistake("export", "--ckpt_path", trained / LAST, "--format", "transformers", "--output", tmp_path / "out")

    assert "decoder.positions xpos" in message
    assert "vision.feature_length 10" in message
    assert "--format safetensors" in message
    assert not (tmp_path / "out").exists()


def test_an_output_folder_that_is_not_empty_is_left_alone(trained, reference, tmp_path, mistake):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")

    # Said before anything is read: hence no word of the tensors' loading.
    for command in (
        ("export", "--ckpt_path", trained / LAST, "--format", "safetensors"),
        ("export", "--ckpt_path", reference, "--format", "transformers"),
        ("import", "--format", "transformers", "--input", reference),
    ):
        assert "no empty folder" in mistake(*command, "--output", tmp_path / "out")

    assert [p.name for p in (tmp_path / "out").iterdir()] == ["notes.txt"]


def test_a_folder_of_something_else_is_told_what_was_expected(tmp_path, mistake):
    for command in (
        ("generate", "--ckpt_path", tmp_path),
        ("export", "--ckpt_path", tmp_path, "--format", "safetensors", "--output", tmp_path / "out"),
        ("import", "--format", "transformers", "--input", tmp_path, "--output", tmp_path / "out"),
    ):
        message = mistake(*command)
        assert "no config.json" in message
        assert "expected" in message


def test_weights_that_do_not_fit_are_listed_one_a_line(reference, tmp_path, mistake):
    tensors = load_file(reference / "model.safetensors")
    del tensors["image_to_text_projection.latent_query"]
    tensors["text_model.model.layer_norm.bias"] = torch.ones(7)
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in reference.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    save_file(tensors, broken / "model.safetensors")

    message = mistake("import", "--format", "transformers", "--input", broken, "--output", tmp_path / "out")

    assert [line.split(" ")[2:4] for line in message.splitlines()[1:]] == [
        ["missing:", "image_to_text_projection.latent_query"],
        ["misshapen:", "text_model.model.layer_norm.bias"],
    ]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("verb", ["generate", "export", "fairseq", "open_clip", "transformers"])
def test_no_verb_runs_code_of_a_file(verb, reference, tmp_path, mistake):
    exploded, file, out = tmp_path / "exploded", tmp_path / "hostile.ckpt", ("--output", tmp_path / "out")
    torch.save({"model": {"a": MaliciousPickle(exploded)}, "args": Namespace()}, file)
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((reference / name).read_bytes())
    torch.save({"a": MaliciousPickle(exploded)}, folder / "pytorch_model.bin")
    command = {
        "generate": ("generate", "--ckpt_path", file),
        "export": ("export", "--ckpt_path", file, "--format", "safetensors", *out),
        "fairseq": ("import", "--format", "fairseq", "--input", file, *out),
        "open_clip": ("import", "--format", "open_clip", "--input", file, *out),
        "transformers": ("import", "--format", "transformers", "--input", folder, *out),
    }[verb]

    message = mistake(*command)

    assert "hostile.ckpt is no" in message or " is not read: it refers to " in message
    assert not exploded.exists()


def test_a_file_given_for_a_folder_of_transformers_is_named(reference, tmp_path, mistake):
    file = reference / "model.safetensors"

    message = mistake("import", "--format", "transformers", "--input", file, "--output", tmp_path / "out")

    assert message.startswith(f"{file} is no folder")
