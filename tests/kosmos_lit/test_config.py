from dataclasses import asdict, fields, replace

import pytest
import torch

from kosmos_lit.batch import CORPORA
from kosmos_lit.config import (
    ConnectorConfig,
    DecoderConfig,
    KosmosConfig,
    LoraConfig,
    LossWeights,
    OptimizerConfig,
    VisionConfig,
)
from kosmos_lit.errors import UserError
from kosmos_lit.model import Kosmos
from tests.kosmos_lit.tiny_kosmos import tiny_config


@pytest.fixture(scope="module")
def papers_model() -> Kosmos:
    with torch.device("meta"):  # shapes without memory
        return Kosmos(KosmosConfig(vision=VisionConfig(pretrained=None)))


def n_parameters(module: torch.nn.Module, trained_only: bool = False) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trained_only)


def test_the_papers_decoder_has_1340180480_parameters(papers_model):
    assert n_parameters(papers_model.decoder) == 1_340_180_480


def test_the_papers_model_has_1662375936_parameters(papers_model):
    assert n_parameters(papers_model) == 1_662_375_936


def test_the_papers_freeze_rule_trains_1371794432_parameters(papers_model):
    assert n_parameters(papers_model, trained_only=True) == 1_371_794_432


def test_tower_and_connector_of_the_paper_have_the_released_sizes(papers_model):
    assert (n_parameters(papers_model.vision), n_parameters(papers_model.connector)) == (303_179_776, 19_015_680)


def test_heads_of_the_paper_are_64_wide():
    assert DecoderConfig().head_dim == 64


def test_a_config_survives_being_written_as_plain_data():
    config = tiny_config("ViT-B-32", positions="learned", norm="pre")
    assert KosmosConfig.from_dict(asdict(config)) == config


def test_lists_are_read_as_tuples():
    read = KosmosConfig.from_dict({"vision": {"mean": [0.5, 0.25, 0.125]}})
    assert read.vision.mean == (0.5, 0.25, 0.125)


def test_what_plain_data_leaves_out_has_its_default():
    read = KosmosConfig.from_dict({"decoder": {"n_layers": 5}})
    assert read == KosmosConfig(decoder=DecoderConfig(n_layers=5))


def test_a_config_is_read_as_itself():
    config = tiny_config("ViT-B-32")
    assert KosmosConfig.from_dict(config) is config


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"decoder": {"n_layer": 3, "dims": 4}}, "DecoderConfig has no field dims, n_layer; it has vocab_size, dim"),
        ({"encoder": {}}, "KosmosConfig has no field encoder; it has vision, connector, decoder"),
        ({"vision": {"l2_normalise": True}}, "VisionConfig has no field l2_normalise"),
        ({"decoder": {"dim": None}}, "DecoderConfig: dim must be int, got None"),
        ({"decoder": {"dim": "20"}}, "DecoderConfig: dim must be int, got '20'"),
        ({"decoder": {"dropout_rate": True}}, "DecoderConfig: dropout_rate must be float, got True"),
        ({"decoder": None}, "KosmosConfig: decoder must be DecoderConfig, got None"),
        ({"vision": {"mean": [0.5, "a", 0.1]}}, "VisionConfig: mean must be .*, got"),
    ],
)
def test_an_unknown_key_or_a_value_of_another_type_is_named(data, message):
    with pytest.raises(UserError, match=message):
        KosmosConfig.from_dict(data)


@pytest.mark.parametrize(
    ("table", "fields", "message"),
    [
        (VisionConfig, {"image_size": 0}, "VisionConfig: image_size must be positive, got 0"),
        (VisionConfig, {"feature_length": 0.0}, "feature_length must be positive or null, got 0.0"),
        (ConnectorConfig, {"n_latents": -3}, "ConnectorConfig: n_latents must be positive, got -3"),
        (ConnectorConfig, {"n_heads": 0}, "n_heads must be positive, got 0"),
        (ConnectorConfig, {"attention_dropout_rate": 1.0}, r"attention_dropout_rate must lie in \[0, 1\), got 1.0"),
        (DecoderConfig, {"vocab_size": 0}, "DecoderConfig: vocab_size must be positive, got 0"),
        (DecoderConfig, {"dim": 0}, "dim must be positive"),
        (DecoderConfig, {"n_layers": 0}, "n_layers must be positive"),
        (DecoderConfig, {"ffn_dim": -1}, "ffn_dim must be positive"),
        (DecoderConfig, {"max_seq_len": 0}, "max_seq_len must be positive"),
        (DecoderConfig, {"dropout_rate": -0.1}, r"dropout_rate must lie in \[0, 1\), got -0.1"),
        (DecoderConfig, {"dim": 20, "n_heads": 3}, "dim 20 is not a multiple of n_heads 3"),
        (DecoderConfig, {"dim": 15, "n_heads": 5}, "dim / n_heads must be even for xpos positions, got 3"),
        (DecoderConfig, {"dim": 15, "n_heads": 5, "positions": "rotary"}, "must be even for rotary positions, got 3"),
        (DecoderConfig, {"norm": "rms"}, "norm must be one of sub, pre, post, deepnorm, got 'rms'"),
        (DecoderConfig, {"branch_gain": 0.0}, "branch_gain must be positive or null, got 0.0"),
        (DecoderConfig, {"branch_gain": 1.5, "init": "gpt2"}, "branch_gain 1.5 has no place in init gpt2"),
        (ConnectorConfig, {"n_layers": 0}, "n_layers must be positive, got 0"),
        (ConnectorConfig, {"kind": "qformer"}, "kind must be one of resampler, perceiver, linear, mlp, pool, got 'qformer'"),
        (LossWeights, {"caption": -0.5}, "LossWeights: caption must be finite and not negative, got -0.5"),
        (LossWeights, {"text": float("inf")}, "text must be finite and not negative, got inf"),
        (LossWeights, {"text": 0, "caption": 0, "interleaved": 0, "instruct": 0}, "at least one weight must be positive"),
        (DecoderConfig, {"fp8": "rows"}, "fp8 must be one of none, tensorwise, rowwise, got 'rows'"),
        (DecoderConfig, {"loss_chunk": 0}, "loss_chunk must be positive, got 0"),
        (KosmosConfig, {"connector": ConnectorConfig(n_heads=7)}, "dim 2048 is not a multiple of connector.n_heads 7"),
        (OptimizerConfig, {"lr": 0.0}, "OptimizerConfig: lr must be positive"),
        (OptimizerConfig, {"eps": 0.0}, "eps must be positive"),
        (OptimizerConfig, {"warmup_steps": -1}, "warmup_steps must not be negative, got -1"),
        (OptimizerConfig, {"betas": (0.9, 1.0)}, r"betas must lie in \[0, 1\), got \(0.9, 1.0\)"),
        (OptimizerConfig, {"weight_decay": -0.1}, "weight_decay must not be negative, got -0.1"),
    ],
)
def test_a_value_that_cannot_be_is_the_users_error(table, fields, message):
    with pytest.raises(UserError, match=message):
        table(**fields)


