"""Fine-tuning through the command line: of all weights, of some, and by adapters."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from kosmos_lit.checkpoint import AtomicCheckpointIO, load_checkpoint
from kosmos_lit.cli import main
from kosmos_lit.config import KosmosConfig, LoraConfig
from kosmos_lit.errors import UserError
from kosmos_lit.inference.engine import Engine
from kosmos_lit.init_from import freeze, from_pretrained
from kosmos_lit.lora import base_weights, load_adapter, merge_adapters
from kosmos_lit.model import Kosmos
from kosmos_lit.tokenizer import Tokenizer
from kosmos_lit.weights.folder import save_folder
from kosmos_lit.weights.load import load_model
from tests.cli_runs import losses, tiny_run

LORA = ["--model.kosmos.lora.rank=3", "--model.kosmos.lora.alpha=6"]


@pytest.fixture(scope="module")
def base_checkpoint(trained: Path) -> Path:
    """The checkpoint that training starts from."""
    return trained / "checkpoints" / "step=00000006.ckpt"


@pytest.fixture(scope="module")
def config(base_checkpoint: Path) -> KosmosConfig:
    return KosmosConfig.from_dict(load_checkpoint(base_checkpoint)["hyper_parameters"]["kosmos"])


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Examples of the world's new task, drawn by the first run that uses the folder."""
    return tmp_path_factory.mktemp("task") / "task"


def finetune(folder: Path, world: Path, task: Path, base_checkpoint: object, *more: str) -> int:
    """Run two steps on the task alone."""
    start = [f"--model.init_from={base_checkpoint}", "--trainer.max_steps=2", "--trainer.val_check_interval=2"]
    return main(tiny_run("fit", folder, world, *data_of(task), *start, *more))


def data_of(task: Path) -> list[str]:
    ratio = [f"--data.ratio.{name}=0" for name in ("text", "caption", "interleaved")] + ["--data.ratio.instruct=1"]
    return [f"--data.task.path={task}", "--data.task.n_examples=31", "--data.task.n_questions=7", *ratio]


def last(folder: Path) -> Path:
    return max((folder / "checkpoints").glob("*.ckpt"))


def trained_weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(last(folder))["state_dict"]  # type: ignore[no-any-return]


def changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


# ---- starting


def test_a_model_starts_with_the_weights_and_tokenizer_of_a_checkpoint(base_checkpoint: Path, config: KosmosConfig) -> None:
    weights = load_checkpoint(base_checkpoint)["state_dict"]

    model, tokenizer = from_pretrained(str(base_checkpoint), config)

    assert all(torch.equal(tensor, weights[f"net.{name}"]) for name, tensor in model.state_dict().items())
    assert tokenizer is not None


def test_an_exported_folder_gives_the_same_start(base_checkpoint: Path, config: KosmosConfig, tmp_path: Path) -> None:
    folder = str(tmp_path / "model")
    assert main(["export", "--ckpt_path", str(base_checkpoint), "--format", "safetensors", "--output", folder]) == 0

    one, other = from_pretrained(folder, config), from_pretrained(str(base_checkpoint), config)

    assert changed(one.model.state_dict(), other.model.state_dict()) == set()
    assert one.tokenizer is not None
    assert other.tokenizer is not None
    assert one.tokenizer.fingerprint == other.tokenizer.fingerprint


def test_training_starts_with_the_weights_of_a_checkpoint(
    base_checkpoint: Path, tmp_path: Path, tiny_world: Path, task: Path
) -> None:
    assert (
        finetune(
            tmp_path, tiny_world, task, base_checkpoint, "--model.optimizer.lr=1e-30", "--model.optimizer.weight_decay=0"
        )
        == 0
    )

    before, after = load_checkpoint(base_checkpoint)["state_dict"], trained_weights(tmp_path)
    assert changed(before, after) == set()


