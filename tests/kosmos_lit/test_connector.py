import math

import pytest
import torch
from torch import Tensor

from kosmos_lit.config import ConnectorConfig
from kosmos_lit.connector import KINDS, LinearConnector, Resampler, build_connector
from kosmos_lit.errors import UserError
from tests.kosmos_lit.tiny_kosmos import normal, shaken, tiny_config

N, P, C, L, D, H = 2, 7, 5, 3, 12, 4


def resampler(**fields) -> Resampler:
    torch.manual_seed(0)
    module = Resampler(ConnectorConfig(n_latents=L, n_heads=H, **fields), C, D)
    module.init()
    return shaken(module).eval()


def connector(kind: str, *, C: int = C, **fields):
    torch.manual_seed(0)
    module = KINDS[kind](ConnectorConfig(kind=kind, **({"n_latents": L, "n_heads": H} | fields)), C, D)
    module.init()
    return shaken(module).eval()


def linear(x: Tensor, m: torch.nn.Linear) -> Tensor:
    return x @ m.weight.T + m.bias


def test_the_resampler_is_one_cross_attention_whose_keys_include_the_latents():
    module, features = resampler(), normal(N, P, C, seed=1)
    expected = []
    for image in features:
        keys = torch.cat([linear(image, module.dense), module.latent_query])  # (P + L, D)
        q, k, v = (
            linear(module.latent_query, module.x_attn.q_proj),
            *(linear(keys, m) for m in (module.x_attn.k_proj, module.x_attn.v_proj)),
        )
        parts = [slice(at, at + D // H) for at in range(0, D, D // H)]
        heads = [(q[:, p] @ k[:, p].T / math.sqrt(D // H)).softmax(-1) @ v[:, p] for p in parts]
        expected.append(linear(torch.cat(heads, dim=-1), module.x_attn.out_proj))
    actual = module(features)
    assert actual.shape == (N, L, D)
    torch.testing.assert_close(actual, torch.stack(expected), rtol=1e-5, atol=1e-5)  # fp32, one layer, values of about 3


def test_the_resampler_does_not_care_about_the_order_of_features():
    module, features = resampler(), normal(N, P, C, seed=1)
    torch.testing.assert_close(module(features.flip(1)), module(features), rtol=1e-5, atol=1e-5)  # fp32, sums reordered


def test_the_resampler_drops_attention_weights_in_training_only():
    module, features = resampler(attention_dropout_rate=0.5), normal(N, P, C)
    assert torch.equal(module(features), module(features))
    module.train()
    torch.manual_seed(0)
    assert not torch.equal(module(features), module(features))


def test_the_resamplers_parameters_are_named_as_in_the_released_checkpoints():
    modules = ["dense", *(f"x_attn.{name}_proj" for name in ("k", "v", "q", "out"))]
    names = {f"{m}.{part}" for m in modules for part in ("weight", "bias")}
    assert resampler().state_dict().keys() == {"latent_query", *names}


def test_every_parameter_of_the_resampler_but_the_key_bias_gets_a_gradient():
    module = resampler()
    (module(normal(N, P, C)) * normal(N, L, D, seed=2)).sum().backward()
    # A bias on all keys shifts all scores of a query alike, which softmax does not notice.
    without = {name for name, p in module.named_parameters() if p.grad.abs().max() < 1e-5}
    assert without == {"x_attn.k_proj.bias"}


def test_the_linear_connector_averages_neighbours_and_multiplies_once():
    module = LinearConnector(ConnectorConfig(kind="linear", n_latents=2), 1, 3)
    with torch.no_grad():
        module.dense.weight.copy_(torch.tensor([[1.0], [10.0], [-2.0]]))
        module.dense.bias.copy_(torch.tensor([0.5, 0.0, 1.0]))
    features = torch.tensor([1.0, 2.0, 6.0, 3.0, 5.0, 4.0]).view(1, 6, 1)  # averages 3 and 4
    assert module(features).tolist() == [[[3.5, 30.0, -5.0], [4.5, 40.0, -7.0]]]


def test_the_linear_connector_shares_a_feature_between_latents_where_they_do_not_divide():
    module = LinearConnector(ConnectorConfig(kind="linear", n_latents=2), 1, 1)
    with torch.no_grad():
        module.dense.weight.fill_(1.0)
        module.dense.bias.zero_()
    assert module(torch.tensor([1.0, 3.0, 8.0]).view(1, 3, 1)).flatten().tolist() == [2.0, 5.5]


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_as_many_latents_as_features_leave_nothing_to_average(kind):
    # What the released code calls `simple` and, but for its hidden width, `complex`.
    module = connector(kind, n_latents=P)
    features = normal(N, P, C, seed=1)
    hidden = linear(features, module.dense)
    if kind == "mlp":
        hidden = linear(hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2))), module.predict)
    torch.testing.assert_close(module(features), hidden, rtol=1e-5, atol=1e-6)  # fp32, sums of 12


def test_the_mlp_reads_what_the_linear_connector_reads():
    module, plain = connector("mlp"), connector("linear")
    plain.dense = module.dense
    features = normal(N, P, C, seed=1)
    expected = linear(torch.nn.functional.gelu(plain(features)), module.predict)
    torch.testing.assert_close(module(features), expected, rtol=1e-5, atol=1e-6)  # fp32, sums of 12


def test_pooling_weighs_all_features_for_each_latent():
    module, features = connector("pool"), normal(N, P, C, seed=1)
    weights = torch.einsum("lc,npc->nlp", module.latent_query, features).div(math.sqrt(C)).softmax(-1)
    expected = linear(torch.einsum("nlp,npc->nlc", weights, features), module.dense)
    torch.testing.assert_close(module(features), expected, rtol=1e-5, atol=1e-6)  # fp32, sums of 7


def layer_norm(x: Tensor, m: torch.nn.LayerNorm) -> Tensor:
    x = x - x.mean(-1, keepdim=True)
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * m.weight + m.bias


def test_the_perceiver_is_flamingos_figure_written_out():
    module, features = connector("perceiver", C=12, n_heads=H, n_layers=2), normal(N, P, 12, seed=1)
    expected = []
    for image in features:
        x = module.latent_query
        for layer in module.layers:
            latents = layer_norm(x, layer.latents_layer_norm)
            keys = torch.cat([layer_norm(image, layer.features_layer_norm), latents])  # (P + L, C)
            attention = layer.x_attn
            q, k, v = latents @ attention.q_proj.weight.T, keys @ attention.k_proj.weight.T, keys @ attention.v_proj.weight.T
            parts = [slice(at, at + 12 // H) for at in range(0, 12, 12 // H)]
            heads = [(q[:, p] @ k[:, p].T / math.sqrt(12 // H)).softmax(-1) @ v[:, p] for p in parts]
            x = x + torch.cat(heads, dim=-1) @ attention.out_proj.weight.T
            hidden = (layer_norm(x, layer.final_layer_norm) @ layer.fc1.weight.T).clamp(min=0) ** 2
            assert hidden.shape == (L, 4 * 12)
            x = x + hidden @ layer.fc2.weight.T
        expected.append(linear(layer_norm(x, module.layer_norm), module.dense))
    torch.testing.assert_close(module(features), torch.stack(expected), rtol=1e-5, atol=1e-5)  # fp32, two layers


def test_the_perceivers_layers_have_no_bias_and_are_as_many_as_asked_for():
    module = connector("perceiver", C=12, n_layers=5)
    linears = {name: m for name, m in module.named_modules() if isinstance(m, torch.nn.Linear)}
    assert len(linears) == 5 * 6 + 1
    assert {name for name, m in linears.items() if m.bias is not None} == {"dense"}


def test_the_perceiver_drops_attention_weights_in_training_only():
    module, features = connector("perceiver", C=12, attention_dropout_rate=0.5), normal(N, P, 12)
    assert torch.equal(module(features), module(features))
    module.train()
    torch.manual_seed(0)
    assert not torch.equal(module(features), module(features))


def test_the_perceivers_heads_must_divide_the_towers_width():
    config = tiny_config("unused.json", connector="perceiver")
    with pytest.raises(UserError, match=r"connector\.n_heads 2 does not divide the tower's width 7"):
        build_connector(config, 7)


@pytest.mark.parametrize("kind", ["perceiver", "pool"])
def test_latents_that_are_learned_do_not_care_about_the_order_of_features(kind):
    module, features = connector(kind, C=12), normal(N, P, 12, seed=1)
    torch.testing.assert_close(module(features.flip(1)), module(features), rtol=1e-5, atol=1e-5)  # fp32, sums reordered


@pytest.mark.parametrize("n_latents", [1, 3, 11])
@pytest.mark.parametrize("kind", KINDS)
def test_every_connector_gives_as_many_latents_as_asked_for(kind, n_latents):
    module = connector(kind, C=12, n_latents=n_latents)
    assert module(normal(N, P, 12)).shape == (N, n_latents, D)


@pytest.mark.parametrize("kind", KINDS)
def test_an_images_latents_are_its_own(kind):
    module, features = connector(kind, C=12), normal(N, P, 12)
    torch.testing.assert_close(module(features)[1:], module(features[1:]), rtol=1e-5, atol=1e-6)  # fp32, other batch size


@pytest.mark.parametrize("kind", KINDS)
def test_latents_have_the_dtype_of_the_weights(kind):
    module = connector(kind, C=12).bfloat16()
    assert module(normal(N, P, 12).bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize(("kind", "module"), KINDS.items())
def test_the_config_chooses_the_connector(kind, module):
    built = build_connector(tiny_config("unused.json", connector=kind), 8)
    assert type(built) is module
    assert built(normal(N, P, 8)).shape == (N, 3, 20)
