import math

import pytest
import torch
from torch import Tensor

from kosmos_lit.config import ConnectorConfig, DecoderConfig
from kosmos_lit.connector import KINDS, Resampler
from kosmos_lit.decoder import Decoder
from kosmos_lit.layers.init import uniform_linear
from kosmos_lit.model import Kosmos
from kosmos_lit.tokenizer import PAD
from tests.kosmos_lit.tiny_kosmos import tiny_config

D, F, V, N_LAYERS, C = 96, 160, 101, 3, 56
GAIN = math.sqrt(math.log(2 * N_LAYERS))
GAINS = {"sub": GAIN, "deepnorm": (8 * N_LAYERS) ** -0.25, "pre": 1.0, "post": 1.0}
FAN_IN = {"q_proj": D, "k_proj": D, "v_proj": D, "out_proj": D, "fc1": D, "fc2": F}
FAN_OUT = FAN_IN | {"fc1": F, "fc2": D}
SCALE = {"q_proj": 1.0, "k_proj": 1.0, "v_proj": GAIN, "out_proj": GAIN, "fc1": GAIN, "fc2": GAIN}


def decoder(init: str, **fields) -> Decoder:
    torch.manual_seed(5)
    made = Decoder(DecoderConfig(vocab_size=V, dim=D, n_layers=N_LAYERS, n_heads=3, ffn_dim=F, init=init, **fields))
    made.init()
    return made


def drawn(made: torch.nn.Module, ending: str) -> Tensor:
    """All values of the parameters whose name ends so, in one vector."""
    return torch.cat([p.detach().flatten() for name, p in made.named_parameters() if name.endswith(ending)])


def assert_uniform(values: Tensor, bound: float) -> None:
    # At least 168 values: the largest reaches 95 % of the bound but for a chance of 0.95^168 = 2e-4; the seed is fixed.
    assert 0.95 * bound < values.abs().max() <= bound * (1 + 1e-6)  # the bound itself is rounded to fp32
    assert values.mean().abs() < 4 * bound / math.sqrt(3 * len(values))  # four standard errors
    assert float(values.std()) == pytest.approx(bound / math.sqrt(3), rel=2 / math.sqrt(len(values)))


def assert_normal(values: Tensor, std: float) -> None:
    assert values.mean().abs() < 4 * std / math.sqrt(len(values))  # four standard errors
    assert float(values.std()) == pytest.approx(std, rel=3 / math.sqrt(len(values)))
    assert values.abs().max() > 2.5 * std  # which a uniform distribution never reaches


@pytest.mark.parametrize("name", SCALE)
@pytest.mark.parametrize("part", ["weight", "bias"])
def test_torchscale_scales_weights_and_biases_of_the_branch(name, part):
    assert_uniform(drawn(decoder("torchscale"), f".{name}.{part}"), SCALE[name] / math.sqrt(FAN_IN[name]))


@pytest.mark.parametrize("name", SCALE)
def test_magneto_is_xavier_normal_with_the_gain_of_the_branch(name):
    std = SCALE[name] * math.sqrt(2 / (FAN_IN[name] + FAN_OUT[name]))
    assert_normal(drawn(decoder("magneto"), f".{name}.weight"), std)


@pytest.mark.parametrize("norm", GAINS)
@pytest.mark.parametrize("init", ["torchscale", "magneto"])
def test_the_norm_decides_the_gain_of_the_branch_and_nothing_else(init, norm):
    plain, made = (dict(decoder(init, norm=n, branch_gain=g).named_parameters()) for n, g in (("sub", 1.0), (norm, None)))
    assert made.keys() <= plain.keys()
    for name, parameter in made.items():
        gain = GAINS[norm] if name.split(".")[-2] in ("v_proj", "out_proj", "fc1", "fc2") else 1.0
        torch.testing.assert_close(parameter, gain * plain[name], rtol=1e-6, atol=0)  # fp32, one product


@pytest.mark.parametrize("positions", ["rotary", "sinusoidal", "none"])
def test_positions_that_are_computed_change_no_initial_weight(positions):
    one, other = decoder("torchscale").state_dict(), decoder("torchscale", positions=positions).state_dict()
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_gain_that_is_set_is_the_one_that_is_used():
    assert_uniform(drawn(decoder("torchscale", norm="pre", branch_gain=1.7), ".fc1.weight"), 1.7 / math.sqrt(D))


@pytest.mark.parametrize("norm", GAINS)
@pytest.mark.parametrize("name", SCALE)
def test_gpt2_is_normal_and_scales_the_ends_of_branches_with_depth_alone(name, norm):
    depth = math.sqrt(2 * N_LAYERS) if name in ("out_proj", "fc2") else 1.0
    assert_normal(drawn(decoder("gpt2", norm=norm), f".{name}.weight"), 0.02 / depth)


@pytest.mark.parametrize("init", ["magneto", "gpt2"])
def test_biases_are_zero(init):
    made = decoder(init)
    assert not torch.cat([drawn(made, f".{name}.bias") for name in SCALE]).any()


