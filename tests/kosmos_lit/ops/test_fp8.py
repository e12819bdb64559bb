"""Products in 8 bits, on a CPU: torch emulates them there, with the same formats and scales."""

from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kosmos_lit.config import DecoderConfig
from kosmos_lit.costs.allocations import backward, fake_device
from kosmos_lit.errors import UserError
from kosmos_lit.layers import block
from kosmos_lit.layers.linear import LinearFp8
from kosmos_lit.model import Kosmos
from kosmos_lit.ops import fp8
from kosmos_lit.ops.fp8 import check_fp8, linear_fp8, to_fp8
from kosmos_lit.ops.masks import DocumentMask
from tests.kosmos_lit.tiny_kosmos import batch_of, image_doc, normal, text_doc, tiny_config

M, K, N = 48, 32, 80
WIDTHS = {"decoder.dim": 64, "decoder.ffn_dim": 256}
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def dequantised_product(a, b, of_a, of_b, dtype, *, fast=False):
    """The product of what the 8-bit numbers stand for."""
    return ((a.float() * of_a) @ (b.float() * of_b).t()).to(dtype)


def cpu_has_a_scale_a_row() -> bool:
    a = torch.ones(16, 16).to(torch.float8_e4m3fn)
    try:
        torch._scaled_mm(a, a.t(), torch.ones(16, 1), torch.ones(1, 16), out_dtype=torch.bfloat16)
    except RuntimeError:
        return False
    return True


@pytest.fixture
def rowwise(monkeypatch):
    """Rowwise products on any torch: 2.11 has them on CUDA only."""
    if not cpu_has_a_scale_a_row():
        monkeypatch.setattr(fp8, "_product", dequantised_product)
    return partial(linear_fp8, rowwise=True)


