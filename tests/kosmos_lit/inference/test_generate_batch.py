import itertools
import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from kosmos_lit.config import Positions
from kosmos_lit.errors import UserError
from kosmos_lit.inference.config import GenerationConfig
from kosmos_lit.inference.engine import Engine
from kosmos_lit.inference.prompts import Prompt, encode_prompt
from kosmos_lit.model import Kosmos
from kosmos_lit.ops.masks import DocumentMask
from kosmos_lit.tokenizer import BOS, EOS, PAD, UNK, SpecialTokens, expand_images
from tests.kosmos_lit.tiny_kosmos import LATENTS, SPECIAL, VOCAB, random_images, tiny_model, words

POSITIONS = get_args(Positions)
CPU = torch.device("cpu")
FORBIDDEN = [BOS, PAD, UNK, SPECIAL.mask, SPECIAL.doc_end, SPECIAL.image, SPECIAL.image_end, SPECIAL.chunk_end]


def prompt(n_words: int, n_images: int = 0, seed: int = 0) -> Prompt:
    """<s>, images with words around them."""
    ids = [BOS]
    for i in range(n_images):
        ids += [SPECIAL.image, *words(2, seed + 10 + i)]
    tokens, _, slots = expand_images(np.array(ids + words(n_words, seed)), SPECIAL, LATENTS)
    return Prompt(tokens, slots)


def generate(model: Kosmos, prompts: Sequence[Prompt], images: Tensor, vocabulary: Any, **settings: Any) -> list[list[int]]:
    """The ids of each continuation."""
    continuations = Engine(model, vocabulary).generate_batch(prompts, images, GenerationConfig(**settings))
    return [list(continuation.tokens) for continuation in continuations]


def next_log_probs(model: Kosmos, tokens: Sequence[int], slots: Sequence[int], images: Tensor, vocabulary) -> Tensor:
    """(V,) log-probabilities of the next allowed token after `tokens`, without a cache."""
    T = len(tokens)
    table = torch.tensor([(0, int(slot)) for slot in slots]).view(-1, 2)
    latents = model.encode_images(images) if len(images) else None
    mask = DocumentMask((T,), 1, T, CPU)
    hidden = model.decoder(torch.tensor([tokens]), torch.arange(T)[None], mask, latents, table)
    log_probs = model.decoder.logits(hidden)[0, -1].detach().log_softmax(-1)
    log_probs[[*forbidden_of(vocabulary.special), *range(vocabulary.vocab_size, len(log_probs))]] = float("-inf")
    return log_probs


def forbidden_of(special: SpecialTokens) -> list[int]:
    return [BOS, PAD, UNK, special.mask, special.doc_end, special.image, special.image_end, special.chunk_end]


def greedy_without_cache(model: Kosmos, start: Prompt, images: Tensor, vocabulary, n: int) -> list[int]:
    ids: list[int] = []
    while len(ids) < n:
        best = int(next_log_probs(model, [*start.tokens.tolist(), *ids], start.slots, images, vocabulary).argmax())
        if best == EOS:
            break
        ids.append(best)
    return ids


def talkative(model: Kosmos) -> Kosmos:
    """Make the layers outweigh the last token's own embedding; tied as it is, that only repeats itself."""
    with torch.no_grad():
        for layer in model.decoder.layers:
            layer.self_attn.out_proj.weight *= 9
            layer.ffn.fc2.weight *= 9
    return model


def unigram(model: Kosmos, probabilities: dict[int, float]) -> Kosmos:
    """Make every next token independent of what came before: these probabilities, next to nothing for the rest."""
    with torch.no_grad():
        model.decoder.layer_norm.weight.zero_()
        model.decoder.layer_norm.bias.fill_(1.0)
        model.decoder.embed_tokens.weight.fill_(-40.0 / 20)  # times D = 20
        for id_, probability in probabilities.items():
            model.decoder.embed_tokens.weight[id_] = math.log(probability) / 20
    return model


# ---- prompts


def test_an_image_stands_where_the_text_marks_it(kosmos_tokenizer):
    the, cat = kosmos_tokenizer.encode("the").tolist(), kosmos_tokenizer.encode("cat").tolist()
    i, e = [SPECIAL.image] * (LATENTS + 1), [SPECIAL.image_end]
    encoded = encode_prompt("the <image> cat<image>", 2, kosmos_tokenizer, LATENTS)
    assert encoded.tokens.tolist() == [BOS, *the, *i, *e, *cat, *i, *e]
    first = 1 + len(the) + 1
    assert encoded.slots.tolist() == [first, first + LATENTS + 1 + len(cat) + 1]


def test_images_beyond_the_marks_come_first(kosmos_tokenizer):
    the, i = kosmos_tokenizer.encode("the").tolist(), [SPECIAL.image] * (LATENTS + 1) + [SPECIAL.image_end]
    assert encode_prompt("the <image>", 3, kosmos_tokenizer, LATENTS).tokens.tolist() == [BOS, *i, *i, *the, *i]
    assert encode_prompt("the", 1, kosmos_tokenizer, LATENTS).tokens.tolist() == [BOS, *i, *the]


