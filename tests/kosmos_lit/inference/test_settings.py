"""The effect of each generation setting."""

import itertools
import math
from collections import Counter

import pytest
import torch

from kosmos_lit.errors import UserError
from kosmos_lit.inference.config import GenerationConfig
from kosmos_lit.inference.engine import Engine
from kosmos_lit.inference.prompts import Prompt
from kosmos_lit.tokenizer import BOS
from tests.kosmos_lit.inference.test_generate_batch import unigram
from tests.kosmos_lit.inference.test_prefill import N_IMAGES, PROMPTS, prompt
from tests.kosmos_lit.tiny_kosmos import random_images, tiny_model

METHODS = [{"n_beams": 1}, {"n_beams": 3}, {"temperature": 2.0}]


def generate(model, prompts, images, tokenizer, **settings):
    return Engine(model, tokenizer).generate_batch(prompts, images, GenerationConfig(**settings))


def ids_of(continuations):
    return [continuation.tokens for continuation in continuations]


# ---- choices

ANIMALS = ("the cat", "the cat sat", "a red square", "jackdaws love my big sphinx", "quartz")


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_constrained_continuation_is_exactly_one_of_the_choices(talker, kosmos_tokenizer, method):
    texts = []
    for seed in range(5):
        continuations = generate(
            talker(seed), PROMPTS, random_images(3), kosmos_tokenizer, choices=ANIMALS, seed=seed, **method
        )
        assert {continuation.finish_reason for continuation in continuations} == {"end"}
        texts += [continuation.text for continuation in continuations]
    assert set(texts) <= set(ANIMALS)
    assert len(set(texts)) > 1


def test_beams_as_many_as_choices_find_the_likeliest_one(talker, kosmos_tokenizer):
    for seed in range(7):
        model, settings = talker(seed), {"choices": ANIMALS, "n_beams": len(ANIMALS), "length_penalty": 0.0}
        continuations = generate(model, PROMPTS, random_images(3), kosmos_tokenizer, **settings)
        scored = Engine(model, kosmos_tokenizer).score_batch(PROMPTS, [ANIMALS] * 3, random_images(3), with_end=True)
        assert [c.text for c in continuations] == [max(row, key=lambda s: s.total).text for row in scored]


@pytest.mark.parametrize("n_beams", [1, 5])
def test_a_single_choice_is_always_generated(talker, kosmos_tokenizer, n_beams):
    [continuation] = generate(
        talker(), PROMPTS[1:2], random_images(0), kosmos_tokenizer, choices=("big  quartz",), n_beams=n_beams
    )
    assert continuation.text == "big  quartz"  # as in the settings, though its tokens fold the spaces


# ---- stop strings


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_text_ends_before_a_stop_string_that_spans_two_tokens(kosmos_tower, kosmos_tokenizer, method):
    one = next(i for i in range(4, 60) if len(kosmos_tokenizer.decode([i])) > 1)
    once, twice = kosmos_tokenizer.decode([one]), kosmos_tokenizer.decode([one, one])
    stop = twice[len(once) - 1 : len(once) + 1]  # the last character of the first, and one of the second
    model = unigram(tiny_model(kosmos_tower), {one: 1.0})
    [continuation] = generate(
        model, PROMPTS[1:2], random_images(0), kosmos_tokenizer, max_new_tokens=9, stop=("zzz", stop), **method
    )
    assert (continuation.text, continuation.tokens, continuation.finish_reason) == (once[:-1], (one, one), "stop")


def test_only_the_rows_with_the_stop_string_stop(talker, kosmos_tokenizer):
    model = talker()
    free = generate(model, PROMPTS, random_images(3), kosmos_tokenizer, max_new_tokens=11)
    word = next(c.text[4:6] for c in free if sum(c.text[4:6] in o.text for o in free) < 3 and c.text[4:6].strip())
    continuations = generate(model, PROMPTS, random_images(3), kosmos_tokenizer, max_new_tokens=11, stop=(word,))
    assert [c.text for c in continuations] == [c.text.split(word)[0] for c in free]
    assert {c.finish_reason == "stop" for c in continuations} == {True, False}


