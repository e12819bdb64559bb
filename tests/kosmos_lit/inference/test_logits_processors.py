"""Each rule by hand, and beside transformers' processor of the same name."""

import math

import pytest
import torch
from transformers.generation import (
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from kosmos_lit.inference.logits_processors import forbid_repeated_ngrams, keep_top_k, keep_top_p, penalise_repetition
from kosmos_lit.tokenizer import EOS, PAD

R, V = 5, 13
NEVER = float("-inf")


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 3


def history(length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(4, 7, (R, length), generator=torch.Generator().manual_seed(seed))


def test_a_penalty_divides_positive_and_multiplies_negative_scores_once():
    scores = torch.tensor([[3.0, -3.0, 6.0, -6.0]])
    penalised = penalise_repetition(scores, torch.tensor([[2, 3, 2, 2]]), 1.5)
    assert penalised.tolist() == [[3.0, -3.0, 4.0, -9.0]]


def test_a_penalty_is_that_of_transformers():
    scores, ids = draw(R, V), history(11)
    expected = RepetitionPenaltyLogitsProcessor(1.7)(ids, scores.clone())
    assert torch.equal(penalise_repetition(scores, ids, 1.7), expected)


def test_a_run_of_three_does_not_come_twice():
    ids = torch.tensor([[4, 5, 6, 7, 4, 5, 9, 4, 5]])
    forbidden = forbid_repeated_ngrams(torch.zeros(1, V), ids, 3).isinf()
    assert forbidden.nonzero()[:, 1].tolist() == [6, 9]


@pytest.mark.parametrize("size", [1, 2, 3, 11, 12])
def test_ngram_limits_are_those_of_transformers(size):
    scores, ids = draw(R, V), history(11)
    expected = NoRepeatNGramLogitsProcessor(size)(ids, scores.clone())
    assert torch.equal(forbid_repeated_ngrams(scores, ids, size), expected)


def test_an_ngram_limit_leaves_a_way_to_end():
    ids = torch.tensor([[PAD, 4, EOS, 4]])
    assert not forbid_repeated_ngrams(torch.zeros(1, V), ids, 2).isinf().any()


@pytest.mark.parametrize("k", [1, 3, V, 99])
def test_top_k_is_that_of_transformers(k):
    scores = draw(R, V)
    assert torch.equal(keep_top_k(scores, k), TopKLogitsWarper(k)(None, scores.clone()))


@pytest.mark.parametrize("p", [0.001, 0.3, 0.9, 1.0])
def test_top_p_is_that_of_transformers(p):
    scores = draw(R, V)
    assert torch.equal(keep_top_p(scores, p), TopPLogitsWarper(p)(None, scores.clone()))


def test_top_p_keeps_the_fewest_tokens_that_reach_it():
    scores = torch.tensor([[0.15, 0.5, 0.05, 0.3]]).log()
    assert keep_top_p(scores, 0.7).exp().tolist() == [[0.0, 0.5, 0.0, pytest.approx(0.3)]]
    assert math.isclose(float(keep_top_p(scores, 0.9).exp().sum()), 0.95, rel_tol=1e-6)
