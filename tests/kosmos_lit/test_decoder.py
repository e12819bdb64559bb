import math

import pytest
import torch

from kosmos_lit.decoder import Decoder
from kosmos_lit.ops.masks import DocumentMask, causal
from kosmos_lit.ops.positions import sinusoids
from kosmos_lit.tokenizer import PAD
from tests.kosmos_lit.tiny_kosmos import VOCAB, normal, shaken, tiny_config, words

B, T, D = 2, 13, 20
CPU = torch.device("cpu")
POSITIONS = ("xpos", "rotary", "sinusoidal", "learned", "none")
NORMS = ("sub", "pre", "post", "deepnorm")
ROW_POSITIONS = torch.arange(T).expand(B, T)
TOKENS = torch.tensor(words(B * T)).view(B, T)


def decoder(**fields) -> Decoder:
    torch.manual_seed(0)
    model = Decoder(tiny_config("unused.json", **fields).decoder)
    model.init()
    return shaken(model).eval()


def first_input(model: Decoder, *args) -> torch.Tensor:
    """What the first block is given."""
    block_inputs = []
    hook = model.layers[0].register_forward_pre_hook(lambda _, inputs: block_inputs.append(inputs[0]))
    model(*args)
    hook.remove()
    return block_inputs[0]


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("kernel", ["sdpa", "reference"])
def test_no_position_sees_what_comes_after_it(positions, kernel):
    model, mask, t = decoder(positions=positions, attention_kernel=kernel), DocumentMask((T,) * B, B, T, CPU), 6
    changed = TOKENS.clone()
    changed[:, t + 1 :] = torch.tensor(words(B * (T - t - 1), seed=1)).view(B, -1)
    before, after = model(TOKENS, ROW_POSITIONS, mask), model(changed, ROW_POSITIONS, mask)
    assert torch.equal(after[:, : t + 1], before[:, : t + 1])
    assert not torch.equal(after[:, t + 1], before[:, t + 1])


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("positions", POSITIONS)
def test_reading_in_pieces_gives_what_reading_at_once_gives(positions, norm):
    model = decoder(positions=positions, norm=norm)
    latents, slots = normal(2, 3, D, seed=4), torch.tensor([[0, 1], [1, 0]])
    single_pass = model(TOKENS, ROW_POSITIONS, causal(T, T, CPU), latents, slots)
    cache, pieces = model.new_cache(B, T), []
    for a, b in ((0, 5), (5, 6), (6, 7), (7, 11), (11, 13)):
        images = (latents, slots) if a == 0 else (None, None)
        pieces.append(model(TOKENS[:, a:b], ROW_POSITIONS[:, a:b], causal(b - a, b, CPU), *images, cache))
    torch.testing.assert_close(torch.cat(pieces, dim=1), single_pass, rtol=1e-5, atol=1e-5)  # fp32, 2 layers, measured 1e-6


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("positions", POSITIONS)
def test_padding_on_the_left_changes_nothing_with_or_without_a_cache(positions, norm):
    """As prompts of different length are read: the rows' places in the cache are not their positions."""
    model, starts = decoder(positions=positions, norm=norm), (0, 5)
    real = torch.arange(T) >= torch.tensor(starts)[:, None]
    tokens = TOKENS.masked_fill(~real, PAD)
    at = (real.cumsum(1) - 1).clamp(min=0)
    visible = causal(T, T, CPU) & (real[:, None, :] | torch.eye(T, dtype=torch.bool))  # padding sees itself
    at_once = model(tokens, at, visible[:, None])
    cache = model.new_cache(B, T)
    in_steps = [model(tokens[:, :9], at[:, :9], visible[:, None, :9, :9], cache=cache)]
    for t in range(9, T):
        in_steps.append(model(tokens[:, t : t + 1], at[:, t : t + 1], real[:, None, None, : t + 1], cache=cache))
    for b, start in enumerate(starts):
        n = T - start
        alone = model(TOKENS[b : b + 1, start:], ROW_POSITIONS[:1, :n], DocumentMask((n,), 1, n, CPU))[0]
        for actual in (at_once, torch.cat(in_steps, dim=1)):
            torch.testing.assert_close(actual[b, start:], alone, rtol=1e-5, atol=1e-5)  # fp32, 2 layers, measured 2e-6


def test_tokens_and_latents_are_scaled_by_the_root_of_the_width():
    model, latents, slots = decoder(), normal(1, 3, D, seed=4), torch.tensor([[1, 2]])
    expected = model.embed_tokens.weight[TOKENS].clone()
    expected[1, 2:5] = latents[0]
    actual = first_input(model, TOKENS, ROW_POSITIONS, causal(T, T, CPU), latents, slots)
    assert torch.equal(actual, expected * math.sqrt(D))


