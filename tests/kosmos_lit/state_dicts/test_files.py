"""Files of tensors from anywhere: whole or in shards, old and new, damaged and malicious."""

from __future__ import annotations

import json
import pickle
import zipfile
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from kosmos_lit.errors import UserError
from kosmos_lit.state_dicts.files import read_json, read_pickle, read_tensors
from tests.kosmos_lit.weights.malicious_pickle import MaliciousPickle

TENSORS = {"a.weight": torch.arange(15.0).view(3, 5), "a.bias": torch.ones(3), "b": torch.tensor([7, 11])}


def same(actual, expected=TENSORS) -> bool:
    return actual.keys() == expected.keys() and all(torch.equal(actual[name], t) for name, t in expected.items())


# ---- what is read


def test_a_safetensors_file_is_read(tmp_path):
    save_file(TENSORS, tmp_path / "a.safetensors")

    assert same(read_tensors(tmp_path / "a.safetensors"))


@pytest.mark.parametrize("name", ["a.pt", "a.bin", "a.ckpt"])
def test_a_state_dict_is_read_whatever_its_file_is_called(tmp_path, name):
    torch.save(TENSORS, tmp_path / name)

    assert same(read_tensors(tmp_path / name))


def test_a_state_dict_of_before_torch_1_6_is_read(tmp_path):
    torch.save(TENSORS, tmp_path / "a.pt", _use_new_zipfile_serialization=False)

    assert same(read_tensors(tmp_path / "a.pt"))


def test_a_state_dict_among_other_things_is_found_as_open_clips_training_writes_it(tmp_path):
    torch.save({"epoch": 3, "name": "run", "state_dict": TENSORS}, tmp_path / "a.pt")

    assert same(read_tensors(tmp_path / "a.pt"))


@pytest.mark.parametrize(("shard", "ending"), [("model", "safetensors"), ("pytorch_model", "bin")])
def test_shards_are_put_together(tmp_path, shard, ending):
    first, second = (f"{shard}-0000{i}-of-00002.{ending}" for i in (1, 2))
    write = save_file if shard == "model" else torch.save
    write({"a.weight": TENSORS["a.weight"]}, tmp_path / first)
    write({"a.bias": TENSORS["a.bias"], "b": TENSORS["b"]}, tmp_path / second)
    places = {"a.weight": first, "a.bias": second, "b": second}
    (tmp_path / f"{shard}.{ending}.index.json").write_text(json.dumps({"weight_map": places}))

    assert same(read_tensors(tmp_path))


def test_a_folder_with_both_kinds_is_read_from_safetensors(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors")
    torch.save({"other": torch.ones(1)}, tmp_path / "pytorch_model.bin")

    assert same(read_tensors(tmp_path))


def test_options_of_a_training_script_are_plain_data(tmp_path):
    torch.save({"args": Namespace(heads=3, betas=[0.9, 0.98])}, tmp_path / "a.pt")

    assert read_pickle(tmp_path / "a.pt")["args"] == Namespace(heads=3, betas=[0.9, 0.98])


def test_nothing_more_is_allowed_to_others_afterwards(tmp_path):
    torch.save({"args": Namespace(heads=3)}, tmp_path / "a.pt")
    before = set(torch.serialization.get_safe_globals())

    read_pickle(tmp_path / "a.pt")

    assert set(torch.serialization.get_safe_globals()) == before


# ---- what is refused


@pytest.mark.parametrize("content", [lambda b: b, lambda b: {"w": torch.ones(1), "x": b}, lambda b: Namespace(x=b)])
@pytest.mark.parametrize("is_zip", [True, False])
def test_a_pickle_that_would_run_code_is_refused_and_not_run(tmp_path, content, is_zip):
    torch.save(content(MaliciousPickle(tmp_path / "exploded")), tmp_path / "a.pt", _use_new_zipfile_serialization=is_zip)

    with pytest.raises(UserError, match=r"a\.pt is not read: it refers to \S*open, and only tensors and plain data"):
        read_tensors(tmp_path / "a.pt")

    assert not (tmp_path / "exploded").exists()


def test_a_pickled_module_is_refused_by_its_class(tmp_path):
    torch.save(torch.nn.Linear(3, 5), tmp_path / "a.pt")

    with pytest.raises(UserError, match=r"it refers to torch\.nn\.modules\.linear\.Linear"):
        read_tensors(tmp_path / "a.pt")


def test_a_plain_pickle_of_python_is_refused_and_not_run(tmp_path):
    (tmp_path / "a.pt").write_bytes(pickle.dumps(MaliciousPickle(tmp_path / "exploded")))

    with pytest.raises(UserError, match=r"a\.pt"):
        read_tensors(tmp_path / "a.pt")

    assert not (tmp_path / "exploded").exists()


@pytest.mark.filterwarnings("ignore:.torch.jit")
def test_a_compiled_program_is_refused_as_such(tmp_path):
    """OpenAI's own files of CLIP are TorchScript."""
    program = torch.jit.trace(torch.nn.Linear(3, 5), torch.ones(3), check_trace=False)
    torch.jit.save(program, tmp_path / "ViT-L-14.pt")

    with pytest.raises(UserError, match=r"^\S*ViT-L-14\.pt is a TorchScript program"):
        read_tensors(tmp_path / "ViT-L-14.pt")


@pytest.mark.parametrize("content", [[torch.ones(3)], {"a": 3}, {"a": {"b": torch.ones(3)}}, torch.ones(3)], ids=str)
def test_what_is_no_table_of_tensors_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "a.pt")

    with pytest.raises(UserError, match=r"a\.pt is no table of tensors by name"):
        read_tensors(tmp_path / "a.pt")


