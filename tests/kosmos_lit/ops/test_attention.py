import importlib.util
import logging
import math
import random
import subprocess
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kosmos_lit.costs.allocations import backward, fake_device
from kosmos_lit.errors import UserError
from kosmos_lit.ops import kernel_figures, kernels
from kosmos_lit.ops.attention import attend
from kosmos_lit.ops.kernel_figures import HOPPER, Measurement
from kosmos_lit.ops.kernels import (
    CUDNN_MIN_TORCH,
    AttentionUse,
    block_diagonal,
    check_kernel,
    padded_starts,
    resolve_kernel,
    stream_starts,
    torch_version,
)
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


@pytest.mark.parametrize(("dropout", "message"), [(0.1, "no dropout on attention weights"), (0.0, "needs a CUDA device")])
def test_cudnn_says_what_it_cannot_do(dropout, message):
    with pytest.raises(UserError, match=f"cudnn (has )?{message}"):
        attend(*inputs(), DocumentMask(LENGTHS, B, T, CPU), dropout=dropout, kernel="cudnn")


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


@pytest.fixture
def newest(monkeypatch):
    """A torch and a cuDNN that have every kernel."""
    monkeypatch.setattr(kernels, "torch_version", lambda: (2, 15))
    monkeypatch.setattr(kernels, "cudnn_version", lambda: 92600)
    monkeypatch.setattr(kernels, "xformers_is_installed", lambda: True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"capability": (8, 0)}, "cudnn needs a device of capability 9 or 10 .*, but the run's has 8.0; set it to auto"),
        ({"capability": (12, 0)}, "cudnn needs a device of capability 9 or 10 .*, but the run's has 12.0"),
        ({"dtype": torch.float32}, "cudnn does not take float32; set trainer.precision to bf16-mixed"),
        ({"head_dim": 20}, "cudnn takes heads of a multiple of 8 in bfloat16, but decoder.dim / n_heads is 20"),
        ({"head_dim": 256}, "cudnn takes heads of at most 128, but decoder.dim / n_heads is 256"),
        ({"dropout": 0.1}, "cudnn has no dropout .*, but decoder.attention_dropout_rate is 0.1; set the rate to 0, or the"),
        ({"device": CPU}, "cudnn needs a CUDA device, but the run's is cpu; set it to auto or sdpa"),
    ],
)
def test_cudnn_where_it_cannot_run_is_refused_with_what_can(change, message, newest):
    run = {"device": CUDA, "dtype": torch.bfloat16, "head_dim": 64, "dropout": 0.0, "capability": HOPPER}
    assert check_kernel("cudnn", **run) == "cudnn"
    assert check_kernel("cudnn", **run | {"capability": (10, 0)}) == "cudnn"
    with pytest.raises(UserError, match=message):
        check_kernel("cudnn", **run | change)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [("torch_version", (2, 14), "cudnn needs torch 2.15, but this is"), ("cudnn_version", 92400, "needs cuDNN 92500, but")],
)
def test_an_older_torch_or_cudnn_is_refused(name, value, message, newest, monkeypatch):
    monkeypatch.setattr(kernels, name, lambda: value)
    with pytest.raises(UserError, match=message):
        check_kernel("cudnn", CUDA, torch.bfloat16, 64, 0.0, capability=HOPPER)


def use(**fields) -> AttentionUse:
    known = {"device": "cuda", "dtype": torch.bfloat16, "head_dim": 64, "dropout": 0.0, "within": "row"}
    return AttentionUse(**known | {"capability": HOPPER} | fields)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, "cudnn"),  # whole rows on Hopper: the plots of FlashAttention-3's paper
        ({"within": "own"}, "xformers"),  # packed documents: cuDNN was slower
        ({"dropout": 0.1}, "xformers"),  # the paper's rate, which cuDNN does not have
        ({"dtype": torch.float32}, "xformers"),
        ({"head_dim": 128}, "xformers"),  # no figures
        ({"within": "own", "head_dim": 128}, "xformers"),  # FlexAttention's lead is below the margin
        ({"capability": (8, 0)}, "xformers"),
        ({"capability": None}, "xformers"),
        ({"device": "cpu", "capability": None}, "sdpa"),
    ],
)
def test_auto_is_decided_by_the_table(fields, expected, newest):
    assert resolve_kernel("auto", use(**fields)) == expected
    assert resolve_kernel("flex", use(**fields)) == "flex"