def test_gpt2_embeddings_and_learned_positions_are_as_small_as_its_matrices():
    made = decoder("gpt2", positions="learned", max_seq_len=101)
    weight = made.embed_tokens.weight.detach()
    assert not weight[PAD].any()
    assert_normal(torch.cat([weight[:PAD], weight[PAD + 1 :]]).flatten(), 0.02)
    assert_normal(made.embed_positions.weight.detach().flatten(), 0.02)


@pytest.mark.parametrize("init", ["torchscale", "magneto"])
def test_embeddings_are_normal_and_padding_is_zero(init):
    weight = decoder(init).embed_tokens.weight.detach()
    assert not weight[PAD].any()
    assert_normal(torch.cat([weight[:PAD], weight[PAD + 1 :]]).flatten(), D**-0.5)


def test_learned_positions_are_normal_and_none_of_them_is_zero():
    weight = decoder("torchscale", positions="learned", max_seq_len=101).embed_positions.weight.detach()
    assert_normal(weight.flatten(), D**-0.5)
    assert weight.any(dim=1).all()


@pytest.mark.parametrize("init", ["torchscale", "magneto", "gpt2"])
@pytest.mark.parametrize(("norm", "n"), [("sub", 4 * N_LAYERS + 1), ("pre", 2 * N_LAYERS + 1), ("deepnorm", 2 * N_LAYERS)])
def test_layer_norms_start_neutral(init, norm, n):
    made = decoder(init, norm=norm)
    norms = [m for m in made.modules() if isinstance(m, torch.nn.LayerNorm)]
    assert len(norms) == n
    assert all(torch.equal(m.weight, torch.ones_like(m.weight)) and not m.bias.any() for m in norms)


@pytest.mark.parametrize("scale", [1.0, 1.7])
def test_uniform_linear_is_pytorchs_default_times_a_scale(scale):
    torch.manual_seed(3)
    linear = torch.nn.Linear(C, 211)
    uniform_linear(linear, scale)
    assert_uniform(linear.weight.detach().flatten(), scale / math.sqrt(C))
    assert_uniform(linear.bias.detach(), scale / math.sqrt(C))


def test_the_resampler_starts_as_fairseqs_attention_does():
    torch.manual_seed(4)
    made = Resampler(ConnectorConfig(n_latents=29, n_heads=3), C, D)
    made.init()
    xavier = math.sqrt(6 / (2 * D))
    assert_uniform(drawn(made, "dense.weight"), 1 / math.sqrt(C))
    assert_normal(drawn(made, "latent_query"), 1.0)
    for name in ("q_proj", "k_proj", "v_proj"):
        assert_uniform(drawn(made, f"{name}.weight"), xavier / math.sqrt(2))
    assert_uniform(torch.cat([drawn(made, f"{name}.bias") for name in ("q_proj", "k_proj", "v_proj")]), D**-0.5)
    assert_uniform(drawn(made, "out_proj.weight"), xavier)
    assert not made.x_attn.out_proj.bias.any()


@pytest.mark.parametrize("kind", ["linear", "mlp", "pool", "perceiver"])
def test_the_other_connectors_start_as_pytorch_does(kind):
    torch.manual_seed(4)
    made = KINDS[kind](ConnectorConfig(kind=kind, n_latents=29, n_heads=7, n_layers=2), C, D)
    made.init()
    for name, module in made.named_modules():
        if isinstance(module, torch.nn.Linear):
            assert_uniform(drawn(made, f"{name}.weight"), 1 / math.sqrt(module.in_features))
    if kind in ("pool", "perceiver"):
        assert_normal(drawn(made, "latent_query"), 1.0)


@pytest.mark.parametrize(
    ("connector", "init"), [*((kind, "torchscale") for kind in KINDS), ("resampler", "magneto"), ("resampler", "gpt2")]
)
def test_the_same_seed_gives_the_same_model(kosmos_tower, connector, init):
    config = tiny_config(kosmos_tower, connector=connector, init=init, positions="learned")
    torch.manual_seed(1)
    first = Kosmos.create(config, seed=7).state_dict()
    torch.manual_seed(2)  # what else was drawn does not matter
    second = Kosmos.create(config, seed=7).state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_new_model_initialises_its_tower_too(kosmos_tower):
    position = Kosmos.create(tiny_config(kosmos_tower)).vision.visual.positional_embedding.detach()
    assert float(position.std()) == pytest.approx(1, abs=0.3)  # open_clip gives 0.29; 60 draws: three standard errors


def test_another_seed_gives_other_weights(kosmos_tower):
    config = tiny_config(kosmos_tower)
    first, second = (dict(Kosmos.create(config, seed).named_parameters()) for seed in (7, 11))
    constant = ("ln_", "norm", "_ln.", "out_proj.bias", "in_proj_bias")
    assert [n for n in first if torch.equal(first[n], second[n]) and not any(c in n for c in constant)] == []


def test_making_a_model_leaves_the_random_numbers_alone(kosmos_tower):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    Kosmos.create(tiny_config(kosmos_tower), seed=7)
    assert torch.equal(torch.get_rng_state(), before)
