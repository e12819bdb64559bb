"""Adapters: what trains, that merging and peft's own files compute the same."""

from __future__ import annotations

import copy
import json
import re
from dataclasses import replace

import pytest
import torch

from kosmos_lit.config import LoraConfig
from kosmos_lit.errors import UserError
from kosmos_lit.lora import base_weights, load_adapter, merge_adapters, save_adapter, without_lora
from kosmos_lit.model import Kosmos
from tests.kosmos_lit.tiny_kosmos import batch_of, image_doc, normal, shaken, text_doc, tiny_config

LORA = LoraConfig(rank=3, alpha=5.0, dropout_rate=0.0)
BATCH = batch_of([[image_doc(5, n_images=2), text_doc(7)], [text_doc(11)]], 41)
EXACT = {"rtol": 0.0, "atol": 1e-5}  # fp32, 2 layers, outputs of size 3: measured 2e-6


@pytest.fixture(scope="module")
def adapted(kosmos_tower):
    """A model whose adapters, like all its weights, are not zero."""
    return shaken(Kosmos.create(replace(tiny_config(kosmos_tower), lora=LORA))).eval()


@pytest.fixture(scope="module")
def base(adapted):
    return without_lora(adapted, base_weights(adapted))


def test_a_new_adapter_changes_nothing(kosmos_tower):
    plain = Kosmos.create(tiny_config(kosmos_tower), 7)
    new = Kosmos.create(replace(tiny_config(kosmos_tower), lora=LORA), 7)
    assert all(torch.equal(tensor, plain.state_dict()[name]) for name, tensor in base_weights(new).items())
    torch.testing.assert_close(new.eval()(BATCH), plain.eval()(BATCH), **EXACT)


def test_only_adapters_train_and_each_matrix_of_decoder_and_connector_has_one(adapted):
    trained = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert all(".lora_A." in name or ".lora_B." in name for name in trained)
    owners = {name.split(".lora_")[0] for name in trained}
    matrices = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "ffn.fc1", "ffn.fc2")
    expected = {f"decoder.layers.{i}.{m}" for i in (0, 1) for m in matrices}
    assert owners == expected | {f"connector.x_attn.{m}_proj" for m in ("q", "k", "v", "out")}


def test_targets_may_be_fewer(kosmos_tower):
    model = Kosmos.create(replace(tiny_config(kosmos_tower), lora=replace(LORA, targets=("self_attn.q_proj", "fc2"))))
    owners = {name.split(".lora_")[0].split(".", 3)[-1] for name in model.state_dict() if ".lora_" in name}
    assert owners == {"self_attn.q_proj", "ffn.fc2"}


def test_a_target_that_is_nowhere_is_named(kosmos_tower):
    config = replace(tiny_config(kosmos_tower), lora=replace(LORA, targets=("q_proj", "qproj", "c_fc")))
    with pytest.raises(UserError, match=r"lora.targets: no matrix of decoder or connector ends with qproj, c_fc"):
        Kosmos.create(config)


def test_merged_equals_unmerged_and_has_a_plain_models_tensors(adapted, kosmos_tower):
    plain = merge_adapters(adapted)
    assert plain.config.lora is None
    assert plain.state_dict().keys() == Kosmos(tiny_config(kosmos_tower)).state_dict().keys()
    torch.testing.assert_close(plain(BATCH), adapted(BATCH), **EXACT)


def test_the_adapter_matters(adapted, base):
    assert (base(BATCH) - adapted(BATCH)).abs().max() > 0.1


def test_a_model_without_adapters_is_merged_already(base):
    assert merge_adapters(base) is base


def test_a_saved_adapter_on_the_base_gives_the_model_again(adapted, base, tmp_path):
    save_adapter(adapted, tmp_path)
    again = load_adapter(base, tmp_path)
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in adapted.state_dict().items())


def test_peft_itself_reads_a_saved_adapter(adapted, base, tmp_path):
    import peft

    save_adapter(adapted, tmp_path)
    plain = without_lora(adapted, base_weights(adapted))
    model = peft.PeftModel.from_pretrained(plain, tmp_path)
    torch.testing.assert_close(model(BATCH), adapted(BATCH), **EXACT)


def test_an_adapter_written_by_peft_computes_the_same(base, tmp_path):
    model = by_peft(base, tmp_path)
    torch.testing.assert_close(load_adapter(base, tmp_path)(BATCH), model(BATCH), **EXACT)


def by_peft(base, folder, **settings):
    """Return the base with an adapter by peft, none of whose weights is zero, after peft has saved that."""
    import peft

    table = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["self_attn.q_proj", "fc2"], **settings)
    model = peft.get_peft_model(copy.deepcopy(base), table)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.copy_(normal(*parameter.shape, seed=len(name)))
    model.save_pretrained(folder)
    return model.eval()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("use_rslora", True),
        ("rank_pattern", {"fc2": 2}),
        ("alpha_pattern", {"fc2": 7}),
        ("layers_to_transform", [1]),
    ],
)
def test_an_adapter_that_peft_scales_or_places_otherwise_is_refused(base, tmp_path, field, value):
    by_peft(base, tmp_path, **{field: value} | ({"layers_pattern": "layers"} if field == "layers_to_transform" else {}))
    with pytest.raises(UserError, match=re.escape(f"{field} is {value!r}")):
        load_adapter(base, tmp_path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("peft_type", "LOHA"),
        ("target_modules", "all-linear"),
        ("use_dora", True),
        ("bias", "lora_only"),
        ("lora_bias", True),
        ("modules_to_save", ["embed_tokens"]),
        ("fan_in_fan_out", True),
        ("exclude_modules", ["fc1"]),
        ("init_lora_weights", "pissa"),
        ("trainable_token_indices", [3]),
        ("a_field_of_a_later_peft", 0.5),
    ],
)
def test_a_field_that_changes_what_an_adapter_computes_is_refused_by_name_and_value(adapted, base, tmp_path, field, value):
    save_adapter(adapted, tmp_path)
    change_table(tmp_path, {field: value})
    with pytest.raises(UserError, match=re.escape(f"adapter_config.json: {field} is {value!r}, but only plain LoRA")):
        load_adapter(base, tmp_path)