def with_gradients(run, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    x, w, b = (normal(*shape, seed=i).to(dtype).requires_grad_() for i, shape in enumerate(((3, M // 3, K), (N, K), (N,))))
    out = run(x, w, b)
    return [out, *torch.autograd.grad(out, (x, w, b), normal(3, M // 3, N, seed=9).to(dtype))]


def test_output_and_gradients_are_off_by_the_formats_rounding_alone():
    actual, exact = with_gradients(linear_fp8), with_gradients(torch.nn.functional.linear)
    # e4m3 rounds each factor by up to 2^-4 of itself, some 2.6 % in the mean square, e5m2 by 5 %; in sums they cancel.
    for a, b, off in zip(actual, exact, (0.05, 0.08, 0.08, 1e-6), strict=True):
        assert (a - b).norm() < off * b.norm()


def nearest(t: torch.Tensor, axis: int) -> torch.Tensor:
    """Numbers as e4m3 has them, each vector along an axis scaled to 448."""
    scale = t.abs().amax(axis, keepdim=True) / 448
    return (t / scale).to(torch.float8_e4m3fn).float() * scale


def test_rowwise_products_are_those_of_rounded_vectors_along_the_summed_axis(rowwise):
    x, w, dy = normal(M, K, seed=0), normal(N, K, seed=1), normal(M, N, seed=2)
    x, w, dy = (t * 10.0 ** normal(*t.shape, seed=7) for t in (x, w, dy))  # so that each vector has another scale
    x.requires_grad_()
    w.requires_grad_()
    out = rowwise(x, w, None)
    dx, dw = torch.autograd.grad(out, (x, w), dy)
    x, w = x.detach(), w.detach()
    expected = [nearest(x, 1) @ nearest(w, 1).t(), nearest(dy, 1) @ nearest(w, 0), nearest(dy, 0).t() @ nearest(x, 0)]
    for a, b in zip((out.detach(), dx, dw), expected, strict=True):
        assert (a - b).norm() < 2**-8 * b.norm()  # results are bfloat16


def test_a_scale_a_row_rounds_less_than_one_for_all(rowwise):
    exact = with_gradients(torch.nn.functional.linear)
    errors = [
        [float((a - b).detach().norm() / b.detach().norm()) for a, b in zip(with_gradients(run), exact, strict=True)]
        for run in (rowwise, linear_fp8)
    ]
    # e4m3 for all factors: some 2.6 % each, so 3.7 % of a product; tensorwise gradients are off by 5 % more.
    assert max(errors[0]) < 0.04
    assert all(row < all_ for row, all_ in zip(errors[0][:3], errors[1][:3], strict=True))


@pytest.mark.parametrize("size", [1e-8, 1e8])
def test_a_row_keeps_its_bits_beside_a_much_larger_one(rowwise, size):
    x, w, dy = normal(M, K, seed=0), normal(N, K, seed=1).requires_grad_(), normal(M, N, seed=2)
    x[3] *= size
    dy[5] *= size
    x.requires_grad_()
    (dx,) = torch.autograd.grad(out := rowwise(x, w, None), x, dy)
    for a, b in ((out, x @ w.t()), (dx, dy @ w)):
        assert ((a - b).norm(dim=1) < 0.06 * b.norm(dim=1)).all()  # each row by itself; 3.7 % on average


class Products(TorchDispatchMode):
    """Lists the 8-bit products of a block: dtypes of the factors, shapes of the scales, dtype of the result."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._scaled_mm.default:
            a, b, of_a, of_b = args[:4]
            self.calls.append(((a.dtype, b.dtype), (*a.shape, b.shape[1]), tuple(of_a.shape), tuple(of_b.shape), out.dtype))
        return out


def test_what_cuda_asks_of_rowwise_products_is_met():
    # torch's fake CUDA checks sizes, strides and the scales' shapes as the device would.
    with fake_device("cuda"), torch.autocast("cuda", torch.bfloat16), Products() as products:
        x = torch.empty(3, M // 3, K, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        w, b = (torch.empty(shape, device="cuda", requires_grad=True) for shape in ((N, K), (N,)))
        outs = [linear_fp8(x, w, b, rowwise=True)]
        assert outs[0].dtype == torch.bfloat16
        backward(outs)
    e4m3 = (torch.float8_e4m3fn,) * 2
    assert products.calls == [
        (e4m3, (m, k, n), (m, 1), (1, n), torch.bfloat16) for m, k, n in ((M, K, N), (M, N, K), (N, M, K))
    ]
    assert (x.grad.dtype, w.grad.dtype, b.grad.dtype) == (torch.bfloat16, torch.float32, torch.float32)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo looks for it
@pytest.mark.filterwarnings("ignore:(?s).*should not be instantiated:DeprecationWarning")  # torch 2.11's dynamo does
@pytest.mark.parametrize("recompute", ["none", "selective"])
@pytest.mark.parametrize("scaling", ["tensorwise", "rowwise"])
def test_a_layer_in_8_bits_is_one_graph_a_part_and_computes_the_same(scaling, recompute, rowwise):
    compiled = partial(torch.compile, fullgraph=True, dynamic=False, backend="aot_eager")
    parts = [block._before_kernel, block._after_kernel]
    if recompute == "selective":
        parts = [block._recomputed_before, block._recomputed_after]
    sizes = {"dim": 32, "n_heads": 4, "ffn_dim": 64, "n_layers": 1}
    config = DecoderConfig(**sizes, dropout_rate=0.0, attention_dropout_rate=0.0, fp8=scaling)
    mask = DocumentMask((5, 11), 1, 16, CPU)
    results = []
    for compiles in (False, True):
        torch.manual_seed(0)
        layer, x = block.Block(config), normal(1, 16, 32).requires_grad_()
        before, after = (compiled(part) if compiles else part for part in parts)
        q, k, v = before(layer, x, None)
        out = after(layer, x, layer.self_attn.attend(q, k, v, mask))
        results.append([out, *torch.autograd.grad(out.square().sum(), [x, *layer.parameters()])])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)  # fp32: the same operations, some fused by decomposition


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
    layer, x = LinearFp8(K, 3, rowwise=True), normal(5, K)  # no multiples of 16
    with torch.no_grad():
        assert torch.equal(layer(x), torch.nn.functional.linear(x, layer.weight, layer.bias))


@pytest.mark.parametrize(
    ("device", "capability", "dtype", "widths", "row_len", "message"),
    [
        (CPU, None, torch.bfloat16, WIDTHS, 64, "capability 8.9 or later .*, but the run's is cpu; set it to none"),
        (CUDA, (8, 0), torch.bfloat16, WIDTHS, 64, "capability 8.9 or later .*, but the run's is Some GPU; set it to none"),
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
@pytest.mark.parametrize("scaling", ["tensorwise", "rowwise"])
def test_a_model_whose_layers_train_in_8_bits_learns_as_one_in_32(kosmos_tower, scaling, recompute, rowwise):
    final = []
    batch = batch_of([[image_doc(4), text_doc(15, seed=1)], [text_doc(28, seed=2)]], 32)
    for value in ("none", scaling):
        sizes = {"dim": 32, "n_heads": 4, "ffn_dim": 64}
        model = Kosmos.create(tiny_config(kosmos_tower, fp8=value, recompute=recompute, **sizes)).train()
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
    plain, *others = (
        Kosmos.create(tiny_config(kosmos_tower, fp8=value)).state_dict() for value in ("none", "tensorwise", "rowwise")
    )
    for rounded in others:
        assert plain.keys() == rounded.keys()
        assert all(torch.equal(plain[name], rounded[name]) for name in plain)
