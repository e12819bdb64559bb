"""The fast ways to logits and the next token, beside the plain product."""

import pytest
import torch
from torch import nn

from kosmos_lit.config import DecoderConfig
from kosmos_lit.decoder import Decoder
from kosmos_lit.errors import UserError
from kosmos_lit.inference import lm_head
from kosmos_lit.inference.lm_head import Int8Weights, LMHead

V, D = 257, 20


@pytest.fixture
def decoder(monkeypatch) -> Decoder:
    """A decoder whose matrix counts as large, with rows of very different lengths as trained ones have."""
    monkeypatch.setattr(lm_head, "MIN_WEIGHTS", 1)
    monkeypatch.setattr(lm_head, "SLICE_WEIGHTS", 31 * D)
    made = Decoder(DecoderConfig(vocab_size=V, dim=D, n_layers=1, n_heads=5, ffn_dim=23, max_seq_len=11))
    draw = torch.Generator().manual_seed(0)
    nn.init.normal_(made.embed_tokens.weight, generator=draw)
    with torch.no_grad():
        made.embed_tokens.weight *= torch.rand(V, 1, generator=draw) * 3
    return made


def hidden(n: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(n, D, generator=torch.Generator().manual_seed(seed))


def plain(decoder: Decoder, x: torch.Tensor, forbidden: torch.Tensor) -> torch.Tensor:
    logits = decoder.logits(x)
    logits[:, forbidden] = float("-inf")
    return logits.argmax(-1)


def test_no_logit_is_further_off_than_its_bound(decoder):
    x = hidden(1009)
    int8 = Int8Weights.of(decoder.embed_tokens.weight)
    approximate, norm, rounding = int8.approximate(x)
    bound = norm * int8.errors + rounding * int8.norms
    error = (approximate - decoder.logits(x)).abs()
    assert (error <= bound).all()
    assert (error > bound / 10).any()  # a bound that says something: ten times it at most


@torch.inference_mode()
@pytest.mark.parametrize("n", [1, 8, 1009])
def test_8_bit_bounds_find_the_likeliest_token(decoder, monkeypatch, n):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    forbidden = torch.tensor([5, 7, 11])
    head, x = LMHead(decoder, forbidden), hidden(n)
    assert head._int8_weights is not None
    assert torch.equal(head.greedy(x), plain(decoder, x, forbidden))


@torch.inference_mode()
def test_of_equal_tokens_the_first_is_taken(decoder, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    x = hidden(1)
    decoder.embed_tokens.weight[[17, 211]] = 9 * x[0]
    assert LMHead(decoder, torch.tensor([3])).greedy(x).tolist() == [17]


@torch.inference_mode()
@pytest.mark.parametrize("change", ["in place", "past autograd", "swapped", "another tensor"])
def test_changed_weights_are_noticed(decoder, monkeypatch, change):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    x, nothing = hidden(7), torch.zeros(0, dtype=torch.int64)
    LMHead(decoder, nothing).greedy(x)
    weight = decoder.embed_tokens.weight
    if change == "in place":
        weight[13] = 50 * x[0]
    elif change == "past autograd":
        weight.data[13] = 50 * x[0]
    elif change == "swapped":
        best = int(plain(decoder, x, nothing)[0])
        weight.data[[best, 3]] = weight.data[[3, best]]
    else:
        weight.data = torch.roll(weight.data, 1, 0)
    assert torch.equal(LMHead(decoder, nothing).greedy(x), plain(decoder, x, nothing))


@torch.inference_mode()
def test_an_output_that_is_not_finite_is_the_users_error(decoder, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    x = hidden(3)
    x[1] = float("nan")
    with pytest.raises(UserError, match="the model's output is not finite"):
        LMHead(decoder, torch.tensor([3])).greedy(x)


@torch.inference_mode()
@pytest.mark.parametrize("n", [3, 5, 12, 13])
def test_logits_by_slices_are_the_logits(decoder, n):
    x = hidden(n)
    torch.testing.assert_close(LMHead(decoder, torch.tensor([3])).logits(x), decoder.logits(x), rtol=1e-5, atol=1e-5)
