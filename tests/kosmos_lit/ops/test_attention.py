import importlib.util
import math

import pytest
import torch

from kosmos_lit.errors import UserError
from kosmos_lit.ops.attention import attend
from kosmos_lit.ops.masks import DocumentMask
from tests.kosmos_lit.tiny_kosmos import normal

B, T, S, H, K = 2, 13, 17, 3, 4
LENGTHS = (5, 8, 2, 11)
CPU = torch.device("cpu")


def inputs(n_keys: int = T) -> list[torch.Tensor]:
    shapes = ((B, T, H, K), (B, n_keys, H, K), (B, n_keys, H, K))
    return [normal(*shape, seed=i).requires_grad_() for i, shape in enumerate(shapes)]


def masks() -> dict[str, tuple[object, int]]:
    """Each kind of mask, with the number of keys."""
    some = normal(B, 1, T, S, seed=7) > 0
    some[..., 0] = True  # every query sees something
    return {
        "documents": (DocumentMask(LENGTHS, B, T, CPU), T),
        "dense": (some, S),
        "dense per head": (some | (normal(B, H, T, S, seed=8) > 1), S),
        "none": (None, S),
    }


@pytest.mark.parametrize("kind", masks())
@pytest.mark.parametrize("kernel", ["sdpa", "auto"])
def test_a_kernel_gives_what_the_written_out_formula_gives(kind, kernel):
    mask, n_keys = masks()[kind]
    q, k, v = inputs(n_keys)
    expected = attend(q, k, v, mask, kernel="reference")
    torch.testing.assert_close(attend(q, k, v, mask, kernel=kernel), expected, rtol=1e-5, atol=1e-6)  # fp32, sums of 17


@pytest.mark.parametrize("kind", masks())
def test_a_kernel_gives_the_gradients_of_the_written_out_formula(kind):
    mask, n_keys = masks()[kind]
    gradients = []
    for kernel in ("sdpa", "reference"):
        qkv = inputs(n_keys)
        gradients.append(torch.autograd.grad(attend(*qkv, mask, kernel=kernel), qkv, normal(B, T, H, K, seed=9)))
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)  # fp32, a quotient of sums of 17


@pytest.mark.parametrize("kernel", ["sdpa", "reference"])
def test_equal_scores_average_what_a_position_may_see(kernel):
    _, k, v = inputs()
    out = attend(torch.zeros(B, T, H, K), k, v, DocumentMask(LENGTHS, B, T, CPU), kernel=kernel)
    # Row 0 is cut into positions 0..4 and 5..12: position 7 sees 5, 6 and 7.
    torch.testing.assert_close(out[0, 7], v[0, 5:8].mean(0), rtol=1e-6, atol=1e-7)  # fp32, three terms


@pytest.mark.parametrize("kernel", ["sdpa", "reference"])
def test_scores_are_divided_by_the_root_of_the_head_width(kernel):
    q = torch.full((1, 1, 1, K), 0.5)
    k = torch.stack([torch.ones(K), torch.zeros(K)]).view(1, 2, 1, K)
    v = torch.tensor([1.0, 0.0]).view(1, 2, 1, 1).expand(1, 2, 1, K)
    # scores 0.5 * 4 / sqrt(4) = 1 and 0
    weight = math.e / (math.e + 1)
    out = attend(q, k, v, None, kernel=kernel)
    torch.testing.assert_close(out, torch.full((1, 1, 1, K), weight), rtol=1e-6, atol=0)  # fp32, one softmax


@pytest.mark.parametrize("kernel", ["sdpa", "reference"])
def test_dropout_keeps_the_mean_of_the_weights(kernel):
    torch.manual_seed(0)
    q, k, v = torch.zeros(1, 1, 1, 2), torch.zeros(1, 20_011, 1, 2), torch.ones(1, 20_011, 1, 2)
    out = attend(q, k, v, None, dropout=0.3, kernel=kernel)
    # The mean of 20,011 draws of 0 or 1 / 0.7: its standard deviation is 0.0046.
    assert 0 < (out - 1).abs().max() < 0.03


def test_asking_for_xformers_on_a_cpu_is_the_users_error():
    with pytest.raises(UserError, match="xformers needs a CUDA device"):
        attend(*inputs(), DocumentMask(LENGTHS, B, T, CPU), kernel="xformers")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="xformers' attention needs a CUDA device")
@pytest.mark.skipif(importlib.util.find_spec("xformers") is None, reason="xformers is not installed")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_xformers_gives_output_and_gradients_of_the_written_out_formula(dtype):
    # Heads of 64, as kernels want multiples of 8; the reference sees the same rounded numbers in float32.
    mask = DocumentMask(LENGTHS, B, T, torch.device("cuda"))
    qkv = [normal(B, T, H, 64, seed=i).to("cuda", dtype).requires_grad_() for i in range(3)]
    exact = [x.detach().float().requires_grad_() for x in qkv]
    upstream = normal(B, T, H, 64, seed=9).to("cuda", dtype)
    out, expected = attend(*qkv, mask, kernel="xformers"), attend(*exact, mask, kernel="reference")
    found = [out, *torch.autograd.grad(out, qkv, upstream)]
    wanted = [expected, *torch.autograd.grad(expected, exact, upstream.float())]
    tolerance = 2**-8 if dtype == torch.float16 else 2**-5  # a few roundings of 2^-11 or 2^-8 each, values of about 1
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a.float(), b, rtol=tolerance, atol=tolerance)
