import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kosmos_lit.config import DecoderConfig
from kosmos_lit.layers.attention import KVCache, SelfAttention
from kosmos_lit.layers.block import Block
from kosmos_lit.ops.masks import DocumentMask, causal
from tests.kosmos_lit.tiny_kosmos import normal, shaken

B, T, D, H, F = 2, 7, 12, 3, 17
MASK = DocumentMask((3, 4, 7), B, T, torch.device("cpu"))


def block(**fields) -> Block:
    torch.manual_seed(0)
    return shaken(Block(DecoderConfig(dim=D, n_heads=H, ffn_dim=F, vocab_size=11, **fields))).eval()


def layer_norm(x: Tensor, m: torch.nn.LayerNorm) -> Tensor:
    x = x - x.mean(-1, keepdim=True)
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * m.weight + m.bias


def linear(x: Tensor, m: torch.nn.Linear) -> Tensor:
    return x @ m.weight.T + m.bias


def branches(layer: Block, use_sub: bool) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """Attention, head by head, and the feed-forward network."""
    attention, ffn = layer.self_attn, layer.ffn

    def attend(h: Tensor) -> Tensor:
        return _attend(h, attention, use_sub)

    def feed_forward(h: Tensor) -> Tensor:
        h = linear(h, ffn.fc1)
        h = h * 0.5 * (1 + torch.erf(h / math.sqrt(2)))
        return linear(layer_norm(h, ffn.ffn_layernorm) if use_sub else h, ffn.fc2)

    return attend, feed_forward


