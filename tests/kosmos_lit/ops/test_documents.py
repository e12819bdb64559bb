from itertools import pairwise

import pytest
import torch

from kosmos_lit.ops.attention import attend
from kosmos_lit.ops.documents import LENGTH_RATIO, SHORT_LENGTH, plan_buckets
from kosmos_lit.ops.masks import DocumentMask
from tests.kosmos_lit.tiny_kosmos import normal

H, K, CPU = 3, 5, torch.device("cpu")
LAYOUTS = {
    "documents of many lengths": ((5, 28, 2, 11, 1, 19, 7, 26), 3, 33, ()),
    "a row's padding is left out": ((5, 24, 4, 11, 1, 21, 33), 3, 33, (4, 0, 33)),
    "a document a row": ((33, 33, 33), 3, 33, ()),
    "documents of one length": ((11,) * 9, 3, 33, ()),
    "a document a row, one padded": ((33, 30, 3, 33), 3, 33, (0, 3, 0)),
    "nothing but padding": ((33, 33), 2, 33, (33, 33)),
    "one position": ((1,), 1, 1, ()),
}


def mask_of(name: str) -> DocumentMask:
    lengths, n_rows, row_len, padding = LAYOUTS[name]
    return DocumentMask(lengths, n_rows, row_len, CPU, padding)


def is_real(mask: DocumentMask) -> torch.Tensor:
    """(B, T) bool."""
    return torch.stack([torch.arange(mask.row_len) < mask.row_len - n for n in mask.padding])


@pytest.mark.parametrize("name", LAYOUTS)
def test_buckets_give_output_and_gradients_of_the_written_out_formula(name: str) -> None:
    mask = mask_of(name)
    real = is_real(mask)[..., None, None]
    shape = (mask.n_rows, mask.row_len, H, K)
    runs = []
    for kernel in ("sdpa", "reference"):
        qkv = [normal(*shape, seed=i).requires_grad_() for i in range(3)]
        out = attend(*qkv, mask, kernel=kernel)
        out = out.masked_fill(~real, 0.0)  # what stands at padding is nobody's
        runs.append([out, *torch.autograd.grad(out, qkv, normal(*shape, seed=9))])
    for ours, plain in zip(*runs, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)  # fp32, sums of up to 33 in another order


def test_known_padding_has_no_output_and_no_gradient() -> None:
    mask = mask_of("a row's padding is left out")
    qkv = [normal(3, 33, H, K, seed=i).requires_grad_() for i in range(3)]
    out = attend(*qkv, mask, kernel="sdpa")
    gradients = torch.autograd.grad(out, qkv, torch.ones_like(out))
    assert not any(x[~is_real(mask)].any() for x in (out, *gradients))


def test_every_real_position_has_its_own_bucket_position() -> None:
    mask = mask_of("a row's padding is left out")
    plan = plan_buckets(mask)
    assert plan.to_bucket is not None
    assert plan.to_stream is not None
    assert plan.real is not None
    assert torch.equal(plan.real, is_real(mask).flatten().nonzero().flatten())
    assert torch.equal(plan.to_stream[plan.to_bucket], plan.real)
    assert len(plan.to_bucket.unique()) == len(plan.to_bucket)


def test_a_bucket_holds_documents_of_like_length() -> None:
    lengths = [n * 37 % 251 + 1 for n in range(1, 90)]
    plan = plan_buckets(DocumentMask(lengths, 1, sum(lengths), CPU))
    assert sum(n for n, _ in plan.sizes) == len(lengths)
    widths = [width for _, width in plan.sizes]
    assert all(later < max(LENGTH_RATIO * width, SHORT_LENGTH + 1) for width, later in pairwise(widths))
    places = sum(n * width for n, width in plan.sizes)
    assert sum(lengths) <= places < sum(lengths) / LENGTH_RATIO + SHORT_LENGTH * len(lengths)


@pytest.mark.parametrize("name", ["a document a row", "documents of one length"])
def test_documents_of_one_length_are_not_moved(name: str) -> None:
    assert plan_buckets(mask_of(name)).to_bucket is None


def test_layers_share_one_plan() -> None:
    mask = mask_of("documents of many lengths")
    assert mask.cached_form(plan_buckets) is mask.cached_form(plan_buckets)


def test_nothing_is_as_large_as_the_square_of_a_row() -> None:
    T, n = 1024, 64
    mask = DocumentMask((T // n,) * n, 1, T, CPU)
    sizes: list[int] = []
    qkv = [normal(1, T, 1, 4, seed=i).requires_grad_() for i in range(3)]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):  # type: ignore[func-returns-value]
        attend(*qkv, mask, dropout=0.1, kernel="sdpa").sum().backward()
    assert sizes
    assert max(sizes) <= T * (T // n)


def test_dropout_keeps_the_mean_of_what_documents_see() -> None:
    torch.manual_seed(0)
    mask = DocumentMask((499, 502), 1, 1001, CPU)
    q, k, v = torch.zeros(1, 1001, 1, 2), torch.zeros(1, 1001, 1, 2), torch.ones(1, 1001, 1, 2)
    out = attend(q, k, v, mask, dropout=0.3, kernel="sdpa")
    # Means of n draws of 0 or 1 / 0.7, n from 1 to 502: their mean over 1001 positions varies by some 0.01.
    assert 0.9 < out.mean() < 1.1
