import math

import pytest
import torch
import torch.nn.functional as F

from kosmos_lit.ops.losses import token_nll
from tests.kosmos_lit.tiny_kosmos import normal

S, D, V = 11, 5, 17
TARGETS = torch.arange(S) * 7 % V


def with_gradients(chunk: int | None) -> list[torch.Tensor]:
    hidden, head = normal(S, D, seed=1).requires_grad_(), normal(V, D, seed=2).requires_grad_()
    nll = token_nll(hidden, head, TARGETS, chunk)
    return [nll, *torch.autograd.grad(nll, (hidden, head), normal(S, seed=3))]


@pytest.mark.parametrize("chunk", [1, 3, 10, S, 100])
def test_chunks_change_neither_loss_nor_gradients(chunk):
    for found, expected in zip(with_gradients(chunk), with_gradients(None), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)  # fp32, sums of 17 in another order


@pytest.mark.parametrize("chunk", [3, None])
def test_the_loss_is_the_cross_entropy_of_each_position(chunk):
    hidden, head = normal(S, D, seed=1), normal(V, D, seed=2)
    expected = F.cross_entropy(hidden @ head.T, TARGETS, reduction="none")
    torch.testing.assert_close(token_nll(hidden, head, TARGETS, chunk), expected, rtol=1e-6, atol=1e-6)  # fp32


def test_a_model_that_knows_nothing_pays_the_logarithm_of_the_vocabulary():
    nll = token_nll(torch.zeros(S, D), normal(V, D), TARGETS)
    torch.testing.assert_close(nll, torch.full((S,), math.log(V)), rtol=1e-6, atol=0)  # fp32


def test_the_loss_is_float32_whatever_the_weights_are():
    nll = token_nll(normal(S, D).bfloat16(), normal(V, D).bfloat16(), TARGETS, 3)
    assert nll.dtype == torch.float32


def test_no_supervised_position_gives_no_loss():
    assert token_nll(torch.zeros(0, D), normal(V, D), torch.zeros(0, dtype=torch.int64), 3).shape == (0,)