# ---- sampling


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"temperature": 1.0}, {7: 0.5, 8: 0.3, 9: 0.2}),
        ({"temperature": 0.5}, {7: 0.25 / 0.38, 8: 0.09 / 0.38, 9: 0.04 / 0.38}),
        ({"temperature": 1.0, "top_k": 2}, {7: 0.5 / 0.8, 8: 0.3 / 0.8}),
        ({"temperature": 1.0, "top_p": 0.6}, {7: 0.5 / 0.8, 8: 0.3 / 0.8}),
        ({"temperature": 0.5, "top_p": 0.6}, {7: 1.0}),
    ],
)
def test_draws_follow_the_distribution(kosmos_tower, kosmos_tokenizer, settings, expected):
    model, n = unigram(tiny_model(kosmos_tower), {7: 0.5, 8: 0.3, 9: 0.2}), 1009
    counts = Counter()
    for seed in range(n // 50 + 1):
        sampled = generate(model, PROMPTS[1:2], random_images(0), kosmos_tokenizer, max_new_tokens=50, seed=seed, **settings)
        [ids] = ids_of(sampled)
        counts.update(ids)
    total = sum(counts.values())
    assert set(counts) == set(expected)
    for id_, p in expected.items():
        assert abs(counts[id_] / total - p) <= 4 * math.sqrt(p * (1 - p) / total)  # four standard errors


def test_a_draw_depends_on_seed_prompt_and_images_not_on_the_batch(talker, kosmos_tokenizer):
    model, images, settings = talker(), random_images(3), {"temperature": 1.5, "max_new_tokens": 13, "seed": 3}
    together = ids_of(generate(model, PROMPTS, images, kosmos_tokenizer, **settings))
    parts = images.split(N_IMAGES)
    backwards = ids_of(generate(model, PROMPTS[::-1], torch.cat(parts[::-1]), kosmos_tokenizer, **settings))
    assert together == backwards[::-1]
    for start, part, ids in zip(PROMPTS, parts, together, strict=True):
        assert ids_of(generate(model, [start], part, kosmos_tokenizer, **settings)) == [ids]


def test_other_seeds_and_other_images_draw_otherwise(kosmos_tower, kosmos_tokenizer):
    model = unigram(tiny_model(kosmos_tower), dict.fromkeys(range(7, 40), 1 / 33))  # whatever it sees
    start, settings = prompt(3, 1, 0), {"temperature": 1.0, "max_new_tokens": 13}
    images = torch.cat([random_images(1, 1), random_images(1, 2)])
    first, second = ids_of(generate(model, [start, start], images, kosmos_tokenizer, **settings))
    assert first != second
    assert [first] != ids_of(generate(model, [start], images[:1], kosmos_tokenizer, seed=1, **settings))


def test_a_low_temperature_is_greedy(talker, kosmos_tokenizer):
    model = talker()
    greedy = generate(model, PROMPTS, random_images(3), kosmos_tokenizer, max_new_tokens=11)
    assert generate(model, PROMPTS, random_images(3), kosmos_tokenizer, max_new_tokens=11, temperature=1e-4) == greedy


# ---- limits


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_no_run_of_tokens_comes_twice(talker, kosmos_tokenizer, method):
    start = Prompt(PROMPTS[1].tokens, PROMPTS[1].slots)
    for seed in range(3):
        settings = {"no_repeat_ngram_size": 2, "max_new_tokens": 23, "seed": seed, **method}
        [ids] = ids_of(generate(talker(seed), [start], random_images(0), kosmos_tokenizer, **settings))
        tokens = [*start.tokens.tolist(), *ids]
        runs = list(itertools.pairwise(tokens))
        assert len(set(runs)) == len(runs)


def test_control_tokens_may_be_generated_if_allowed(kosmos_tower, kosmos_tokenizer):
    model, settings = unigram(tiny_model(kosmos_tower), {BOS: 0.6, 7: 0.4}), {"max_new_tokens": 3}
    assert ids_of(generate(model, PROMPTS[1:2], random_images(0), kosmos_tokenizer, **settings)) == [(7, 7, 7)]
    free = generate(model, PROMPTS[1:2], random_images(0), kosmos_tokenizer, allow_control_tokens=True, **settings)
    assert ids_of(free) == [(BOS, BOS, BOS)]


def test_a_diverged_model_is_an_error(kosmos_tower, kosmos_tokenizer):
    model = tiny_model(kosmos_tower)
    with torch.no_grad():
        model.decoder.layers[0].ffn.fc2.weight[3, 5] = float("nan")
    with pytest.raises(UserError, match="the model gives no finite numbers after the prompt"):
        generate(model, PROMPTS[1:2], random_images(0), kosmos_tokenizer, max_new_tokens=3)


def test_no_prompts_have_no_continuations(talker, kosmos_tokenizer):
    assert generate(talker(), [], random_images(0), kosmos_tokenizer) == []
