import math

import pytest
import torch

from kosmos_lit.errors import UserError
from kosmos_lit.inference import scoring
from kosmos_lit.inference.engine import Engine
from kosmos_lit.tokenizer import EOS
from tests.kosmos_lit.inference.conftest import POSITIONS
from tests.kosmos_lit.inference.test_prefill import N_IMAGES, PROMPTS, uncached
from tests.kosmos_lit.tiny_kosmos import random_images, tiny_model

CANDIDATES = [["the cat", "the cat sat", "a red square", "the mat"], ["big quartz"], ["the cat", "jackdaws love", "x"]]


@torch.inference_mode()
def alone(model, tokenizer, start, images, text, end):
    """Return the log-probability of each token, each without a cache."""
    ids = [*tokenizer.encode(text).tolist(), *end]
    hidden = [uncached(model, start, images, ids[:i]) for i in range(len(ids))]
    return [float(model.decoder.logits(h).log_softmax(-1)[id_]) for h, id_ in zip(hidden, ids, strict=True)]


@pytest.mark.parametrize("with_end", [False, True])
@pytest.mark.parametrize("max_nodes", [1024, 7])
@pytest.mark.parametrize("positions", POSITIONS)
def test_candidates_score_as_each_whole_sequence_without_a_cache(
    talker, kosmos_tokenizer, monkeypatch, positions, max_nodes, with_end
):
    monkeypatch.setattr(scoring, "MAX_NODES", max_nodes)  # 7: in parts, some of one candidate only
    monkeypatch.setattr(scoring, "MAX_LOGITS", 200)  # logits of two nodes at once
    model, images = talker(positions=positions), random_images(3)
    scores = Engine(model, kosmos_tokenizer).score_batch(PROMPTS, CANDIDATES, images, with_end=with_end)
    for start, own, texts, row in zip(PROMPTS, images.split(N_IMAGES), CANDIDATES, scores, strict=True):
        assert [scored.text for scored in row] == texts
        for scored in row:
            expected = alone(model, kosmos_tokenizer, start, own, scored.text, [EOS] if with_end else [])
            assert scored.log_probs == pytest.approx(expected, abs=1e-5, rel=1e-5)  # fp32, two layers


def test_a_total_is_the_sum_and_a_mean_is_per_token(talker, kosmos_tokenizer):
    [[scored]] = Engine(talker(), kosmos_tokenizer).score_batch(PROMPTS[1:2], [["the cat sat"]], random_images(0))
    n = len(kosmos_tokenizer.encode("the cat sat"))
    assert scored.n_tokens == len(scored.log_probs) == n > 1
    assert scored.total == pytest.approx(math.fsum(scored.log_probs))
    assert scored.mean == pytest.approx(scored.total / n)


def test_each_prompt_and_each_common_beginning_is_decoded_once(talker, kosmos_tokenizer):
    model, shapes = talker(), []
    model.decoder.register_forward_pre_hook(lambda _, inputs: shapes.append(tuple(inputs[0].shape)))
    texts = ["the cat", "the cat sat", "the cat sat on"]
    Engine(model, kosmos_tokenizer).score_batch(PROMPTS[1:2], [texts], random_images(0))
    assert shapes == [(1, len(PROMPTS[1].tokens)), (1, len(kosmos_tokenizer.encode(texts[-1])))]


def test_a_candidate_without_tokens_is_the_users_error(talker, kosmos_tokenizer):
    with pytest.raises(UserError, match="the candidate ' ' has no tokens"):
        Engine(talker(), kosmos_tokenizer).score_batch(PROMPTS[1:2], [["the", " "]], random_images(0))


def test_every_prompt_needs_its_candidates(talker, kosmos_tokenizer):
    with pytest.raises(UserError, match="1 prompts but 2 lists of candidates"):
        Engine(talker(), kosmos_tokenizer).score_batch(PROMPTS[1:2], [["the"], ["a"]], random_images(0))


def test_a_candidate_must_fit_the_models_rows(kosmos_tower, kosmos_tokenizer):
    model, n = tiny_model(kosmos_tower, max_seq_len=11), len(kosmos_tokenizer.encode("jackdaws love my"))
    assert n > 9
    with pytest.raises(UserError, match=f"a prompt of 2 and {n} new tokens exceed the model's 11 positions"):
        Engine(model, kosmos_tokenizer).score_batch(PROMPTS[1:2], [["the", "jackdaws love my"]], random_images(0))


def test_a_prompt_without_candidates_has_no_scores(talker, kosmos_tokenizer):
    scores = Engine(talker(), kosmos_tokenizer).score_batch([PROMPTS[1], PROMPTS[1]], [[], ["the"]], random_images(0))
    assert [len(row) for row in scores] == [0, 1]
    assert Engine(talker(), kosmos_tokenizer).score_batch(PROMPTS[1:2], [[]], random_images(0)) == [[]]