def test_auto_depends_on_what_is_installed(newest, monkeypatch):
    monkeypatch.setattr(kernels, "torch_version", lambda: (2, 11))
    assert resolve_kernel("auto", use()) == "xformers"
    monkeypatch.setattr(kernels, "xformers_is_installed", lambda: False)
    assert resolve_kernel("auto", use()) == "sdpa"


def test_our_own_figures_count_more_than_public_ones_and_need_no_margin(newest, monkeypatch):
    own = Measurement(
        capability=HOPPER,
        torch=(2, 11),
        head_dims=(64, 64),
        within="row",
        seconds={"xformers": 1.0, "cudnn": 1.2, "flex": 0.9},
        figures="",
        date="2030",
        source="benchmarks/gpu",
        ours=True,
    )
    monkeypatch.setattr(kernel_figures, "MEASUREMENTS", (*kernel_figures.MEASUREMENTS, own))
    assert resolve_kernel("auto", use()) == "flex"


def test_each_figure_has_its_date_and_source():
    for row in kernel_figures.MEASUREMENTS:
        assert row.figures
        assert row.source
        assert row.date[:2] == "20"
        assert "xformers" in row.seconds  # what all others are compared with
        assert not row.ours  # no GPU has run this code yet


# ---- cuDNN's call, without cuDNN


