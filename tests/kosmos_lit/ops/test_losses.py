import math
import shutil
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from kosmos_lit.ops.graphs import Graphs
from kosmos_lit.ops.losses import VOCAB_ALIGNMENT, token_nll, weighted_nll
from tests.kosmos_lit.tiny_kosmos import normal

S, D, V = 11, 5, 17
TARGETS = torch.arange(S) * 7 % V


def with_gradients(chunk: int | None) -> list[torch.Tensor]:
    hidden, head = normal(S, D, seed=1).requires_grad_(), normal(V, D, seed=2).requires_grad_()
    nll = token_nll(hidden, head, TARGETS, chunk)
    return [nll, *torch.autograd.grad(nll, (hidden, head), normal(S, seed=3))]


@pytest.mark.parametrize("chunk", [1, 3, 10, S, 100])
def test_chunks_change_neither_loss_nor_gradients(chunk):
    for actual, expected in zip(with_gradients(chunk), with_gradients(None), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)  # fp32, sums of 17 in another order


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


# ---- loss and gradients in one go


def in_one_go(
    chunk: int | None, dtype: torch.dtype = torch.float32, **options: Graphs
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    hidden, head = (normal(*shape, seed=i).to(dtype).requires_grad_() for i, shape in ((1, (S, D)), (2, (V, D))))
    loss, nll = weighted_nll(hidden, head, TARGETS, normal(S, seed=3).abs(), chunk, **options)
    (3 * loss).backward()
    assert hidden.grad is not None
    assert head.grad is not None
    return loss, nll, hidden.grad, head.grad


def autograd_loss(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    """The same by autograd, on the same rounded numbers in float64."""
    hidden, head = (normal(*shape, seed=i).to(dtype).double().requires_grad_() for i, shape in ((1, (S, D)), (2, (V, D))))
    nll = F.cross_entropy(hidden @ head.T, TARGETS, reduction="none")
    loss = (normal(S, seed=3).abs() * nll).sum()
    return loss.detach(), nll.detach(), *torch.autograd.grad(3 * loss, (hidden, head))


@pytest.mark.parametrize("chunk", [1, 3, 10, S, 100, None])
def test_loss_and_gradients_in_one_go_are_those_of_autograd(chunk):
    for actual, expected in zip(in_one_go(chunk), autograd_loss(), strict=True):
        torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-6)  # fp32, sums of 17


@pytest.mark.skipif(shutil.which("gcc") is None, reason="inductor needs a C compiler")
def test_fused_logits_give_the_same():
    for actual, expected in zip(in_one_go(4, compiler=Graphs()), autograd_loss(), strict=True):
        torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-6)  # fp32, sums of 17


def test_gradients_in_16_bits_are_off_by_rounding_alone():
    # Logits of some 2 are rounded to 2^-8 of themselves, so nats and p are off by some 1 %; gradients once more.
    loss, nll, *gradients = in_one_go(3, torch.bfloat16)
    expected_loss, expected_nll, *expected_gradients = autograd_loss(torch.bfloat16)
    torch.testing.assert_close(loss.double(), expected_loss, rtol=2e-2, atol=0)
    torch.testing.assert_close(nll.double(), expected_nll, rtol=2e-2, atol=2e-2)
    for actual, expected in zip(gradients, expected_gradients, strict=True):
        assert actual.dtype == torch.bfloat16
        assert (actual - expected).norm() < 2e-2 * expected.norm()


def test_under_autocast_the_heads_gradient_is_added_up_in_float32():
    # 512 chunks of one position each, all the same: a running sum in bf16 would stop growing at 256 of them.
    n = 512
    hidden, head = torch.ones(n, D).requires_grad_(), torch.zeros(V, D).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = weighted_nll(hidden, head, torch.zeros(n, dtype=torch.int64), 1.0, chunk=1)
    loss.backward()
    assert head.grad is not None
    assert head.grad.dtype == torch.float32
    torch.testing.assert_close(head.grad[0], torch.full((D,), n * (1 / V - 1)), rtol=2**-8, atol=0)  # 1/V - 1 in bf16


def test_a_frozen_head_gets_no_gradient_and_costs_none():
    hidden, head = normal(S, D, seed=1).requires_grad_(), normal(V, D, seed=2)
    weighted_nll(hidden, head, TARGETS, 1.0, 3)[0].backward()
    assert head.grad is None
    expected, *_ = torch.autograd.grad(token_nll(hidden, head, TARGETS).sum(), hidden)
    torch.testing.assert_close(hidden.grad, expected, rtol=1e-5, atol=1e-6)  # fp32, sums of 17


def test_only_one_chunk_of_logits_is_ever_held():
    n, chunk, vocab = 96, 7, 1001
    hidden, head = normal(n, D).requires_grad_(), normal(vocab, D, seed=1).requires_grad_()

    class Sizes(TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            rows = [t.shape[0] for t in (out if isinstance(out, tuple) else (out,)) if t.shape[-1:] == (vocab,)]
            self.largest = max([self.largest, *rows])
            return out

    with Sizes() as sizes:
        weighted_nll(hidden, head, torch.arange(n), 1.0, chunk)[0].backward()
    assert sizes.largest == chunk


def test_rows_of_logits_in_16_bits_begin_where_gpus_can_load_them():
    class Strides(TorchDispatchMode):
        values: ClassVar[list[int]] = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten.mm.default:
                self.values += [max(factor.stride()) for factor in args if V <= max(factor.shape) < 2 * VOCAB_ALIGNMENT]
            return func(*args, **(kwargs or {}))

    assert V % VOCAB_ALIGNMENT
    with Strides() as strides:
        in_one_go(3, torch.bfloat16)
    assert strides.values
    assert {stride for stride in strides.values if stride != D} == {VOCAB_ALIGNMENT}


def test_the_vocabulary_projection_is_computed_once():
    with FlopCounterMode(display=False) as flops:
        in_one_go(3)
    assert flops.get_total_flops() == 3 * 2 * S * D * V  # logits, and the gradients of both factors


def test_a_loss_without_positions_is_zero_and_so_are_its_gradients():
    hidden, head = torch.zeros(0, D).requires_grad_(), normal(V, D).requires_grad_()
    loss, nll = weighted_nll(hidden, head, torch.zeros(0, dtype=torch.int64), 0.1, 3)
    loss.backward()
    assert (loss, nll.shape, hidden.grad.shape) == (0, (0,), (0, D))
    assert torch.equal(head.grad, torch.zeros(V, D))


def test_without_gradients_the_loss_is_the_same():
    hidden, head = normal(S, D, seed=1), normal(V, D, seed=2).requires_grad_()
    with torch.no_grad():
        loss, nll = weighted_nll(hidden, head, TARGETS, normal(S, seed=3).abs(), 3)
    torch.testing.assert_close(loss, in_one_go(3)[0].detach(), rtol=1e-6, atol=0)  # fp32
    assert not nll.requires_grad


def test_a_second_backward_pass_is_refused():
    hidden, head = normal(S, D).requires_grad_(), normal(V, D)
    loss, _ = weighted_nll(hidden, head, TARGETS, 1.0)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="compute the loss again"):
        loss.backward()
