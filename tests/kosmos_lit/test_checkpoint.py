import os
import pickle
import random
import re
import resource
import zipfile
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from kosmos_lit import checkpoint as checkpoints
from kosmos_lit.checkpoint import AtomicCheckpointIO, check_architecture, content_hash, find_last, load_checkpoint
from kosmos_lit.errors import UserError
from kosmos_lit.weights.load import load_model
from tests.kosmos_lit.tiny_kosmos import batch_of, image_doc, tiny_config, tiny_model

CONFIG = tiny_config("ViT-B-16")


def checkpoint(step: int = 3, config=CONFIG, **more) -> dict:
    return {"hyper_parameters": {"kosmos": asdict(config)}, "global_step": step, "state_dict": {}} | more


def save(path: Path, content: object = None) -> Path:
    AtomicCheckpointIO().save_checkpoint(checkpoint() if content is None else content, path)
    return path


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])


class RunsCode:
    """Unpickled without care, it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


# ---- writing


def test_a_checkpoint_comes_back_as_it_was_written(tmp_path):
    path = save(tmp_path / "new" / "folder" / "a.ckpt", checkpoint(7, weights=torch.arange(11)))
    read = load_checkpoint(path)
    assert torch.equal(read["weights"], torch.arange(11))
    assert (read["global_step"], read["hyper_parameters"]["kosmos"]) == (7, asdict(CONFIG))
    assert os.listdir(path.parent) == ["a.ckpt"]


def test_a_checkpoint_replaces_the_one_before(tmp_path):
    path = save(tmp_path / "a.ckpt", checkpoint(7))
    save(path, checkpoint(11))
    assert load_checkpoint(path)["global_step"] == 11


def test_a_full_disk_leaves_the_old_file_and_is_the_users_error(tmp_path):
    path = save(tmp_path / "a.ckpt", checkpoint(7))
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # the kernel ends the write in its middle
    try:
        with pytest.raises(UserError, match=r"cannot write checkpoint .*a.ckpt: .*; earlier checkpoints are untouched"):
            save(path, checkpoint(11, weights=torch.zeros(250_000)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["a.ckpt"]


def test_an_error_while_writing_leaves_the_old_file(tmp_path, monkeypatch):
    path = save(tmp_path / "a.ckpt", checkpoint(7))
    before = path.read_bytes()

    def half(content, file):
        file.write(b"half of it")
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints, "torch", SimpleNamespace(save=half))
    with pytest.raises(KeyboardInterrupt):
        save(path, checkpoint(11))
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["a.ckpt"]


def test_the_new_file_is_on_disk_before_it_takes_the_old_ones_place(tmp_path, monkeypatch):
    order = []
    fsync, move = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (order.append("fsync"), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (order.append("rename"), move(a, b)))
    save(tmp_path / "a.ckpt")
    assert order == ["fsync", "rename", "fsync"]  # the file, its name, the folder


def test_what_a_killed_writer_left_is_cleared_away(tmp_path):
    (tmp_path / ".a.ckpt.123.tmp").write_bytes(b"half of it")
    save(tmp_path / "b.ckpt")
    assert os.listdir(tmp_path) == ["b.ckpt"]


# ---- reading


def test_no_file_is_the_users_error(tmp_path):
    with pytest.raises(UserError, match=r"no checkpoint .*missing.ckpt"):
        load_checkpoint(tmp_path / "missing.ckpt")


@pytest.mark.parametrize("protocol", ["zip", "pickle"])
def test_code_in_a_checkpoint_is_refused_and_not_run(tmp_path, protocol):
    path, trace = tmp_path / "evil.ckpt", tmp_path / "trace"
    content = checkpoint(more=RunsCode(trace))
    if protocol == "zip":
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content))
    with pytest.raises(UserError, match=r"evil.ckpt is no checkpoint that can be read safely"):
        load_checkpoint(path)
    assert not trace.exists()


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.99])
def test_a_truncated_file_is_the_users_error(tmp_path, share):
    path = save(tmp_path / "a.ckpt", checkpoint(weights=torch.arange(1001)))
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(UserError, match=r"a.ckpt is no checkpoint that can be read safely"):
        load_checkpoint(path)


def flip(path: Path, at: int, bits: int = 0xFF) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= bits
    path.write_bytes(data)


def test_a_flipped_bit_in_any_record_is_the_users_error(tmp_path):
    path = save(tmp_path / "a.ckpt", checkpoint(weights=torch.arange(1001)))
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        records = {r.filename: whole.find(archive.read(r), r.header_offset) for r in archive.infolist() if r.file_size}
    assert {"a/data.pkl", "a/data/0"} <= {f"a/{name.partition('/')[2]}" for name in records}

    for at in records.values():
        path.write_bytes(whole)
        flip(path, at, 0b100)
        with pytest.raises(UserError, match=r"a.ckpt is no checkpoint that can be read safely: Bad CRC-32"):
            load_checkpoint(path)


def test_whatever_is_garbled_a_checkpoint_is_whole_or_the_users_error(tmp_path):
    path = save(tmp_path / "a.ckpt", checkpoint(weights=torch.arange(101)))
    whole, expected = path.read_bytes(), torch.arange(101)
    draw, n_refused = random.Random(0), 0
    for _ in range(300):
        data = bytearray(whole)
        for _ in range(draw.choice([1, 1, 3, 64])):
            data[draw.randrange(len(data))] = draw.randrange(256)
        path.write_bytes(data)
        try:
            assert torch.equal(load_checkpoint(path)["weights"], expected)
        except UserError:
            n_refused += 1
    assert n_refused > 100  # the rest hit the space between records, which torch fills up


@pytest.mark.parametrize("error", [TypeError("?"), IndexError(), AttributeError("?"), RecursionError(), MemoryError()])
def test_whatever_reading_raises_is_the_users_error(tmp_path, monkeypatch, error):
    save(tmp_path / "a.ckpt", checkpoint(7))
    newest = save(tmp_path / "b.ckpt", checkpoint(11))
    load = torch.load

    def fails(path, **kwargs):
        if Path(path) == newest:
            raise error
        return load(path, **kwargs)

    monkeypatch.setattr(torch, "load", fails)
    assert find_last(tmp_path) == tmp_path / "a.ckpt"


def test_a_compressed_record_is_the_users_error(tmp_path):
    path = save(tmp_path / "a.ckpt", checkpoint(weights=torch.zeros(1001)))
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(tmp_path / "b.ckpt", "w", zipfile.ZIP_DEFLATED) as bomb:
        for record in archive.infolist():
            bomb.writestr(record.filename, archive.read(record))
    with pytest.raises(UserError, match=r"b.ckpt is no checkpoint that can be read safely: .* is compressed"):
        load_checkpoint(tmp_path / "b.ckpt")


def test_the_hash_is_of_the_content_and_not_of_the_name(tmp_path):
    hashes = [
        content_hash(save(tmp_path / name, checkpoint(weights=torch.full((11,), value))))
        for name, value in (("a.ckpt", 1.0), ("another.ckpt", 1.0), ("c.ckpt", 2.0))
    ]
    assert hashes[0] == hashes[1] != hashes[2]


def test_a_file_that_changed_is_checked_again(tmp_path):
    path = save(tmp_path / "a.ckpt", checkpoint(weights=torch.arange(1001)))
    load_checkpoint(path)
    flip(path, path.stat().st_size // 2)
    with pytest.raises(UserError, match="Bad CRC-32"):
        load_checkpoint(path)


@pytest.mark.parametrize("data", [b"some text", b"\x80\x02}q\x00.", b"\x80\x02K\x01.", b"PK\x03\x04", bytes(99)])
def test_a_file_of_another_kind_is_the_users_error(tmp_path, data):
    (tmp_path / "a.ckpt").write_bytes(data)
    with pytest.raises(UserError, match=r"a.ckpt is no checkpoint"):
        load_checkpoint(tmp_path / "a.ckpt")


@pytest.mark.parametrize(
    "content",
    [{"state_dict": {}}, {"hyper_parameters": {"lr": 0.1}}, {"hyper_parameters": None}, [1, 2], torch.zeros(3), {}],
    ids=["weights only", "another project's", "no parameters", "a list", "a tensor", "empty"],
)
def test_a_checkpoint_of_something_else_is_the_users_error(tmp_path, content):
    torch.save(content, tmp_path / "a.ckpt")
    with pytest.raises(UserError, match=r"a.ckpt is no checkpoint of kosmos-lit: it does not say which model it holds"):
        load_checkpoint(tmp_path / "a.ckpt")


# ---- finding


def test_the_last_checkpoint_is_the_one_of_the_highest_step(tmp_path):
    for name, step in (("a", 7), ("b", 113), ("c", 23)):
        os.utime(save(tmp_path / f"{name}.ckpt", checkpoint(step)), (1000 - step, 1000 - step))
    assert find_last(tmp_path) == tmp_path / "b.ckpt"


def test_a_truncated_checkpoint_is_passed_over(tmp_path):
    for name, step in (("a", 7), ("b", 113), ("c", 23)):
        save(tmp_path / f"{name}.ckpt", checkpoint(step))
    cut(tmp_path / "b.ckpt")
    assert find_last(tmp_path) == tmp_path / "c.ckpt"


def test_a_newest_checkpoint_with_a_flipped_bit_is_passed_over(tmp_path, capsys):
    for name, step in (("a", 7), ("b", 11), ("c", 13)):
        save(tmp_path / f"{name}.ckpt", checkpoint(step, weights=torch.arange(1001)))
    for name in "bc":
        flip(tmp_path / f"{name}.ckpt", (tmp_path / f"{name}.ckpt").stat().st_size // 2, 1)
    assert find_last(tmp_path) == tmp_path / "a.ckpt"
    skipped = capsys.readouterr().err
    assert all(f"skipped: {tmp_path / name}.ckpt is no checkpoint that can be read safely" in skipped for name in "bc")


def test_what_is_passed_over_is_named(tmp_path, capsys):
    save(tmp_path / "a.ckpt", checkpoint(7))
    cut(save(tmp_path / "b.ckpt", checkpoint(11)))
    find_last(tmp_path)
    assert f"skipped: {tmp_path / 'b.ckpt'} is no checkpoint that can be read safely" in capsys.readouterr().err


def test_a_checkpoint_without_a_step_is_passed_over(tmp_path):
    save(tmp_path / "a.ckpt", checkpoint(7))
    save(tmp_path / "b.ckpt", {"hyper_parameters": {"kosmos": asdict(CONFIG)}})
    assert find_last(tmp_path) == tmp_path / "a.ckpt"


def test_nothing_but_damaged_checkpoints_is_the_users_error(tmp_path):
    for name in "ab":
        cut(save(tmp_path / f"{name}.ckpt"))
    with pytest.raises(UserError, match=r"no checkpoint in .* can be read: .*delete them to start over") as caught:
        find_last(tmp_path)
    assert {"a.ckpt", "b.ckpt"} <= set(str(caught.value).replace("/", " ").split())


@pytest.mark.parametrize("files", [(), ("a.txt", ".a.ckpt.1.tmp")])
def test_a_folder_without_checkpoints_has_no_last_one(tmp_path, files):
    for name in files:
        (tmp_path / name).write_bytes(b"?")
    assert find_last(tmp_path) is None


# ---- comparing


def test_a_checkpoint_of_the_same_architecture_passes():
    other = tiny_config("ViT-B-16", vision={"pretrained": "x.pt"}, dropout_rate=0.5, init="magneto", loss_chunk=5)
    check_architecture(CONFIG, other, "a.ckpt")
    assert other != CONFIG


def test_every_field_that_differs_is_named():
    other = tiny_config("ViT-B-16", vision={"feature_length": 90.0}, connector="linear", n_layers=3, norm="pre")
    with pytest.raises(UserError) as caught:
        check_architecture(CONFIG, other, "a.ckpt")
    start, *fields = str(caught.value).replace("architecture: ", "architecture; ").split("; ")
    assert start == "a.ckpt holds a model of another architecture"
    assert sorted(fields) == [
        "connector.kind is 'resampler' in the checkpoint, 'linear' in the run",
        "decoder.n_layers is 2 in the checkpoint, 3 in the run",
        "decoder.norm is 'sub' in the checkpoint, 'pre' in the run",
        "vision.feature_length is 1.0 in the checkpoint, 90.0 in the run",
    ]


# ---- models


def checkpoint_of(model, vocabulary: bytes, **changes) -> dict:
    weights = {f"net.{name}": value for name, value in model.state_dict().items()}
    tokenizer = torch.frombuffer(bytearray(vocabulary), dtype=torch.uint8)
    config = replace(model.config, vision=model.config.vision.resolved())  # as training stores it
    return checkpoint(3, config, state_dict=weights, tokenizer=tokenizer) | changes


def test_a_checkpoint_gives_model_and_tokenizer(tmp_path, kosmos_tower, kosmos_vocabulary, kosmos_tokenizer):
    model = tiny_model(kosmos_tower, positions="learned")
    loaded, tokenizer = load_model(save(tmp_path / "a.ckpt", checkpoint_of(model, kosmos_vocabulary)))
    batch = batch_of([[image_doc(3)]], 11)
    assert torch.equal(loaded(batch), model(batch))
    assert (tokenizer.fingerprint, loaded.training) == (kosmos_tokenizer.fingerprint, False)


def test_a_loaded_model_needs_no_pretrained_weights(tmp_path, kosmos_tower, kosmos_vocabulary):
    content = checkpoint_of(tiny_model(kosmos_tower), kosmos_vocabulary)
    content["hyper_parameters"]["kosmos"]["vision"]["pretrained"] = "gone/weights.pt"
    loaded = load_model(save(tmp_path / "a.ckpt", content)).model
    assert loaded.config.vision.pretrained is None


def test_missing_weights_are_the_users_error(tmp_path, kosmos_tower, kosmos_vocabulary):
    content = checkpoint_of(tiny_model(kosmos_tower), kosmos_vocabulary)
    del content["state_dict"]["net.decoder.layer_norm.bias"]
    listed = r"a.ckpt does not fit the model in 1 of \d+ tensors:\n  missing: decoder.layer_norm.bias \(20,\)$"
    with pytest.raises(UserError, match=listed):
        load_model(save(tmp_path / "a.ckpt", content))


@pytest.mark.parametrize(
    ("architecture", "named"),
    [
        ("hf-hub:someone/model", "'hf-hub:someone/model'"),
        ("/etc/tower.json", "'/etc/tower.json'"),
        ({"embed_dim": 8, "vision_cfg": {"timm_model_name": "hf-hub:someone/model"}}, "'hf-hub:someone/model'"),
        ({"embed_dim": 8, "vision_cfg": {"timm_model_name": "local-dir:/etc"}}, "'local-dir:/etc'"),
        (
            {"embed_dim": 8, "vision_cfg": {"timm_model_name": "vit_tiny_patch16_224", "timm_model_pretrained": True}},
            "the released weights of 'vit_tiny_patch16_224'",
        ),
    ],
)
def test_a_checkpoint_reaches_no_host_and_no_other_file(tmp_path, kosmos_tower, kosmos_vocabulary, architecture, named):
    content = checkpoint_of(tiny_model(kosmos_tower), kosmos_vocabulary)
    content["hyper_parameters"]["kosmos"]["vision"]["architecture"] = architecture
    with pytest.raises(UserError, match=re.escape(f"a.ckpt: its vision.architecture names {named}; ")):
        load_model(save(tmp_path / "a.ckpt", content))


@pytest.mark.parametrize("part", ["decoder", "vision"])
def test_a_checkpoint_asks_for_no_more_layers_than_it_has_tensors(tmp_path, kosmos_tower, kosmos_vocabulary, part):
    content = checkpoint_of(tiny_model(kosmos_tower), kosmos_vocabulary)
    kosmos = content["hyper_parameters"]["kosmos"]
    if part == "decoder":
        kosmos["decoder"]["n_layers"] = 10**12
    else:
        kosmos["vision"]["architecture"]["vision_cfg"]["layers"] = 10**12
    with pytest.raises(UserError, match=r"layers is 1000000000000, but it holds no more than \d+ tensors"):
        load_model(save(tmp_path / "a.ckpt", content))