def test_a_vocabulary_may_have_more_rows(base_checkpoint: Path, config: KosmosConfig) -> None:
    larger = replace(config, decoder=replace(config.decoder, vocab_size=311))
    rows = load_checkpoint(base_checkpoint)["state_dict"]["net.decoder.embed_tokens.weight"]

    embeddings = from_pretrained(str(base_checkpoint), larger).model.decoder.embed_tokens.weight

    assert torch.equal(embeddings[: len(rows)], rows)
    assert len(embeddings) == 311
    assert embeddings[len(rows) :].std() > 0.1  # N(0, 1 / 24)


def test_fewer_rows_do_not_keep_the_storage_of_the_others(base_checkpoint: Path, config: KosmosConfig) -> None:
    tokenizer = load_model(base_checkpoint).tokenizer
    assert tokenizer is not None
    n_ids = tokenizer.vocab_size
    smaller = replace(config, decoder=replace(config.decoder, vocab_size=n_ids))

    embeddings = from_pretrained(str(base_checkpoint), smaller).model.decoder.embed_tokens.weight

    assert torch.equal(embeddings, load_checkpoint(base_checkpoint)["state_dict"]["net.decoder.embed_tokens.weight"][:n_ids])
    assert embeddings.untyped_storage().nbytes() == n_ids * 24 * 4


def test_only_missing_parameters_are_drawn(
    base_checkpoint: Path, config: KosmosConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Kosmos, "init", lambda _: pytest.fail("all parameters were drawn"))
    before = torch.get_rng_state()

    from_pretrained(str(base_checkpoint), replace(config, lora=LoraConfig(rank=3)), 5)

    assert torch.equal(torch.get_rng_state(), before)


def test_missing_parameters_are_drawn_from_the_seed(base_checkpoint: Path, config: KosmosConfig) -> None:
    wider = replace(config, decoder=replace(config.decoder, vocab_size=311), lora=LoraConfig(rank=3))

    one, same, other = (from_pretrained(str(base_checkpoint), wider, seed).model.state_dict() for seed in (5, 5, 7))

    assert changed(one, same) == set()
    missing = {name for name in one if ".lora_A." in name} | {"decoder.embed_tokens.weight"}
    assert changed(one, other) == missing


