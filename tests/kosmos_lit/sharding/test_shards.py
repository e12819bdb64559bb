"""Shards of tensors in a single rank; test_sharding.py runs several ranks."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from kosmos_lit.errors import UserError
from kosmos_lit.sharding.shards import ShardedTensors, checksum, clip_grad_norm, named_tensors
from kosmos_lit.sharding.strategy import build_on_rank_zero
from tests.kosmos_lit.tiny_kosmos import normal, tiny_model

CPU = torch.device("cpu")


@pytest.fixture
def _one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def sharded(module: nn.Module) -> ShardedTensors:
    return ShardedTensors(module, {name: tensor.shape for name, tensor in named_tensors(module).items()}, CPU)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool])
def test_checksums_of_slices_add_up_to_that_of_the_full_tensor(dtype: torch.dtype) -> None:
    full = (normal(101) > 0.3) if dtype == torch.bool else (9 * normal(101)).to(dtype)

    slices = [checksum(full[first : first + 17], first) for first in range(0, 101, 17)]

    assert int(torch.stack(slices).sum()) == int(checksum(full))


def changed(full: Tensor, how: str) -> Tensor:
    other = full.clone()
    match how:
        case "last bit":
            other.view(torch.int32)[5] ^= 1
        case "two swapped":
            other[3], other[4] = full[4], full[3]
        case "sign of zero":
            other[0] = -0.0
    return other


@pytest.mark.parametrize("how", ["last bit", "two swapped", "sign of zero"])
def test_a_checksum_notices(how: str) -> None:
    full = normal(11)
    full[0] = 0.0

    assert int(checksum(changed(full, how))) != int(checksum(full))


@pytest.mark.usefixtures("_one_rank")
def test_a_broadcast_copies_every_tensor() -> None:
    source, other = nn.BatchNorm1d(5), nn.BatchNorm1d(5)
    nn.init.normal_(source.weight)
    shards = sharded(other)

    shards.check(shards.broadcast(named_tensors(source)), "now")

    assert all(torch.equal(other.state_dict()[name], tensor) for name, tensor in source.state_dict().items())


@pytest.mark.usefixtures("_one_rank")
def test_a_weight_that_differs_from_rank_0_s_is_named() -> None:
    module = nn.Linear(3, 2)
    shards = sharded(module)
    expected = shards.broadcast(named_tensors(nn.Linear(3, 2)))
    with torch.no_grad():
        module.bias[1] += 1

    with pytest.raises(RuntimeError, match="now: 1 of 2 tensors differ from rank 0's, bias for one"):
        shards.check(expected, "now")


@pytest.mark.usefixtures("_one_rank")
def test_a_tensor_without_memory_is_named() -> None:
    module = nn.Linear(3, 2)
    module.weight = nn.Parameter(module.weight.to("meta"))

    with pytest.raises(RuntimeError, match=r"weight has 6 elements, but the ranks hold \[0\] of them"):
        sharded(module)


@pytest.mark.usefixtures("_one_rank")
@pytest.mark.parametrize("limit", [0.5, 1e6, float("inf")])
def test_clipping_is_torch_s(limit: float) -> None:
    own, torchs = [nn.Parameter(normal(3, 2)) for _ in range(2)], [nn.Parameter(normal(3, 2)) for _ in range(2)]
    for one in (own[0], torchs[0]):
        one.grad = normal(3, 2, seed=1)

    norm = clip_grad_norm(own, limit)

    assert torch.equal(norm, nn.utils.clip_grad_norm_(torchs, limit))
    torch.testing.assert_close(own[0].grad, torchs[0].grad, rtol=1e-7, atol=0)


@pytest.mark.usefixtures("_one_rank")
def test_weights_that_are_not_finite_are_not_broadcast(kosmos_tower: str) -> None:
    model = tiny_model(kosmos_tower)
    with torch.no_grad():
        model.decoder.layers[1].ffn.fc1.bias[3] = float("nan")

    with pytest.raises(UserError, match=r"the initial weights are not finite: decoder\.layers\.1\.ffn\.fc1\.bias holds NaN"):
        build_on_rank_zero(lambda: model)
