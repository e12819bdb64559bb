import importlib.util
import math

import pytest
import torch

from kosmos_lit.errors import UserError
from kosmos_lit.ops import kernels
from kosmos_lit.ops.attention import attend
from kosmos_lit.ops.kernels import block_diagonal, check_kernel, resolve_kernel, stream_starts
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


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("kind", masks())
@pytest.mark.parametrize("kernel", ["sdpa", "auto", "flex"])
def test_a_kernel_gives_what_the_written_out_formula_gives(kind, kernel):
    mask, n_keys = masks()[kind]
    q, k, v = (x.detach() for x in inputs(n_keys))  # flex has no backward pass on CPU
    expected = attend(q, k, v, mask, kernel="reference")
    torch.testing.assert_close(attend(q, k, v, mask, kernel=kernel), expected, rtol=1e-5, atol=1e-6)  # fp32, sums of 17


@pytest.mark.parametrize("kind", masks())
def test_a_kernel_gives_the_gradients_of_the_written_out_formula(kind):
    mask, n_keys = masks()[kind]
    gradients = []
    for kernel in ("sdpa", "reference"):
        qkv = inputs(n_keys)
        gradients.append(torch.autograd.grad(attend(*qkv, mask, kernel=kernel), qkv, normal(B, T, H, K, seed=9)))
    for actual, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)  # fp32, a quotient of sums of 17


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


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_flex_says_what_it_cannot_do(dropout):
    message = "no dropout on attention weights" if dropout else "trains on CUDA devices only"
    with pytest.raises(UserError, match=message):
        attend(*inputs(), DocumentMask(LENGTHS, B, T, CPU), dropout=dropout, kernel="flex")


CUDA = torch.device("cuda")


@pytest.mark.parametrize(
    ("kernel", "device", "dtype", "head_dim", "dropout", "message"),
    [
        ("xformers", CPU, torch.float32, 64, 0.0, "xformers needs a CUDA device, but the run's is cpu; set it to auto"),
        ("flex", CPU, torch.float32, 64, 0.0, "flex needs a CUDA device, but the run's is cpu; set it to auto or sdpa"),
        ("xformers", CUDA, torch.bfloat16, 20, 0.1, "heads of a multiple of 8 in bfloat16, but decoder.dim / n_heads is 20"),
        ("xformers", CUDA, torch.float32, 6, 0.1, "heads of a multiple of 4 in float32, but decoder.dim / n_heads is 6"),
        ("auto", CUDA, torch.bfloat16, 20, 0.1, "xformers .auto. takes heads of a multiple of 8.*change n_heads, or set it"),
        ("xformers", CUDA, torch.float64, 64, 0.0, "xformers does not take float64; set it to sdpa"),
        ("flex", CUDA, torch.bfloat16, 64, 0.1, "decoder.attention_dropout_rate is 0.1; set the rate to 0, or the"),
        ("flex", CUDA, torch.bfloat16, 8, 0.0, "flex takes heads of at least 16, but decoder.dim / n_heads is 8"),
        ("flex", CUDA, torch.float64, 64, 0.0, "flex does not take float64; set it to sdpa"),
    ],
)
def test_a_kernel_that_cannot_run_is_refused_with_what_can(kernel, device, dtype, head_dim, dropout, message, monkeypatch):
    monkeypatch.setattr(kernels, "xformers_is_installed", lambda: True)
    with pytest.raises(UserError, match=message):
        check_kernel(kernel, device, dtype, head_dim, dropout)


def test_xformers_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(kernels, "xformers_is_installed", lambda: False)
    with pytest.raises(UserError, match="xformers is not installed; install xformers, or set it to auto, flex or sdpa"):
        check_kernel("xformers", CUDA, torch.bfloat16, 64, 0.0)


@pytest.mark.parametrize("kernel", ["auto", "sdpa", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_what_runs_anywhere_is_let_through(kernel, dtype):
    check_kernel(kernel, CPU, dtype, 5, 0.1)


def test_auto_is_xformers_on_cuda_where_it_is_installed(monkeypatch):
    monkeypatch.setattr(kernels, "xformers_is_installed", lambda: True)
    cases = [("auto", "cuda"), ("auto", "cpu"), ("flex", "cuda")]
    assert [resolve_kernel(*case) for case in cases] == ["xformers", "sdpa", "flex"]


@pytest.mark.skipif(importlib.util.find_spec("xformers") is None, reason="xformers is not installed")
@pytest.mark.filterwarnings("ignore")  # of xformers' own import
def test_xformers_gets_the_documents_of_the_whole_micro_batch():
    mask = DocumentMask(LENGTHS, B, T, CPU)
    flat = DocumentMask(LENGTHS, 1, B * T, CPU)
    bias = mask.cached_form(block_diagonal)
    assert torch.equal(bias.materialize((1, 1, B * T, B * T))[0, 0] == 0, flat.dense[0, 0])
    assert mask.cached_form(block_diagonal) is bias


def test_documents_start_where_their_lengths_say():
    assert stream_starts(DocumentMask(LENGTHS, B, T, CPU)).tolist() == [0, 5, 13, 15, 26]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="these kernels need a CUDA device")
@pytest.mark.parametrize("kernel", ["xformers", "flex", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_cuda_kernel_gives_output_and_gradients_of_the_written_out_formula(kernel, dtype):
    if kernel == "xformers" and importlib.util.find_spec("xformers") is None:
        pytest.skip("xformers is not installed")
    # Heads of 64, as kernels want multiples of 8; the reference sees the same rounded numbers in float32.
    mask = DocumentMask(LENGTHS, B, T, CUDA)
    qkv = [normal(B, T, H, 64, seed=i).to(CUDA, dtype).requires_grad_() for i in range(3)]
    exact = [x.detach().float().requires_grad_() for x in qkv]
    upstream = normal(B, T, H, 64, seed=9).to(CUDA, dtype)
    out, expected = attend(*qkv, mask, kernel=kernel), attend(*exact, mask, kernel="reference")
    actual = [out, *torch.autograd.grad(out, qkv, upstream)]
    reference = [expected, *torch.autograd.grad(expected, exact, upstream.float())]
    # A few roundings of 2^-11 or 2^-8 each, values of about 1; float32 may go through TF32's 2^-11 in CUTLASS and Triton.
    tolerance = 2**-5 if dtype == torch.bfloat16 else 2**-8
    for a, b in zip(actual, reference, strict=True):
        torch.testing.assert_close(a.float(), b, rtol=tolerance, atol=tolerance)