@pytest.mark.parametrize("text", ["", "  ", "\n"])
def test_an_empty_prompt_is_the_start_of_a_document(kosmos_tokenizer, text):
    assert encode_prompt(text, 0, kosmos_tokenizer, LATENTS).tokens.tolist() == [BOS]


def test_more_marks_than_images_are_the_users_error(kosmos_tokenizer):
    with pytest.raises(UserError, match="the prompt has 2 <image> marks, but 1 images are given"):
        encode_prompt("<image> the <image>", 1, kosmos_tokenizer, LATENTS)


def test_prompt_and_continuation_must_fit_the_models_rows(kosmos_tower, kosmos_tokenizer):
    model = tiny_model(kosmos_tower, max_seq_len=31)
    generate(model, [prompt(19)], random_images(0), kosmos_tokenizer, max_new_tokens=11)
    with pytest.raises(UserError, match="a prompt of 20 and 12 new tokens exceed the model's 31 positions"):
        generate(model, [prompt(3), prompt(19)], random_images(0), kosmos_tokenizer, max_new_tokens=12)


def test_a_prompt_without_its_images_is_an_error(kosmos_tower, kosmos_tokenizer):
    with pytest.raises(ValueError, match="2 places for 1 images"):
        generate(tiny_model(kosmos_tower), [prompt(3, 2)], random_images(1), kosmos_tokenizer, max_new_tokens=5)


# ---- greedy


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("norm", ["sub", "pre"])
def test_the_cache_changes_no_token(kosmos_tower, kosmos_tokenizer, positions, norm):
    start, images, results, expected = prompt(4, 2), random_images(2), [], []
    for seed in range(3):
        model = talkative(tiny_model(kosmos_tower, seed, positions=positions, norm=norm))
        expected.append(greedy_without_cache(model, start, images, kosmos_tokenizer, 11))
        results += generate(model, [start], images, kosmos_tokenizer, max_new_tokens=11)
    assert results == expected
    assert len({id_ for ids in expected for id_ in ids}) > 2  # no model that only repeats itself


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("n_beams", [1, 3])
def test_prompts_of_different_lengths_are_answered_as_each_alone(kosmos_tower, kosmos_tokenizer, positions, n_beams):
    model, images = talkative(tiny_model(kosmos_tower, positions=positions)), random_images(3)
    prompts = [prompt(4, 1, seed=1), prompt(1, 0, seed=2), prompt(13, 2, seed=3), prompt(0, 0, seed=4)]
    options = {"max_new_tokens": 11, "n_beams": n_beams}
    together = generate(model, prompts, images, kosmos_tokenizer, **options)
    parts = images.split([1, 0, 2, 0])
    alone = [generate(model, [p], part, kosmos_tokenizer, **options)[0] for p, part in zip(prompts, parts, strict=True)]
    assert together == alone
    assert len({tuple(ids) for ids in together}) > 1


def test_an_answer_depends_on_its_image(kosmos_tower, kosmos_tokenizer):
    model = tiny_model(kosmos_tower, vision={"feature_length": 90.0})
    answers = [generate(model, [prompt(1, 1)], random_images(1, s), kosmos_tokenizer, max_new_tokens=7)[0] for s in range(5)]
    assert len({tuple(ids) for ids in answers}) > 1


@pytest.mark.parametrize("n_beams", [1, 3])
def test_control_tokens_are_never_generated(kosmos_tower, kosmos_tokenizer, n_beams):
    unknown_rows = range(kosmos_tokenizer.vocab_size, VOCAB)
    tempting = dict.fromkeys([*FORBIDDEN, *unknown_rows], 100.0)
    model = unigram(tiny_model(kosmos_tower), tempting | {7: 0.5, SPECIAL.line_end: 0.4})
    (ids,) = generate(model, [prompt(3)], random_images(0), kosmos_tokenizer, max_new_tokens=11, n_beams=n_beams)
    assert ids == [7] * 11


@pytest.mark.parametrize("n_beams", [1, 3])
def test_line_ends_may_be_generated(kosmos_tower, kosmos_tokenizer, n_beams):
    model = unigram(tiny_model(kosmos_tower), {SPECIAL.line_end: 0.9, 7: 0.1})
    (ids,) = generate(model, [prompt(3)], random_images(0), kosmos_tokenizer, max_new_tokens=5, n_beams=n_beams)
    assert ids == [SPECIAL.line_end] * 5


@pytest.mark.parametrize("n_beams", [1, 3])
def test_a_continuation_ends_before_the_end_token(kosmos_tower, kosmos_tokenizer, n_beams):
    model = unigram(tiny_model(kosmos_tower), {EOS: 0.9, 7: 0.1})
    options = {"max_new_tokens": 5, "n_beams": n_beams}
    assert generate(model, [prompt(3), prompt(1)], random_images(0), kosmos_tokenizer, **options) == [[], []]


