"""A model as a folder: written whole or not at all, and read as the same model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from kosmos_lit import Kosmos
from kosmos_lit.errors import UserError
from kosmos_lit.tokenizer import GROUNDING, Tokenizer
from kosmos_lit.weights.folder import load_folder, new_folder, save_folder
from kosmos_lit.weights.load import load_model
from tests.kosmos_lit.tiny_kosmos import tiny_model
from tests.kosmos_lit.weights.malicious_pickle import MaliciousPickle


@pytest.fixture
def saved(tmp_path, kosmos_tower, kosmos_tokenizer) -> tuple[Kosmos, Path]:
    model = tiny_model(kosmos_tower)
    save_folder(model, kosmos_tokenizer, tmp_path / "model")
    return model, tmp_path / "model"


# ---- the same model


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"positions": "learned"},
        {"norm": "pre", "positions": "none"},
        {"connector": "linear"},
        {"vision": {"feature_length": None, "mean": (0.1, 0.2, 0.3)}},
    ],
    ids=str,
)
def test_a_saved_model_loads_with_every_tensor_and_setting(tmp_path, kosmos_tower, kosmos_tokenizer, fields):
    model = tiny_model(kosmos_tower, **fields)

    save_folder(model, kosmos_tokenizer, tmp_path / "model")
    loaded, tokenizer = load_folder(tmp_path / "model")

    assert loaded.config.architecture() == model.config.architecture()
    assert tokenizer.fingerprint == kosmos_tokenizer.fingerprint
    expected = model.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(t, expected[name]) for name, t in loaded.state_dict().items())


def test_a_folder_needs_no_file_from_elsewhere(saved):
    """The architecture is a table in it, though the model was built from a path."""
    table = json.loads((saved[1] / "config.json").read_text())

    assert isinstance(table["kosmos"]["vision"]["architecture"], dict)
    assert table["kosmos"]["vision"]["pretrained"] is None


def test_a_model_without_tokenizer_loads_without_one(tmp_path, kosmos_tower):
    save_folder(tiny_model(kosmos_tower), None, tmp_path / "model")

    assert load_folder(tmp_path / "model").tokenizer is None


def test_extra_control_tokens_come_along(tmp_path, kosmos_tower, kosmos_vocabulary):
    model = tiny_model(kosmos_tower, vocab_size=1098)

    save_folder(model, Tokenizer(kosmos_vocabulary, GROUNDING), tmp_path / "model")

    assert load_folder(tmp_path / "model").tokenizer.extra == GROUNDING


def test_a_tensor_keeps_its_dtype(tmp_path, kosmos_tower, kosmos_tokenizer):
    model = tiny_model(kosmos_tower)
    model.decoder.to(torch.bfloat16)
    save_folder(model, kosmos_tokenizer, tmp_path / "model")

    loaded = load_folder(tmp_path / "model").model

    assert loaded.decoder.layer_norm.weight.dtype == torch.bfloat16
    assert loaded.connector.dense.weight.dtype == torch.float32


def test_a_loaded_model_is_in_evaluation_mode(saved):
    assert not load_model(saved[1]).model.training


def test_a_loaded_model_does_not_change_with_its_folder(saved):
    loaded, file = load_model(saved[1]).model, saved[1] / "model.safetensors"

    with file.open("r+b") as weights:
        weights.seek(file.stat().st_size // 2)
        weights.write(bytes(file.stat().st_size // 2))

    expected = saved[0].state_dict()
    assert all(torch.equal(t, expected[name]) for name, t in loaded.state_dict().items())


# ---- written whole or not at all


def test_an_output_folder_that_is_not_empty_is_left_as_it_is(tmp_path, saved):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")

    with pytest.raises(UserError, match=r"other exists and is no empty folder; delete it or choose another --output"):
        save_folder(saved[0], None, tmp_path / "other")

    assert [path.name for path in (tmp_path / "other").iterdir()] == ["notes.txt"]


def test_an_empty_output_folder_is_taken(tmp_path, saved):
    (tmp_path / "empty").mkdir()

    save_folder(saved[0], None, tmp_path / "empty")

    assert load_folder(tmp_path / "empty").model.config.decoder.dim == 20


def test_an_output_that_is_a_file_is_left_as_it_is(tmp_path, saved):
    (tmp_path / "file").write_text("mine")

    with pytest.raises(UserError, match="file exists and is no empty folder"):
        save_folder(saved[0], None, tmp_path / "file")

    assert (tmp_path / "file").read_text() == "mine"


def test_an_output_below_a_file_is_the_users_error(tmp_path, saved):
    (tmp_path / "file").write_text("mine")

    with pytest.raises(UserError, match="cannot write"):
        save_folder(saved[0], None, tmp_path / "file" / "model")


def test_folders_above_the_output_are_made(tmp_path, saved):
    save_folder(saved[0], None, tmp_path / "a" / "b" / "model")

    assert (tmp_path / "a" / "b" / "model" / "config.json").is_file()


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, ValueError])
def test_an_interrupted_export_leaves_nothing(tmp_path, error):
    def interrupted() -> None:
        with new_folder(tmp_path / "out") as folder:
            (folder / "half.txt").write_text("half")
            raise error("stopped")

    with pytest.raises((error, UserError)):
        interrupted()

    assert list(tmp_path.iterdir()) == []


def test_the_output_folder_appears_when_it_is_complete(tmp_path):
    with new_folder(tmp_path / "out") as folder:
        (folder / "half.txt").write_text("half")
        assert not (tmp_path / "out").exists()

    assert [path.name for path in tmp_path.rglob("*")] == ["out", "half.txt"]


# ---- bad input


def test_a_folder_without_config_is_refused_with_the_expected_forms(tmp_path):
    with pytest.raises(UserError, match=r"no model folder: it has no config\.json\. .*`export` or `import`.*\(\.ckpt\)"):
        load_model(tmp_path)


@pytest.mark.parametrize("kind", ["llama", None, 3])
def test_another_models_folder_is_refused_with_the_expected_types(tmp_path, kind):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))

    with pytest.raises(UserError, match=r"'kosmos-lit'.*'kosmos-2'\) was expected"):
        load_model(tmp_path)


def test_a_missing_path_is_named(tmp_path):
    with pytest.raises(UserError, match=r"no checkpoint .*none"):
        load_model(tmp_path / "none")


@pytest.mark.parametrize("table", [None, 3, {}])
def test_a_folder_whose_config_tells_no_model_is_refused(tmp_path, table):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "kosmos-lit", "kosmos": table}))

    with pytest.raises(UserError, match=str(tmp_path)):
        load_model(tmp_path)


def test_a_setting_of_another_version_is_named(saved):
    table = json.loads((saved[1] / "config.json").read_text())
    table["kosmos"]["decoder"]["colour"] = "red"
    (saved[1] / "config.json").write_text(json.dumps(table))

    with pytest.raises(UserError, match="DecoderConfig has no field colour"):
        load_model(saved[1])


def test_all_mismatches_are_listed_at_once_with_both_shapes(saved):
    file = saved[1] / "model.safetensors"
    tensors = load_file(file)
    del tensors["connector.latent_query"]
    tensors |= {"decoder.layer_norm.weight": torch.ones(3, 7), "decoder.bias": torch.ones(5)}
    save_file(tensors, file)

    with pytest.raises(UserError) as caught:
        load_model(saved[1])

    assert str(caught.value).splitlines() == [
        f"{file} does not fit the model in 3 of {len(saved[0].state_dict())} tensors:",
        "  missing: connector.latent_query (3, 20)",
        "  surplus: decoder.bias (5,)",
        "  misshapen: decoder.layer_norm.weight is (3, 7) in the file, (20,) in the model",
    ]


@pytest.mark.parametrize("name", ["model.safetensors", "sentencepiece.bpe.model"])
def test_a_missing_file_of_a_folder_is_named(saved, name):
    (saved[1] / name).unlink()

    with pytest.raises(UserError, match=name):
        load_model(saved[1])


def test_a_tokenizer_with_more_ids_than_the_embedding_has_rows_is_refused(saved, kosmos_vocabulary):
    Tokenizer(kosmos_vocabulary, GROUNDING).save(saved[1])

    with pytest.raises(UserError, match=r"1,?098 ids.* 73 rows"):
        load_model(saved[1])


def test_a_checkpoint_that_would_run_code_is_refused_and_not_run(tmp_path):
    torch.save({"state_dict": {}, "hyper_parameters": MaliciousPickle(tmp_path / "exploded")}, tmp_path / "a.ckpt")

    with pytest.raises(UserError, match=r"a\.ckpt is no checkpoint that can be read safely"):
        load_model(tmp_path / "a.ckpt")

    assert not (tmp_path / "exploded").exists()