def test_every_field_that_is_wrong_is_named(adapted, base, tmp_path):
    save_adapter(adapted, tmp_path)
    change_table(tmp_path, {"use_dora": True, "bias": "all"})
    with pytest.raises(UserError, match=r"(?=.*use_dora is True)(?=.*bias is 'all')"):
        load_adapter(base, tmp_path)


def test_fields_about_the_file_or_its_training_are_no_reason_to_refuse(adapted, base, tmp_path):
    save_adapter(adapted, tmp_path)
    change_table(tmp_path, {"base_model_name_or_path": "b", "lora_dropout": 0.1, "init_lora_weights": "gaussian"})
    torch.testing.assert_close(load_adapter(base, tmp_path)(BATCH), adapted(BATCH), **EXACT)


def change_table(folder, fields):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | fields), encoding="utf-8")


def test_merging_keeps_each_tensor_s_dtype_and_adds_in_float32(adapted):
    model = copy.deepcopy(adapted).bfloat16()
    model.vision.float()
    names = base_weights(model)
    plain = merge_adapters(model).state_dict()
    assert {name: tensor.dtype for name, tensor in plain.items()} == {name: t.dtype for name, t in names.items()}
    layer = model.decoder.layers[1].ffn.fc2
    a, b = layer.lora_A.default.weight.float(), layer.lora_B.default.weight.float()
    expected = layer.base_layer.weight.float() + 5 / 3 * b @ a
    assert torch.equal(plain["decoder.layers.1.ffn.fc2.weight"], expected.bfloat16())


def test_a_loaded_adapter_leaves_the_base_its_dtype(adapted, base, tmp_path):
    save_adapter(adapted, tmp_path)
    half = copy.deepcopy(base).bfloat16()
    model = load_adapter(half, tmp_path)
    assert all(torch.equal(tensor, half.state_dict()[name]) for name, tensor in base_weights(model).items())
    assert {tensor.dtype for tensor in base_weights(model).values()} == {torch.bfloat16}
    assert all(t.dtype == torch.float32 for name, t in model.state_dict().items() if ".lora_" in name)  # as in the file


def test_merging_and_loading_stay_on_the_model_s_device(adapted, base, tmp_path):
    save_adapter(adapted, tmp_path)
    elsewhere = torch.device("meta")  # a device that is everywhere
    models = merge_adapters(copy.deepcopy(adapted).to(elsewhere)), load_adapter(copy.deepcopy(base).to(elsewhere), tmp_path)
    assert {tensor.device for model in models for tensor in model.state_dict().values()} == {elsewhere}


def test_merging_and_loading_share_no_memory_with_the_model(adapted, base, tmp_path):
    save_adapter(adapted, tmp_path)
    before = {tensor.data_ptr() for model in (adapted, base) for tensor in model.state_dict().values()}
    models = merge_adapters(adapted), load_adapter(base, tmp_path)
    assert not before & {tensor.data_ptr() for model in models for tensor in model.state_dict().values()}


def test_saving_an_adapter_builds_no_other_model(adapted, tmp_path, monkeypatch):
    built: list[Kosmos] = []
    monkeypatch.setattr(Kosmos, "__init__", lambda model, *_: built.append(model))
    save_adapter(adapted, tmp_path)
    assert built == []


def test_loading_an_adapter_leaves_the_random_numbers_as_they_were(adapted, base, tmp_path):
    save_adapter(adapted, tmp_path)
    before = torch.get_rng_state()
    load_adapter(base, tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_model_without_adapters_has_none_to_save(base, tmp_path):
    with pytest.raises(UserError, match="the model has no adapter"):
        save_adapter(base, tmp_path)


@pytest.mark.parametrize("missing", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_folder_without_an_adapter_is_refused(adapted, base, tmp_path, missing):
    save_adapter(adapted, tmp_path)
    (tmp_path / missing).unlink()
    with pytest.raises(UserError, match="holds no LoRA adapter"):
        load_adapter(base, tmp_path)


def test_an_adapter_whose_file_is_cut_off_is_refused(adapted, base, tmp_path):
    save_adapter(adapted, tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(UserError, match=r"adapter_model\.safetensors is no whole safetensors file"):
        load_adapter(base, tmp_path)


def test_an_adapter_of_another_width_is_refused(adapted, kosmos_tower, tmp_path):
    save_adapter(adapted, tmp_path)
    other = Kosmos.create(tiny_config(kosmos_tower, ffn_dim=29))
    with pytest.raises(UserError, match="the adapter is of another model"):
        load_adapter(other, tmp_path)


def test_an_adapter_that_lacks_a_layer_is_refused(adapted, base, tmp_path):
    save_adapter(adapted, tmp_path)
    table = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))
    table["target_modules"] = table["target_modules"][1:]
    (tmp_path / "adapter_config.json").write_text(json.dumps(table), encoding="utf-8")
    with pytest.raises(UserError, match="2 weights differ by name"):
        load_adapter(base, tmp_path)


def test_a_second_adapter_asks_for_a_merge(adapted, tmp_path):
    with pytest.raises(UserError, match="merge it first"):
        load_adapter(adapted, tmp_path)