@pytest.mark.parametrize("positions", ["sinusoidal", "learned"])
def test_absolute_positions_are_added_after_scaling(positions):
    model = decoder(positions=positions)
    table = sinusoids(61, D) if positions == "sinusoidal" else model.embed_positions.weight
    at = torch.tensor([[*range(5), *range(8)], [*range(13)]])  # the first row holds two documents
    actual = first_input(model, TOKENS, at, causal(T, T, CPU))
    assert torch.equal(actual, model.embed_tokens.weight[TOKENS] * math.sqrt(D) + table[at])


@pytest.mark.parametrize(
    ("positions", "matters"),
    [("xpos", False), ("rotary", False), ("none", False), ("sinusoidal", True), ("learned", True)],
)
def test_where_a_document_starts_matters_to_absolute_positions_only(positions, matters):
    model, mask = decoder(positions=positions), DocumentMask((T,) * B, B, T, CPU)
    at_start, later = model(TOKENS, ROW_POSITIONS, mask), model(TOKENS, ROW_POSITIONS + 31, mask)
    assert torch.allclose(at_start, later, rtol=1e-4, atol=1e-5) != matters  # fp32, 2 layers, measured 2e-6


@pytest.mark.parametrize("positions", ["xpos", "rotary", "sinusoidal", "learned"])
def test_order_matters_to_positions_of_every_kind(positions):
    model, mask = decoder(positions=positions, n_layers=1), DocumentMask((T,) * B, B, T, CPU)
    swapped = TOKENS[:, [1, 0, *range(2, T)]]
    assert not torch.allclose(
        model(TOKENS, ROW_POSITIONS, mask)[:, -1], model(swapped, ROW_POSITIONS, mask)[:, -1], atol=1e-3
    )


def test_order_does_not_matter_to_one_layer_without_positions():
    model, mask = decoder(positions="none", n_layers=1), DocumentMask((T,) * B, B, T, CPU)
    swapped = TOKENS[:, [1, 0, *range(2, T)]]
    torch.testing.assert_close(
        model(TOKENS, ROW_POSITIONS, mask)[:, -1], model(swapped, ROW_POSITIONS, mask)[:, -1], rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("positions", ["rotary", "none"])
def test_xpos_is_a_scheme_of_its_own(positions):
    mask = DocumentMask((T,) * B, B, T, CPU)
    one, other = (decoder(positions=p)(TOKENS, ROW_POSITIONS, mask) for p in ("xpos", positions))  # the same weights
    assert torch.equal(one[:, 0], other[:, 0])  # a document's first token sees itself only
    assert (one[:, -1] - other[:, -1]).abs().max() > 1e-3


def test_logits_are_products_with_the_embeddings():
    model, hidden = decoder(), normal(B, T, D, seed=2)
    expected = torch.einsum("btd,vd->btv", hidden, model.embed_tokens.weight)
    torch.testing.assert_close(model.logits(hidden), expected, rtol=1e-5, atol=1e-6)  # fp32, sums of 20
    assert model.logits(hidden).shape == (B, T, VOCAB)


@pytest.mark.parametrize("norm", NORMS)
def test_the_last_thing_is_a_layer_norm(norm):
    model = decoder(norm=norm)
    last = model.layers[-1].final_layer_norm if norm in ("post", "deepnorm") else model.layer_norm
    with torch.no_grad():
        last.weight.fill_(1.0)
        last.bias.zero_()
    hidden = model(TOKENS, ROW_POSITIONS, causal(T, T, CPU))
    torch.testing.assert_close(hidden.mean(-1), torch.zeros(B, T), rtol=0, atol=1e-6)  # fp32
    torch.testing.assert_close(hidden.var(-1, correction=0), torch.ones(B, T), rtol=1e-4, atol=0)  # eps 1e-5


def test_dropout_acts_on_the_embeddings_in_training_only():
    model = decoder(dropout_rate=0.5)
    args = (TOKENS, ROW_POSITIONS, causal(T, T, CPU))
    assert first_input(model, *args).ne(0).all()
    torch.manual_seed(0)
    assert 0.3 < first_input(model.train(), *args).eq(0).float().mean() < 0.7  # 520 draws of one half


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("positions", POSITIONS)
def test_nothing_but_embeddings_blocks_and_the_last_norm_is_stored(positions, norm):
    names = {n for n in decoder(positions=positions, norm=norm).state_dict() if not n.startswith("layers.")}
    last = {"layer_norm.weight", "layer_norm.bias"} if norm in ("sub", "pre") else set()
    table = {"embed_positions.weight"} if positions == "learned" else set()
    assert names == {"embed_tokens.weight"} | last | table
