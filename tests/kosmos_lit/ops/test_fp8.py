"""Products in 8 bits, on a CPU: torch emulates them there, with the same formats and scales."""

import pytest
import torch

from kosmos_lit.errors import UserError
from kosmos_lit.layers.linear import LinearFp8
from kosmos_lit.model import Kosmos
from kosmos_lit.ops.fp8 import check_fp8, linear_fp8, to_fp8
from tests.kosmos_lit.tiny_kosmos import batch_of, image_doc, normal, text_doc, tiny_config

M, K, N = 48, 32, 80
WIDTHS = {"decoder.dim": 64, "decoder.ffn_dim": 256}
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def with_gradients(run, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    x, w, b = (normal(*shape, seed=i).to(dtype).requires_grad_() for i, shape in enumerate(((3, M // 3, K), (N, K), (N,))))
    out = run(x, w, b)
    return [out, *torch.autograd.grad(out, (x, w, b), normal(3, M // 3, N, seed=9).to(dtype))]


def test_output_and_gradients_are_off_by_the_formats_rounding_alone():
    actual, exact = with_gradients(linear_fp8), with_gradients(torch.nn.functional.linear)
    # e4m3 rounds each factor by up to 2^-4 of itself, some 2.6 % in the mean square, e5m2 by 5 %; in sums they cancel.
    for a, b, off in zip(actual, exact, (0.05, 0.08, 0.08, 1e-6), strict=True):
        assert (a - b).norm() < off * b.norm()


def test_products_are_exact_where_8_bits_hold_the_factors():
    x, w = (torch.randint(-4, 5, shape).float() for shape in ((M, K), (N, K)))
    x[0, 0] = w[0, 0] = 7 * 2.0**6  # the largest number of e4m3: the scale is 1
    x.requires_grad_()
    w.requires_grad_()
    out = linear_fp8(x, w, None)
    upstream = torch.randint(-2, 3, (M, N)).float()
    upstream[0, 0] = 7 * 2.0**13  # the same of e5m2
    torch.testing.assert_close(out, x @ w.t(), rtol=1e-6, atol=0)  # fp32
    dx, dw = torch.autograd.grad(out, (x, w), upstream)
    torch.testing.assert_close(dx, upstream @ w, rtol=1e-6, atol=1e-3)  # fp32, sums of up to 57,344 * 448
    torch.testing.assert_close(dw, upstream.t() @ x, rtol=1e-6, atol=1e-3)


@pytest.mark.parametrize("by", [1e-6, 1.0, 1e6])
def test_the_size_of_a_tensor_does_not_matter(by):
    exact = normal(M, K) * by
    rounded, scale = to_fp8(exact, torch.float8_e4m3fn)
    assert (rounded.float() * scale - exact).norm() < 0.03 * exact.norm()  # 2^-4 at most, uniform: 2.6 %


def test_a_tensor_of_zeros_stays_one():
    rounded, scale = to_fp8(torch.zeros(M, K), torch.float8_e5m2)
    assert not (rounded.float() * scale).any()


def test_dtypes_are_those_of_autocast_and_of_the_parameters():
    with torch.autocast("cpu", torch.bfloat16):
        out, dx, dw, db = with_gradients(linear_fp8)
    assert (out.dtype, dx.dtype, dw.dtype, db.dtype) == (torch.bfloat16, torch.float32, torch.float32, torch.float32)


def test_a_layer_computes_as_usual_without_gradient():
    torch.manual_seed(0)
    layer, x = LinearFp8(K, 3), normal(5, K)  # no multiples of 16
    with torch.no_grad():
        assert torch.equal(layer(x), torch.nn.functional.linear(x, layer.weight, layer.bias))


@pytest.mark.parametrize(
    ("device", "capability", "dtype", "widths", "row_len", "message"),
    [
        (CPU, None, torch.bfloat16, WIDTHS, 64, "capability 8.9 or later .*, but the run's is cpu; set it to false"),
        (CUDA, (8, 0), torch.bfloat16, WIDTHS, 64, "capability 8.9 or later .*, but the run's is Some GPU; set it to false"),
        (CUDA, (9, 0), torch.float32, WIDTHS, 64, "bf16-mixed, but the run computes in float32"),
        (CUDA, (9, 0), torch.bfloat16, WIDTHS | {"decoder.dim": 40}, 60, "of 16, but has decoder.dim 40, data.seq_len 60"),
    ],
)
def test_what_cannot_train_in_8_bits_is_the_users_error(device, capability, dtype, widths, row_len, message, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Some GPU")
    with pytest.raises(UserError, match=message):
        check_fp8(device, dtype, widths, row_len)


def test_what_can_train_in_8_bits_may(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    check_fp8(CUDA, torch.bfloat16, WIDTHS, 64)


@pytest.mark.parametrize("recompute", ["none", "selective"])
def test_a_model_whose_layers_train_in_8_bits_learns_as_one_in_32(kosmos_tower, recompute):
    final = []
    batch = batch_of([[image_doc(4), text_doc(15, seed=1)], [text_doc(28, seed=2)]], 32)
    for fp8 in (False, True):
        sizes = {"dim": 32, "n_heads": 4, "ffn_dim": 64}
        model = Kosmos.create(tiny_config(kosmos_tower, fp8=fp8, recompute=recompute, **sizes)).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for _ in range(17):
            loss, nll = model.loss(batch, 1 / len(batch.loss_at))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        final.append(float(nll.mean()))
    assert final[0] < 1.5  # from 4.3, the logarithm of 73
    assert final[1] == pytest.approx(final[0], abs=0.3)


def test_layers_in_8_bits_have_the_same_names_and_the_same_first_weights(kosmos_tower):
    plain, rounded = (Kosmos.create(tiny_config(kosmos_tower, fp8=fp8)).state_dict() for fp8 in (False, True))
    assert plain.keys() == rounded.keys()
    assert all(torch.equal(plain[name], rounded[name]) for name in plain)
