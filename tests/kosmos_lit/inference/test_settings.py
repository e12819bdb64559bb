"""What each setting does to what is written."""

import itertools
import math
from collections import Counter

import pytest
import torch

from kosmos_lit.errors import UserError
from kosmos_lit.inference.generate import GenerationConfig, Prompt, generate, score
from kosmos_lit.tokenizer import BOS
from tests.kosmos_lit.inference.test_generate import unigram
from tests.kosmos_lit.inference.test_prefill import N_IMAGES, PROMPTS, prompt
from tests.kosmos_lit.tiny_kosmos import random_images, tiny_model

WAYS = [{"n_beams": 1}, {"n_beams": 3}, {"temperature": 2.0}]


def write(model, prompts, images, tokenizer, **settings):
    return generate(model, prompts, images, tokenizer, GenerationConfig(**settings))


def ids_of(made):
    return [continuation.tokens for continuation in made]


# ---- choices

ANIMALS = ("the cat", "the cat sat", "a red square", "jackdaws love my big sphinx", "quartz")


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_a_constrained_continuation_is_exactly_one_of_the_choices(talker, kosmos_tokenizer, way):
    written = []
    for seed in range(5):
        made = write(talker(seed), PROMPTS, random_images(3), kosmos_tokenizer, choices=ANIMALS, seed=seed, **way)
        assert {continuation.ended for continuation in made} == {"end"}
        written += [continuation.text for continuation in made]
    assert set(written) <= set(ANIMALS)
    assert len(set(written)) > 1


def test_beams_as_many_as_choices_find_the_likeliest_one(talker, kosmos_tokenizer):
    for seed in range(7):
        model, settings = talker(seed), {"choices": ANIMALS, "n_beams": len(ANIMALS), "length_penalty": 0.0}
        made = write(model, PROMPTS, random_images(3), kosmos_tokenizer, **settings)
        scored = score(model, PROMPTS, [ANIMALS] * 3, random_images(3), kosmos_tokenizer, with_end=True)
        assert [c.text for c in made] == [max(row, key=lambda s: s.total).text for row in scored]


@pytest.mark.parametrize("n_beams", [1, 5])
def test_one_choice_is_no_choice(talker, kosmos_tokenizer, n_beams):
    [made] = write(talker(), PROMPTS[1:2], random_images(0), kosmos_tokenizer, choices=("big  quartz",), n_beams=n_beams)
    assert made.text == "big  quartz"  # as it was given, though its tokens fold the spaces


# ---- stop strings


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_a_stop_string_ends_before_it_though_it_begins_in_one_token_and_ends_in_another(
    kosmos_tower, kosmos_tokenizer, way
):
    one = next(i for i in range(4, 60) if len(kosmos_tokenizer.decode([i])) > 1)
    once, twice = kosmos_tokenizer.decode([one]), kosmos_tokenizer.decode([one, one])
    stop = twice[len(once) - 1 : len(once) + 1]  # the last character of the first, and one of the second
    model = unigram(tiny_model(kosmos_tower), {one: 1.0})
    [made] = write(model, PROMPTS[1:2], random_images(0), kosmos_tokenizer, max_new_tokens=9, stop=("zzz", stop), **way)
    assert (made.text, made.tokens, made.ended) == (once[:-1], (one, one), "stop")


