import math

import pytest
import torch
from torch import Tensor

from kosmos_lit.config import ConnectorConfig
from kosmos_lit.connector import LinearConnector, Resampler, build_connector
from tests.kosmos_lit.tiny_kosmos import normal, shaken, tiny_config

N, P, C, L, D, H = 2, 7, 5, 3, 12, 4


def resampler(**fields) -> Resampler:
    torch.manual_seed(0)
    made = Resampler(ConnectorConfig(n_latents=L, n_heads=H, **fields), C, D)
    made.init()
    return shaken(made).eval()


def linear(x: Tensor, m: torch.nn.Linear) -> Tensor:
    return x @ m.weight.T + m.bias


def test_the_resampler_is_one_cross_attention_whose_keys_include_the_latents():
    made, features = resampler(), normal(N, P, C, seed=1)
    expected = []
    for picture in features:
        keys = torch.cat([linear(picture, made.dense), made.latent_query])  # (P + L, D)
        q, k, v = linear(made.latent_query, made.x_attn.q_proj), *(
            linear(keys, m) for m in (made.x_attn.k_proj, made.x_attn.v_proj)
        )
        parts = [slice(at, at + D // H) for at in range(0, D, D // H)]
        heads = [(q[:, p] @ k[:, p].T / math.sqrt(D // H)).softmax(-1) @ v[:, p] for p in parts]
        expected.append(linear(torch.cat(heads, dim=-1), made.x_attn.out_proj))
    found = made(features)
    assert found.shape == (N, L, D)
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-5, atol=1e-5)  # fp32, one layer, values of about 3


def test_the_resampler_does_not_care_about_the_order_of_features():
    made, features = resampler(), normal(N, P, C, seed=1)
    torch.testing.assert_close(made(features.flip(1)), made(features), rtol=1e-5, atol=1e-5)  # fp32, sums reordered


def test_the_resampler_drops_attention_weights_in_training_only():
    made, features = resampler(attention_dropout_rate=0.5), normal(N, P, C)
    assert torch.equal(made(features), made(features))
    made.train()
    torch.manual_seed(0)
    assert not torch.equal(made(features), made(features))


def test_the_resamplers_parameters_are_named_as_in_the_released_checkpoints():
    modules = ["dense", *(f"x_attn.{name}_proj" for name in ("k", "v", "q", "out"))]
    names = {f"{m}.{part}" for m in modules for part in ("weight", "bias")}
    assert resampler().state_dict().keys() == {"latent_query", *names}


def test_every_parameter_of_the_resampler_but_the_key_bias_gets_a_gradient():
    made = resampler()
    (made(normal(N, P, C)) * normal(N, L, D, seed=2)).sum().backward()
    # A bias on all keys shifts all scores of a query alike, which softmax does not notice.
    without = {name for name, p in made.named_parameters() if p.grad.abs().max() < 1e-5}
    assert without == {"x_attn.k_proj.bias"}


def test_the_linear_connector_averages_neighbours_and_multiplies_once():
    made = LinearConnector(ConnectorConfig(kind="linear", n_latents=2), 1, 3)
    with torch.no_grad():
        made.dense.weight.copy_(torch.tensor([[1.0], [10.0], [-2.0]]))
        made.dense.bias.copy_(torch.tensor([0.5, 0.0, 1.0]))
    features = torch.tensor([1.0, 2.0, 6.0, 3.0, 5.0, 4.0]).view(1, 6, 1)  # averages 3 and 4
    assert made(features).tolist() == [[[3.5, 30.0, -5.0], [4.5, 40.0, -7.0]]]


def test_the_linear_connector_shares_a_feature_between_latents_where_they_do_not_divide():
    made = LinearConnector(ConnectorConfig(kind="linear", n_latents=2), 1, 1)
    with torch.no_grad():
        made.dense.weight.fill_(1.0)
        made.dense.bias.zero_()
    assert made(torch.tensor([1.0, 3.0, 8.0]).view(1, 3, 1)).flatten().tolist() == [2.0, 5.5]


@pytest.mark.parametrize(("kind", "made"), [("resampler", Resampler), ("linear", LinearConnector)])
def test_the_config_chooses_the_connector(kind, made):
    connector = build_connector(tiny_config("unused.json", connector=kind), 7)
    assert type(connector) is made
    assert connector(normal(N, P, 7)).shape == (N, 3, 20)