@pytest.mark.parametrize(("old", "new"), [(False, "none"), (True, "tensorwise")])
def test_fp8_as_earlier_versions_wrote_it_means_the_same(old, new):
    config = DecoderConfig.from_dict({"fp8": old})
    assert config.fp8 == new
    assert config == DecoderConfig(fp8=new)


@pytest.mark.parametrize("fields", [{"feature_length": None}, {"feature_length": 90.0}])
def test_features_may_keep_their_length_or_get_another(fields):
    assert VisionConfig(**fields).feature_length == fields["feature_length"]


@pytest.mark.parametrize(
    "fields",
    [
        {"dropout_rate": 0.3},
        {"attention_kernel": "sdpa"},
        {"init": "gpt2"},
        {"branch_gain": 2.0},
        {"loss_chunk": None},
        {"fp8": "rowwise"},
    ],
)
def test_what_only_training_and_speed_depend_on_is_no_architecture(fields):
    assert tiny_config("ViT-B-32", **fields).architecture() == tiny_config("ViT-B-32").architecture()


def test_where_weights_come_from_is_no_architecture():
    other = tiny_config("ViT-B-32", vision={"pretrained": "w.pt", "trainable": "none"})
    assert other.architecture() == tiny_config("ViT-B-32").architecture()


@pytest.mark.parametrize(
    "field", [{"dim": 40}, {"norm": "deepnorm"}, {"positions": "rotary"}, {"document_attention": "row"}]
)
def test_what_the_model_computes_is_its_architecture(field):
    base, changed = (
        tiny_config("ViT-B-32").architecture(),
        tiny_config("ViT-B-32", **field).architecture(),
    )
    assert {name for name in base if base[name] != changed[name]} == {f"decoder.{name}" for name in field}


@pytest.mark.parametrize("kind", ["resampler", "perceiver", "linear", "mlp", "pool"])
def test_of_the_connector_what_its_kind_uses_is_its_architecture(kind):
    config = tiny_config("ViT-B-32", connector=kind)
    other = replace(config, connector=replace(config.connector, n_layers=5, n_heads=4, n_latents=7))
    base, changed = config.architecture(), other.architecture()
    used = {"resampler": {"n_heads"}, "perceiver": {"n_heads", "n_layers"}}.get(kind, set()) | {"n_latents"}
    assert {name for name in base if base[name] != changed[name]} == {f"connector.{name}" for name in used}


def test_heads_that_a_connector_does_not_have_need_divide_nothing():
    assert KosmosConfig(connector=ConnectorConfig(kind="mlp", n_heads=7)).connector.n_heads == 7


@pytest.mark.parametrize("positions", ["sinusoidal", "learned", "none"])
def test_heads_of_odd_width_do_for_positions_that_turn_nothing(positions):
    assert DecoderConfig(dim=15, n_heads=5, positions=positions).head_dim == 3


def test_there_is_one_loss_weight_a_corpus_in_the_order_of_the_corpora():
    assert tuple(f.name for f in fields(LossWeights)) == CORPORA


def test_the_length_of_learned_positions_is_architecture():
    # Their table has one row a position: weights of another length do not fit.
    base, changed = (tiny_config("ViT-B-32", positions="learned", max_seq_len=n).architecture() for n in (61, 67))
    assert base != changed


def test_the_longest_row_of_computed_positions_is_no_architecture():
    base, changed = (tiny_config("ViT-B-32", positions="xpos", max_seq_len=n).architecture() for n in (61, 67))
    assert base == changed


def test_the_order_of_lora_s_targets_makes_no_other_architecture():
    one, other = (KosmosConfig(lora=LoraConfig(targets=t)) for t in (("q_proj", "fc1"), ("fc1", "q_proj")))
    assert one.architecture() == other.architecture()
    assert one.architecture() != KosmosConfig(lora=LoraConfig(targets=("q_proj", "fc2"))).architecture()