@pytest.mark.parametrize("training", [True, False])
def test_dropout_is_off_while_generating_and_back_afterwards(kosmos_tower, kosmos_tokenizer, training):
    expected = generate(tiny_model(kosmos_tower), [prompt(3)], random_images(0), kosmos_tokenizer, max_new_tokens=11)
    model = tiny_model(kosmos_tower, dropout_rate=0.5, attention_dropout_rate=0.5).train(training)
    assert generate(model, [prompt(3)], random_images(0), kosmos_tokenizer, max_new_tokens=11) == expected
    assert model.training == training


def test_parts_that_were_evaluating_while_the_rest_trained_still_do_after_generating(kosmos_tower, kosmos_tokenizer):
    model = tiny_model(kosmos_tower).train()
    model.vision.eval()
    model.decoder.layers[1].eval()
    before = {name: module.training for name, module in model.named_modules()}
    generate(model, [prompt(2, 1)], random_images(1), kosmos_tokenizer, max_new_tokens=1)
    assert {name: module.training for name, module in model.named_modules()} == before


# ---- beams

FEW = SimpleNamespace(
    special=SpecialTokens.for_pieces(5), vocab_size=12, extra=(), decode=lambda ids, keep_control: str(ids)
)
"""A vocabulary of two pieces, 4 and 5, with </s> 2 and </line> 11."""
ALLOWED = (4, 5, FEW.special.line_end)


def exhaustive(model: Kosmos, start: Prompt, n: int, length_penalty: float) -> tuple[list[int], float]:
    """The best of all continuations of at most n tokens, </s> included, and how much better than the next it is."""
    totals: dict[tuple[int, ...], float] = {(): 0.0}
    scored: list[tuple[float, list[int]]] = []
    for length in range(n):
        for ids in itertools.product(ALLOWED, repeat=length):
            log_probs = next_log_probs(model, [*start.tokens.tolist(), *ids], start.slots, random_images(0), FEW)
            scored.append(((totals[ids] + float(log_probs[EOS])) / (length + 1) ** length_penalty, list(ids)))
            for token in ALLOWED:
                totals[(*ids, token)] = totals[ids] + float(log_probs[token])
    scored += [(totals[ids] / n**length_penalty, list(ids)) for ids in itertools.product(ALLOWED, repeat=n)]
    scored.sort(reverse=True)
    return scored[0][1], scored[0][0] - scored[1][0]


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.5])
def test_a_beam_as_wide_as_the_search_finds_the_best_continuation(kosmos_tower, seed, length_penalty):
    model = talkative(tiny_model(kosmos_tower, seed, vocab_size=13))
    start = Prompt(np.array([BOS, 4, 5, 5]), np.array([], dtype=np.int64))
    best, margin = exhaustive(model, start, 3, length_penalty)
    assert margin > 1e-4  # far above what another order of sums changes
    options = {"max_new_tokens": 3, "n_beams": 27, "length_penalty": length_penalty}
    assert generate(model, [start], random_images(0), FEW, **options) == [best]


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_one_beam_is_greedy(kosmos_tower, kosmos_tokenizer, seed):
    model, start = talkative(tiny_model(kosmos_tower, seed)), prompt(4, 1)
    (ids,) = generate(model, [start], random_images(1), kosmos_tokenizer, max_new_tokens=11, n_beams=1)
    assert ids == greedy_without_cache(model, start, random_images(1), kosmos_tokenizer, 11)


def log_prob(model: Kosmos, start: Prompt, ids: Sequence[int], vocabulary) -> float:
    return sum(
        float(next_log_probs(model, [*start.tokens.tolist(), *ids[:i]], start.slots, random_images(0), vocabulary)[id_])
        for i, id_ in enumerate(ids)
    )


def test_a_wider_beam_finds_something_likelier_than_greedy(kosmos_tower, kosmos_tokenizer):
    model, start = talkative(tiny_model(kosmos_tower, 3)), prompt(4)
    options = {"max_new_tokens": 5, "length_penalty": 0.0}
    greedy, wide = (generate(model, [start], random_images(0), kosmos_tokenizer, n_beams=n, **options)[0] for n in (1, 7))
    assert len(greedy) == len(wide) == 5
    assert log_prob(model, start, wide, kosmos_tokenizer) > log_prob(model, start, greedy, kosmos_tokenizer) + 1e-3


@pytest.mark.parametrize(("length_penalty", "expected"), [(0.0, []), (1.0, [7, 7, 7]), (0.1, []), (2.0, [7, 7, 7])])
def test_a_higher_length_penalty_favours_longer_continuations(kosmos_tower, kosmos_tokenizer, length_penalty, expected):
    # P(7) = 0.6, P(</s>) = 0.4 at every step. Three words: 3 ln 0.6 = -1.53, at once </s>: ln 0.4 = -0.92;
    # divided by 3 and 1: -0.51 and -0.92; with exponent 0.1: -1.37 and -0.92.
    model = unigram(tiny_model(kosmos_tower), {7: 0.6, EOS: 0.4})
    options = {"max_new_tokens": 3, "n_beams": 5, "length_penalty": length_penalty}
    assert generate(model, [prompt(2)], random_images(0), kosmos_tokenizer, **options) == [expected]