def test_a_half_precision_folder_gives_a_float32_start_that_trains(
    base_checkpoint: Path, config: KosmosConfig, tmp_path: Path
) -> None:
    model, tokenizer = load_model(base_checkpoint)
    half = model.bfloat16()
    save_folder(half, tokenizer, tmp_path / "half")

    model = from_pretrained(str(tmp_path / "half"), config).model

    assert all(torch.equal(tensor, half.state_dict()[name].float()) for name, tensor in model.state_dict().items())
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float32}
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_checkpoint_of_another_architecture_is_refused_naming_every_field(
    base_checkpoint: Path, tmp_path: Path, tiny_world: Path, task: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--model.kosmos.decoder.ffn_dim=52", "--model.kosmos.decoder.positions=learned"]

    assert finetune(tmp_path, tiny_world, task, base_checkpoint, *more) == 2

    message = capsys.readouterr().err
    assert "decoder.ffn_dim is 48 in the checkpoint, 52 in the run" in message
    assert "decoder.positions is 'xpos' in the checkpoint, 'learned' in the run" in message


def test_a_checkpoint_with_another_tokenizer_is_refused(
    base_checkpoint: Path,
    tmp_path: Path,
    tiny_world: Path,
    task: Path,
    tokenizer: Tokenizer,
    capsys: pytest.CaptureFixture[str],
) -> None:
    other = load_checkpoint(base_checkpoint) | {
        "tokenizer": torch.frombuffer(bytearray(tokenizer.to_bytes()), dtype=torch.uint8)
    }
    AtomicCheckpointIO().save_checkpoint(other, tmp_path / "other.ckpt")

    assert finetune(tmp_path, tiny_world, task, tmp_path / "other.ckpt") == 2

    assert f"was trained with tokenizer {tokenizer.fingerprint}, but the data's is" in capsys.readouterr().err


def test_a_resumed_run_continues_from_its_own_checkpoint(
    base_checkpoint: Path, tmp_path: Path, tiny_world: Path, task: Path
) -> None:
    uninterrupted, resumed = tmp_path / "uninterrupted", tmp_path / "resumed"
    assert finetune(uninterrupted, tiny_world, task, base_checkpoint, "--trainer.max_steps=4") == 0
    assert finetune(resumed, tiny_world, task, base_checkpoint, "--trainer.max_steps=3") == 0

    assert finetune(resumed, tiny_world, task, "gone.ckpt", "--trainer.max_steps=4", "--ckpt_path=last") == 0

    assert losses(resumed) == losses(uninterrupted)
    assert changed(trained_weights(resumed), trained_weights(uninterrupted)) == set()


def test_the_config_of_a_resumed_run_keeps_init_from(
    base_checkpoint: Path, tmp_path: Path, tiny_world: Path, task: Path
) -> None:
    assert finetune(tmp_path, tiny_world, task, base_checkpoint) == 0
    assert finetune(tmp_path, tiny_world, task, base_checkpoint, "--trainer.max_steps=3", "--ckpt_path=last") == 0

    record = yaml.safe_load((tmp_path / "config.resume-1.yaml").read_text(encoding="utf-8"))

    assert record["model"]["init_from"] == str(base_checkpoint)


# ---- frozen parts


def test_frozen_parameters_stay_and_all_others_change(
    base_checkpoint: Path, tmp_path: Path, tiny_world: Path, task: Path
) -> None:
    frozen = '--model.freeze=["vision", "decoder.layers.0", "*.bias", "decoder.embed_tokens.weight"]'

    assert finetune(tmp_path, tiny_world, task, base_checkpoint, frozen) == 0

    before, after = load_checkpoint(base_checkpoint)["state_dict"], trained_weights(tmp_path)
    updated = changed(before, after)
    frozen_prefixes = ("net.vision.", "net.decoder.layers.0.", "net.decoder.embed_tokens.")
    assert updated == {name for name in before if not name.startswith(frozen_prefixes) and not name.endswith(".bias")}


def test_a_pattern_that_names_nothing_is_refused(config: KosmosConfig) -> None:
    with pytest.raises(UserError, match=r"no parameter is named 'decoder.layer.0'; there are .*decoder.layers"):
        freeze(Kosmos.create(config), ["vision", "decoder.layer.0"])


def test_something_must_be_left_to_train(config: KosmosConfig) -> None:
    with pytest.raises(UserError, match="leave nothing to train"):
        freeze(Kosmos.create(config), ["vision", "connector", "decoder"])


def test_a_run_is_not_resumed_with_other_parts_frozen(
    base_checkpoint: Path, tmp_path: Path, tiny_world: Path, task: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert finetune(tmp_path, tiny_world, task, base_checkpoint, '--model.freeze=["vision"]') == 0

    assert finetune(tmp_path, tiny_world, task, base_checkpoint, "--trainer.max_steps=3", "--ckpt_path=last") == 2

    assert "resume with that run's model.freeze" in capsys.readouterr().err


# ---- adapters


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory, base_checkpoint: Path, tiny_world: Path, task: Path) -> Path:
    """The folder of a run with adapters."""
    folder = tmp_path_factory.mktemp("adapted")
    assert finetune(folder, tiny_world, task, base_checkpoint, *LORA, "--trainer.max_steps=4") == 0
    return folder


def test_adapters_train_and_the_base_stays(adapted: Path, base_checkpoint: Path) -> None:
    model, weights = load_model(last(adapted)).model, load_checkpoint(base_checkpoint)["state_dict"]

    assert all(torch.equal(tensor, weights[f"net.{name}"]) for name, tensor in base_weights(model).items())
    assert any(tensor.abs().max() > 0 for name, tensor in model.state_dict().items() if ".lora_B." in name)


def test_a_run_with_adapters_in_two_parts_equals_one(
    adapted: Path, base_checkpoint: Path, tmp_path: Path, tiny_world: Path, task: Path
) -> None:
    assert finetune(tmp_path, tiny_world, task, base_checkpoint, *LORA, "--trainer.max_steps=3") == 0
    assert finetune(tmp_path, tiny_world, task, base_checkpoint, *LORA, "--trainer.max_steps=4", "--ckpt_path=last") == 0

    assert changed(trained_weights(tmp_path), trained_weights(adapted)) == set()


def test_a_start_from_adapters_merges_them_or_keeps_them(adapted: Path, config: KosmosConfig) -> None:
    model = load_model(last(adapted)).model

    plain = from_pretrained(str(last(adapted)), config).model
    same = from_pretrained(str(last(adapted)), model.config).model

    assert changed(plain.state_dict(), merge_adapters(model).state_dict()) == set()
    assert changed(same.state_dict(), model.state_dict()) == set()


def test_a_checkpoint_with_adapters_generates_and_predicts(
    adapted: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny_world: Path, task: Path
) -> None:
    assert main(["generate", "--ckpt_path", str(last(adapted)), "--prompt", "a red", "--max_new_tokens", "5"]) == 0

    assert main(tiny_run("predict", tmp_path, tiny_world, *data_of(task), *LORA, f"--ckpt_path={last(adapted)}")) == 0

    lines = (tmp_path / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    predictions = [row for row in map(json.loads, lines) if row["task"] == "instruct"]
    assert len(predictions) == 7
    assert all(row["prompt"].startswith("<image> ") and row["target"] for row in predictions)


def test_adapters_are_exported_merged_or_alone(adapted: Path, base_checkpoint: Path, tmp_path: Path) -> None:
    export = ["export", "--ckpt_path", str(last(adapted))]
    assert main([*export, "--format", "safetensors", "--output", str(tmp_path / "merged")]) == 0
    assert main([*export, "--format", "adapter", "--output", str(tmp_path / "adapter")]) == 0

    merged = load_model(tmp_path / "merged").model
    again = load_adapter(load_model(base_checkpoint).model, tmp_path / "adapter")

    assert merged.config.lora is None
    assert changed(merged.state_dict(), merge_adapters(load_model(last(adapted)).model).state_dict()) == set()
    assert changed(merged.state_dict(), merge_adapters(again).state_dict()) == set()


def test_a_model_with_adapters_generates_what_the_merged_one_does(adapted: Path) -> None:
    model, tokenizer = load_model(last(adapted))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
    image = np.arange(3 * 28 * 28, dtype=np.uint8).reshape(3, 28, 28)

    def text(model: Kosmos) -> str:
        return Engine(model, tokenizer).generate("a red", [image], max_new_tokens=11)

    assert text(model) == text(merge_adapters(model))
    assert text(model) != text(load_model(last(adapted)).model)


def test_adapters_do_not_resume_a_run_without(
    adapted: Path, base_checkpoint: Path, tiny_world: Path, task: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert finetune(adapted, tiny_world, task, base_checkpoint, "--trainer.max_steps=5", "--ckpt_path=last") == 2

    assert "lora is (3, 6.0, " in capsys.readouterr().err


def test_weights_that_do_not_fit_are_told_before_data_are_prepared(
    tmp_path: Path, tiny_world: Path, base_checkpoint: Path, config: KosmosConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    save_folder(Kosmos.create(config), None, tmp_path / "folder")
    world = tmp_path / "no world"  # which `fit` would draw first
    other = ["--model.kosmos.decoder.n_layers=3"]
    for path in (base_checkpoint, tmp_path / "folder"):
        assert main(tiny_run("fit", tmp_path / "run", world, f"--model.init_from={path}", *other)) == 2
        assert "decoder.n_layers is 2 in the checkpoint, 3 in the run" in capsys.readouterr().err
        assert main(["plan", *tiny_run("fit", tmp_path / "run", tiny_world, f"--model.init_from={path}", *other)[1:]]) == 1
        assert "decoder.n_layers is 2 in the checkpoint, 3 in the run" in capsys.readouterr().out

    assert main(tiny_run("fit", tmp_path / "run", world, "--model.init_from=models/nothere")) == 2
    assert "model.init_from: there is no models/nothere; public weights become one by" in capsys.readouterr().err
    main(["plan", *tiny_run("fit", tmp_path / "run", tiny_world, "--model.init_from=models/nothere")[1:]])
    assert "models/nothere is not there yet; `import` makes it" in capsys.readouterr().out
    assert not world.exists()