def draw(generator: random.Random, row_len: int, n_rows: int) -> DocumentMask:
    """Documents of odd lengths, and padding at some rows' ends."""
    lengths, padding = [], []
    for _ in range(n_rows):
        left, row = row_len, []
        while left:
            row.append(min(left, generator.randrange(1, row_len // 3)))
            left -= row[-1]
        lengths += row
        padding.append(row[-1] if generator.random() < 0.5 else 0)
    return DocumentMask(lengths, n_rows, row_len, CPU, padding)


def test_documents_are_padded_by_empty_ones_at_the_streams_end():
    starts, longest = padded_starts(DocumentMask((*LENGTHS[:3], 4, 7), B, T, CPU))
    assert (starts.tolist(), starts.dtype) == ([0, 5, 13, 15, 19, 26, 26, 26, 26], torch.int32)
    assert longest == 8  # of 8, the longest
    assert padded_starts(DocumentMask((13, 13), B, T, CPU))[1] == 13  # at most a row


def test_few_plans_serve_all_micro_batches():
    generator = random.Random(0)
    masks = [draw(generator, 2048, 8) for _ in range(50)]
    shapes = {(len(starts), longest) for starts, longest in map(padded_starts, masks)}
    assert len({len(mask.lengths) for mask in masks}) > 10
    assert len(shapes) <= 4
    assert all(longest >= max(mask.lengths) for mask in masks for _, longest in [padded_starts(mask)])


class VarlenCalls(TorchDispatchMode):
    """Lists the calls of torch's attention within documents, forward and backward."""

    def __init__(self):
        super().__init__()
        self.forward, self.backward = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.torch_attn._varlen_attn.default:
            q, _, _, starts, _, *longest = args[:7]
            self.forward.append((q.shape, q.dtype, starts.dtype, len(starts), tuple(longest), args[7], args[14]))
        elif func is torch.ops.torch_attn._varlen_attn_backward.default:
            starts, _, *longest, is_causal = args[6:11]
            self.backward.append((len(starts), tuple(longest), is_causal, args[14]))
        return func(*args, **(kwargs or {}))


@pytest.mark.skipif(torch_version() < CUDNN_MIN_TORCH, reason="this torch has no cuDNN attention within documents")
def test_torch_is_asked_for_cudnn_with_the_same_shapes_for_varied_documents(monkeypatch):
    from torch.nn.attention import varlen

    monkeypatch.setattr(varlen, "_cudnn_version_and_major_capability", lambda _: (92600, 9))
    monkeypatch.setattr(varlen, "_should_use_cudnn", lambda _: True)
    monkeypatch.setattr(kernels, "to_device", lambda values, dtype, device: torch.tensor(values, dtype=dtype, device=device))
    generator, n_rows, row_len = random.Random(0), 3, 96
    with fake_device("cuda"), VarlenCalls() as calls:
        for _ in range(20):
            mask = draw(generator, row_len, n_rows)
            mask = DocumentMask(mask.lengths, n_rows, row_len, CUDA, mask.padding)
            shape = n_rows, row_len, 5, 64
            qkv = [torch.empty(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
            outs = [attend(*qkv, mask, kernel="cudnn")]
            assert (outs[0].shape, outs[0].dtype) == (qkv[0].shape, torch.bfloat16)
            backward(outs)
            assert [x.grad.shape for x in qkv] == [x.shape for x in qkv]
    stream, cudnn = torch.Size([n_rows * row_len, 5, 64]), varlen._CUDNN_ATTENTION_BACKEND
    assert {(q, dtype, of_starts, causal, kernel) for q, dtype, of_starts, _, _, causal, kernel in calls.forward} == {
        (stream, torch.bfloat16, torch.int32, True, cudnn)
    }
    plans = {(n_starts, longest) for *_, n_starts, longest, _, _ in calls.forward}
    assert len(calls.forward) == len(calls.backward) == 20
    assert set(calls.backward) == {(*plan, True, cudnn) for plan in plans}
    assert all(max_q == max_k for _, (max_q, max_k) in plans)
    assert len(plans) <= 3


# ---- xformers' import


@pytest.mark.skipif(importlib.util.find_spec("xformers") is None, reason="xformers is not installed")
def test_xformers_does_not_warn_that_its_extension_does_not_load():
    # In a process of its own, as a module is imported once.
    script = "from kosmos_lit.ops.kernels import xformers_ops; assert xformers_ops().memory_efficient_attention"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "XFORMERS" not in run.stderr


def test_other_warnings_of_xformers_come_through(caplog):
    logger = logging.getLogger("xformers")
    with kernels._without_extension_warning():
        logger.warning("WARNING[XFORMERS]: xFormers can't load C++/CUDA extensions. xFormers was built for another torch")
        logger.warning("another matter")
    logger.warning("xFormers can't load C++/CUDA extensions, said later")
    assert [record.getMessage()[:15] for record in caplog.records] == ["another matter", "xFormers can't "]


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
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_cudnn_gives_output_and_gradients_of_the_written_out_formula(dtype, head_dim):
    try:
        check_kernel("cudnn", CUDA, dtype, head_dim, 0.0, capability=torch.cuda.get_device_capability())
    except UserError as error:
        pytest.skip(str(error))
    # One position, odd lengths, lengths around cuDNN's tiles of 64 and 128, and padding, which no real output may reach.
    lengths, row_len = (1, 3, 63, 65, 129, 51, 7, 191, 114), 312
    mask = DocumentMask(lengths, 2, row_len, CUDA, (0, 114))
    real = torch.ones(2, row_len, 1, 1, device=CUDA)
    real[1, -114:] = 0  # the loss does not read padding
    qkv = [normal(2, row_len, H, head_dim, seed=i).to(CUDA, dtype).requires_grad_() for i in range(3)]
    exact = [x.detach().float().requires_grad_() for x in qkv]
    upstream = normal(2, row_len, H, head_dim, seed=9).to(CUDA, dtype) * real.to(dtype)
    out, expected = attend(*qkv, mask, kernel="cudnn"), attend(*exact, mask, kernel="reference")
    actual = [out * real, *torch.autograd.grad(out, qkv, upstream)]
    reference = [expected * real, *torch.autograd.grad(expected, exact, upstream.float())]
    # A few roundings of 2^-11 or 2^-8 each, values of about 1.
    tolerance = 2**-5 if dtype == torch.bfloat16 else 2**-8
    for a, b in zip(actual, reference, strict=True):
        torch.testing.assert_close(a.float(), b, rtol=tolerance, atol=tolerance)


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