def _attend(h: Tensor, attention: SelfAttention, use_sub: bool) -> Tensor:
    q, k, v = (linear(h, m) for m in (attention.q_proj, attention.k_proj, attention.v_proj))
    heads = []
    for at in range(0, D, D // H):
        part = slice(at, at + D // H)
        scores = q[..., part] @ k[..., part].transpose(1, 2) / math.sqrt(D // H)
        weights = scores.masked_fill(~MASK.dense[:, 0], float("-inf")).softmax(-1)
        heads.append(weights @ v[..., part])
    joined = torch.cat(heads, dim=-1)
    return linear(layer_norm(joined, attention.inner_attn_ln) if use_sub else joined, attention.out_proj)


@pytest.mark.parametrize("norm", ["sub", "pre"])
def test_a_block_normalises_before_each_branch_as_magneto_writes(norm):
    layer, x = block(norm=norm), normal(B, T, D, seed=3)
    attend, feed_forward = branches(layer, norm == "sub")
    middle = x + attend(layer_norm(x, layer.self_attn_layer_norm))
    expected = middle + feed_forward(layer_norm(middle, layer.final_layer_norm))
    torch.testing.assert_close(layer(x, MASK, None), expected, rtol=1e-5, atol=2e-6)  # fp32, one layer


@pytest.mark.parametrize(("norm", "alpha"), [("post", 1.0), ("deepnorm", 10**0.25)])
def test_a_block_normalises_each_sum_as_deepnet_writes(norm, alpha):
    layer, x = block(norm=norm, n_layers=5), normal(B, T, D, seed=3)
    attend, feed_forward = branches(layer, use_sub=False)
    middle = layer_norm(alpha * x + attend(x), layer.self_attn_layer_norm)
    expected = layer_norm(alpha * middle + feed_forward(middle), layer.final_layer_norm)
    torch.testing.assert_close(layer(x, MASK, None), expected, rtol=1e-5, atol=2e-6)  # fp32, one layer


INNER = {"self_attn.inner_attn_ln", "ffn.ffn_layernorm"}


@pytest.mark.parametrize(("norm", "inner"), [("sub", INNER), ("pre", set()), ("post", set()), ("deepnorm", set())])
def test_parameters_are_named_as_in_the_released_checkpoints(norm, inner):
    modules = {"self_attn_layer_norm", "final_layer_norm", "ffn.fc1", "ffn.fc2"} | inner
    modules |= {f"self_attn.{name}_proj" for name in ("q", "k", "v", "out")}
    assert block(norm=norm).state_dict().keys() == {f"{m}.{part}" for m in modules for part in ("weight", "bias")}


def test_dropout_acts_in_training_only():
    layer, x = block(dropout_rate=0.5, attention_dropout_rate=0.5), normal(B, T, D)
    assert torch.equal(layer(x, MASK, None), layer(x, MASK, None))
    layer.train()
    assert not torch.equal(layer(x, MASK, None), layer(x, MASK, None))


@pytest.mark.parametrize("rate", ["dropout_rate", "attention_dropout_rate"])
def test_each_kind_of_dropout_acts_by_itself(rate):
    rates = {"dropout_rate": 0.0, "attention_dropout_rate": 0.0} | {rate: 0.5}
    layer, x = block(**rates).train(), normal(B, T, D)
    torch.manual_seed(0)
    assert not torch.equal(layer(x, MASK, None), layer(x, MASK, None))


@pytest.mark.parametrize("norm", ["post", "deepnorm"])
@pytest.mark.parametrize("other", ["self_attn.out_proj", "ffn.fc2"])
def test_dropout_acts_on_each_branch_before_the_sum_is_normalised(other, norm):
    layer, x = block(norm=norm, n_layers=5, dropout_rate=0.5, attention_dropout_rate=0.0).train(), normal(B, T, D)
    for parameter in layer.get_submodule(other).parameters():
        torch.nn.init.zeros_(parameter)  # leaves one branch
    sums = []
    last = layer.final_layer_norm if other == "self_attn.out_proj" else layer.self_attn_layer_norm
    last.register_forward_pre_hook(lambda _, inputs: sums.append(inputs[0]))
    before = layer.self_attn_layer_norm(layer.residual_scale * x) if other == "self_attn.out_proj" else x
    torch.manual_seed(0)
    layer(x, MASK, None)
    dropped = (sums[0] == layer.residual_scale * before).float().mean()
    assert 0.3 < dropped < 0.7  # 168 draws of one half: five standard errors


@pytest.mark.parametrize("other", ["self_attn.out_proj", "ffn.fc2"])
def test_dropout_acts_on_each_branch(other):
    layer, x = block(dropout_rate=0.5, attention_dropout_rate=0.0).train(), normal(B, T, D)
    for parameter in layer.get_submodule(other).parameters():
        torch.nn.init.zeros_(parameter)  # leaves one branch
    torch.manual_seed(0)
    dropped = (layer(x, MASK, None) == x).float().mean()
    assert 0.3 < dropped < 0.7  # 168 draws of one half: five standard errors


@pytest.mark.parametrize("norm", ["sub", "pre", "post", "deepnorm"])
def test_a_block_goes_on_where_its_cache_ends(norm):
    layer, x = block(norm=norm), normal(B, T, D, seed=3)
    at_once = layer(x, causal(T, T, x.device), None)
    cache = KVCache(torch.empty(B, T, H, D // H), torch.empty(B, T, H, D // H))
    in_steps = [layer(x[:, a:b], causal(b - a, b, x.device), None, cache) for a, b in ((0, 4), (4, 5), (5, 7))]
    torch.testing.assert_close(torch.cat(in_steps, dim=1), at_once, rtol=1e-5, atol=2e-6)  # fp32, one layer


def test_a_cache_returns_all_it_has_seen():
    cache = KVCache(torch.empty(B, 5, H, 4), torch.empty(B, 5, H, 4))
    k, v = normal(B, 5, H, 4, seed=1), normal(B, 5, H, 4, seed=2)
    cache.append(k[:, :2], v[:, :2])
    keys, values = cache.append(k[:, 2:], v[:, 2:])
    assert torch.equal(keys, k)
    assert torch.equal(values, v)
