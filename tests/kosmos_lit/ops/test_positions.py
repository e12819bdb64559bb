import math

import pytest
import torch

from kosmos_lit.ops.positions import rotary_tables, rotate, rotate_pairs, rotate_real, rotation, sinusoids, xpos_tables
from tests.kosmos_lit.tiny_kosmos import normal

N, K = 101, 6


def scores(q: torch.Tensor, k: torch.Tensor, n: int, m: int, tables: torch.Tensor) -> torch.Tensor:
    """q'_n . k'_m for single vectors (K,)."""
    turned_q, _ = rotate(q.view(1, 1, 1, K), k.view(1, 1, 1, K), rotation(tables, torch.tensor([[n]])))
    _, turned_k = rotate(q.view(1, 1, 1, K), k.view(1, 1, 1, K), rotation(tables, torch.tensor([[m]])))
    return (turned_q * turned_k).sum()


def test_pairs_are_turned_by_a_quarter():
    assert rotate_pairs(torch.tensor([1.0, 2.0, 3.0, 4.0])).tolist() == [-2.0, 1.0, -4.0, 3.0]


@pytest.mark.parametrize(("n", "pair"), [(0, 0), (1, 0), (7, 1), (100, 2)])
def test_the_tables_hold_cosine_and_sine_times_decay(n, pair):
    theta = 10_000 ** (-2 * pair / K)
    zeta = (2 * pair / K + 0.4) / 1.4
    decay = zeta ** ((n - N // 2) / 512)
    cos, sin = math.cos(n * theta), math.sin(n * theta)
    actual = xpos_tables(N, K)[:, n, 2 * pair : 2 * pair + 2]
    expected = torch.tensor([[cos * decay] * 2, [sin * decay] * 2, [cos / decay] * 2, [sin / decay] * 2])
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-7)  # float64, rounded to fp32 at the end


def test_queries_and_keys_are_turned_as_written_in_the_paper():
    theta, zeta = [1.0, 0.01], [0.4 / 1.4, 0.9 / 1.4]  # K = 4
    q, k = [2.0, 3.0, 5.0, 7.0], [1.0, -1.0, 0.5, 0.25]
    n, centre = 3, 5 // 2
    expected_q, expected_k = [], []
    for i in range(2):
        cos, sin, s = math.cos(n * theta[i]), math.sin(n * theta[i]), zeta[i] ** ((n - centre) / 512)
        expected_q += [s * (q[2 * i] * cos - q[2 * i + 1] * sin), s * (q[2 * i + 1] * cos + q[2 * i] * sin)]
        expected_k += [(k[2 * i] * cos - k[2 * i + 1] * sin) / s, (k[2 * i + 1] * cos + k[2 * i] * sin) / s]
    by = rotation(xpos_tables(5, 4), torch.tensor([[n]]))
    actual_q, actual_k = rotate(torch.tensor(q).view(1, 1, 1, 4), torch.tensor(k).view(1, 1, 1, 4), by)
    torch.testing.assert_close(actual_q.flatten(), torch.tensor(expected_q), rtol=1e-6, atol=1e-6)  # fp32
    torch.testing.assert_close(actual_k.flatten(), torch.tensor(expected_k), rtol=1e-6, atol=1e-6)


def test_a_score_depends_on_the_distance_alone():
    q, k, tables = normal(K, seed=1), normal(K, seed=2), xpos_tables(N, K)
    near, far = scores(q, k, 11, 4, tables), scores(q, k, 97, 90, tables)
    torch.testing.assert_close(near, far, rtol=1e-5, atol=1e-6)  # fp32, six terms of about 1


def test_a_score_is_the_decayed_cosine_of_the_distance():
    q, k, n, m = normal(K, seed=1), normal(K, seed=2), 83, 12
    a = torch.view_as_complex(q.double().view(-1, 2))
    b = torch.view_as_complex(k.double().view(-1, 2))
    pair = torch.arange(K // 2).double() * 2 / K
    turn = torch.polar(((pair + 0.4) / 1.4) ** ((n - m) / 512), (n - m) * 10_000**-pair)
    expected = (a * b.conj() * turn).real.sum().float()
    torch.testing.assert_close(scores(q, k, n, m, xpos_tables(N, K)), expected, rtol=1e-5, atol=1e-6)  # fp32, six terms


def test_rotary_turns_as_xpos_does_without_its_decay():
    q, k, n, m = normal(K, seed=1), normal(K, seed=2), 83, 12
    a = torch.view_as_complex(q.double().view(-1, 2))
    b = torch.view_as_complex(k.double().view(-1, 2))
    turn = torch.polar(torch.ones(K // 2).double(), (n - m) * 10_000 ** -(torch.arange(K // 2).double() * 2 / K))
    expected = (a * b.conj() * turn).real.sum().float()
    torch.testing.assert_close(scores(q, k, n, m, rotary_tables(N, K)), expected, rtol=1e-5, atol=1e-6)  # fp32, six terms


def test_rotary_keeps_the_length_of_what_it_turns():
    q = normal(1, N, 3, K)
    turned_q, turned_k = rotate(q, q, rotation(rotary_tables(N, K), torch.arange(N)[None]))
    assert torch.equal(turned_q, turned_k)
    torch.testing.assert_close(turned_q.norm(dim=-1), q.norm(dim=-1), rtol=1e-6, atol=0)  # fp32, six terms


@pytest.mark.parametrize(("pair", "decay"), [(0, 0.0067), (31, 0.914)])
def test_decay_over_a_whole_row_is_that_of_the_paper(pair, decay):
    tables, n = xpos_tables(2049, 64), 2048
    seen = tables[0, n, 2 * pair] * tables[2, 0, 2 * pair] + tables[1, n, 2 * pair] * tables[3, 0, 2 * pair]
    angle = math.cos(n * 10_000 ** (-pair / 32))
    assert float(seen) / angle == pytest.approx(decay, rel=0.01)  # two digits are known


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_complex_and_real_numbers_turn_alike_forward_and_backward(dtype):
    q, k = (normal(2, 7, 3, K, seed=seed).to(dtype).requires_grad_() for seed in (1, 2))
    by = rotation(xpos_tables(N, K), torch.arange(14).view(2, 7) * 5)
    actual = []
    for turn in (rotate, rotate_real):
        turned = turn(q, k, by)
        upstream = [normal(2, 7, 3, K, seed=seed).to(dtype) for seed in (3, 4)]
        actual.append([*turned, *torch.autograd.grad(turned, (q, k), upstream)])
    # fp32: two terms; bf16: one rounding, or another where gradients of both terms are added up in bf16
    tolerance = 1e-6 if dtype == torch.float32 else 2**-7
    for a, b in zip(*actual, strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_turning_keeps_the_dtype():
    q = normal(1, 2, 3, K).bfloat16()
    turned_q, turned_k = rotate(q, q, rotation(xpos_tables(N, K), torch.tensor([[4, 5]])))
    assert (turned_q.dtype, turned_k.dtype) == (torch.bfloat16, torch.bfloat16)


def test_rows_of_a_batch_take_their_own_positions():
    tables = xpos_tables(N, K)
    by = rotation(tables, torch.tensor([[3, 4, 5], [0, 1, 2]]))
    assert torch.equal(by.cos_k[1, 2, 0], tables[2, 2])
    assert torch.equal(by.sin_q[0, 1, 0], tables[1, 4])


@pytest.mark.parametrize("n", [0, 1, 37])
def test_sinusoids_are_those_of_fairseq(n):
    # Sines first, then cosines; frequencies 10000^(-j/2) for D = 6; the first token has position 2.
    angles = [(n + 2) * f for f in (1.0, 0.01, 0.0001)]
    expected = torch.tensor([math.sin(a) for a in angles] + [math.cos(a) for a in angles])
    torch.testing.assert_close(sinusoids(41, 6)[n], expected, rtol=1e-6, atol=1e-7)  # float64, rounded to fp32


def test_an_odd_width_ends_in_a_zero_column():
    table = sinusoids(11, 7)
    assert table.shape == (11, 7)
    assert torch.equal(table[:, :6], sinusoids(11, 6))
    assert not table[:, 6].any()