def test_only_the_rows_that_said_it_stop(talker, kosmos_tokenizer):
    model = talker()
    free = write(model, PROMPTS, random_images(3), kosmos_tokenizer, max_new_tokens=11)
    word = next(c.text[4:6] for c in free if sum(c.text[4:6] in o.text for o in free) < 3 and c.text[4:6].strip())
    made = write(model, PROMPTS, random_images(3), kosmos_tokenizer, max_new_tokens=11, stop=(word,))
    assert [c.text for c in made] == [c.text.split(word)[0] for c in free]
    assert {c.ended == "stop" for c in made} == {True, False}


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
    drawn = Counter()
    for seed in range(n // 50 + 1):
        sampled = write(model, PROMPTS[1:2], random_images(0), kosmos_tokenizer, max_new_tokens=50, seed=seed, **settings)
        [ids] = ids_of(sampled)
        drawn.update(ids)
    total = sum(drawn.values())
    assert set(drawn) == set(expected)
    for id_, share in expected.items():
        assert abs(drawn[id_] / total - share) <= 4 * math.sqrt(share * (1 - share) / total)  # four standard errors


def test_a_draw_depends_on_seed_prompt_and_images_not_on_the_batch(talker, kosmos_tokenizer):
    model, images, settings = talker(), random_images(3), {"temperature": 1.5, "max_new_tokens": 13, "seed": 3}
    together = ids_of(write(model, PROMPTS, images, kosmos_tokenizer, **settings))
    parts = images.split(N_IMAGES)
    backwards = ids_of(write(model, PROMPTS[::-1], torch.cat(parts[::-1]), kosmos_tokenizer, **settings))
    assert together == backwards[::-1]
    for start, part, ids in zip(PROMPTS, parts, together, strict=True):
        assert ids_of(write(model, [start], part, kosmos_tokenizer, **settings)) == [ids]


def test_other_seeds_and_other_images_draw_otherwise(kosmos_tower, kosmos_tokenizer):
    model = unigram(tiny_model(kosmos_tower), dict.fromkeys(range(7, 40), 1 / 33))  # whatever it sees
    start, settings = prompt(3, 1, 0), {"temperature": 1.0, "max_new_tokens": 13}
    images = torch.cat([random_images(1, 1), random_images(1, 2)])
    first, second = ids_of(write(model, [start, start], images, kosmos_tokenizer, **settings))
    assert first != second
    assert [first] != ids_of(write(model, [start], images[:1], kosmos_tokenizer, seed=1, **settings))


def test_a_low_temperature_is_greedy(talker, kosmos_tokenizer):
    model = talker()
    greedy = write(model, PROMPTS, random_images(3), kosmos_tokenizer, max_new_tokens=11)
    assert write(model, PROMPTS, random_images(3), kosmos_tokenizer, max_new_tokens=11, temperature=1e-4) == greedy


# ---- limits


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_no_run_of_tokens_comes_twice(talker, kosmos_tokenizer, way):
    start = Prompt(PROMPTS[1].tokens, PROMPTS[1].slots)
    for seed in range(3):
        settings = {"no_repeat_ngram_size": 2, "max_new_tokens": 23, "seed": seed, **way}
        [ids] = ids_of(write(talker(seed), [start], random_images(0), kosmos_tokenizer, **settings))
        whole = [*start.tokens.tolist(), *ids]
        runs = list(itertools.pairwise(whole))
        assert len(set(runs)) == len(runs)


def test_control_tokens_may_be_written_if_one_asks_for_them(kosmos_tower, kosmos_tokenizer):
    model, settings = unigram(tiny_model(kosmos_tower), {BOS: 0.6, 7: 0.4}), {"max_new_tokens": 3}
    assert ids_of(write(model, PROMPTS[1:2], random_images(0), kosmos_tokenizer, **settings)) == [(7, 7, 7)]
    free = write(model, PROMPTS[1:2], random_images(0), kosmos_tokenizer, allow_control_tokens=True, **settings)
    assert ids_of(free) == [(BOS, BOS, BOS)]


def test_a_model_that_has_diverged_is_named(kosmos_tower, kosmos_tokenizer):
    model = tiny_model(kosmos_tower)
    with torch.no_grad():
        model.decoder.layers[0].ffn.fc2.weight[3, 5] = float("nan")
    with pytest.raises(UserError, match="the model gives no finite numbers after the prompt"):
        write(model, PROMPTS[1:2], random_images(0), kosmos_tokenizer, max_new_tokens=3)


def test_no_prompts_have_no_continuations(talker, kosmos_tokenizer):
    assert write(talker(), [], random_images(0), kosmos_tokenizer) == []