def cut(path: Path, share: float) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.97])
@pytest.mark.parametrize("name", ["a.pt", "a.safetensors", "old.pt"])
def test_a_file_that_is_cut_off_is_refused(tmp_path, name, share):
    path = tmp_path / name
    match name:
        case "a.safetensors":
            save_file(TENSORS, path)
        case "a.pt":
            torch.save(TENSORS, path)
        case _:
            torch.save(TENSORS, path, _use_new_zipfile_serialization=False)
    cut(path, share)

    with pytest.raises(UserError, match=rf"{name} is (no whole|not read)"):
        read_tensors(path)


@pytest.mark.parametrize("is_zip", [True, False])
def test_a_garbled_file_gives_tensors_or_is_refused(tmp_path, is_zip):
    """Nothing but a UserError, wherever bytes are wrong or missing."""
    path = tmp_path / "a.pt"
    torch.save({"a": torch.ones(3)}, path, _use_new_zipfile_serialization=is_zip)
    content = path.read_bytes()
    outcomes = set()
    for at in range(0, len(content), 7):
        for damaged in (content[:at], content[:at] + bytes([255 - content[at]]) + content[at + 1 :]):
            path.write_bytes(damaged)
            try:
                outcomes.add(type(read_tensors(path)))
            except UserError:
                outcomes.add(UserError)
    assert outcomes == {dict, UserError}


@pytest.mark.parametrize("name", ["a.pt", "a.safetensors"])
def test_a_file_of_something_else_is_refused(tmp_path, name):
    (tmp_path / name).write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(range(256)))

    with pytest.raises(UserError, match=name):
        read_tensors(tmp_path / name)


def test_a_zip_file_of_something_else_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        archive.writestr("readme.txt", "no tensors")

    with pytest.raises(UserError, match=r"a\.pt is no whole file"):
        read_tensors(tmp_path / "a.pt")


def test_a_shard_that_is_missing_is_named(tmp_path):
    places = {"weight_map": {"a": "model-00001-of-00001.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(places))

    with pytest.raises(UserError, match=r"no weight file .*model-00001-of-00001\.safetensors"):
        read_tensors(tmp_path)


@pytest.mark.parametrize(
    "content",
    [{"weight_map": [1]}, {"weight_map": {"a": 3}}, {"weight_map": {}}, {}, [], {"weight_map": {"a": "../b.safetensors"}}],
    ids=str,
)
def test_an_index_that_names_no_shards_of_its_folder_is_refused(tmp_path, content):
    folder = tmp_path / "model"
    folder.mkdir()
    save_file(TENSORS, tmp_path / "b.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))

    with pytest.raises(UserError, match=r"model\.safetensors\.index\.json"):
        read_tensors(folder)


def test_a_folder_without_weights_says_what_was_expected(tmp_path):
    with pytest.raises(UserError, match=r"holds no weights: one of model\.safetensors, .*pytorch_model\.bin.* was expected"):
        read_tensors(tmp_path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"no weight file .*none\.pt"):
        read_tensors(tmp_path / "none.pt")


@pytest.mark.parametrize(
    ("content", "reason"), [(b"{", "is no JSON"), (b"[1]", "holds no JSON object"), (b"\xff\xfe", "is no JSON")]
)
def test_json_that_is_none_is_refused(tmp_path, content, reason):
    (tmp_path / "config.json").write_bytes(content)

    with pytest.raises(UserError, match=rf"config\.json {reason}"):
        read_json(tmp_path / "config.json")


def test_missing_json_is_named(tmp_path):
    with pytest.raises(UserError, match=r"no file .*config\.json"):
        read_json(tmp_path / "config.json")
