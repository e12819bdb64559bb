"""What ranks hold of a tensor, on one rank of its own; test_sharding.py has several."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from kosmos_lit.errors import UserError
from kosmos_lit.sharding.shards import ShardedTensors, checksum, clip_grad_norm, tensors_of
from kosmos_lit.sharding.strategy import build_on_rank_zero
from tests.kosmos_lit.tiny_kosmos import normal, tiny_model

CPU = torch.device("cpu")


@pytest.fixture
def _one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def pieces_of(module: nn.Module) -> ShardedTensors:
    return ShardedTensors(module, {name: tensor.shape for name, tensor in tensors_of(module).items()}, CPU)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool])
def test_checksums_of_runs_add_up_to_that_of_the_whole(dtype: torch.dtype) -> None:
    whole = (normal(101) > 0.3) if dtype == torch.bool else (9 * normal(101)).to(dtype)

    runs = [checksum(whole[first : first + 17], first) for first in range(0, 101, 17)]

    assert int(torch.stack(runs).sum()) == int(checksum(whole))


def changed(whole: Tensor, how: str) -> Tensor:
    other = whole.clone()
    match how:
        case "last bit":
            other.view(torch.int32)[5] ^= 1
        case "two swapped":
            other[3], other[4] = whole[4], whole[3]
        case "sign of zero":
            other[0] = -0.0
    return other


@pytest.mark.parametrize("how", ["last bit", "two swapped", "sign of zero"])
def test_a_checksum_notices(how: str) -> None:
    whole = normal(11)
    whole[0] = 0.0

    assert int(checksum(changed(whole, how))) != int(checksum(whole))


@pytest.mark.usefixtures("_one_rank")
def test_what_was_sent_is_what_is_held() -> None:
    source, other = nn.BatchNorm1d(5), nn.BatchNorm1d(5)
    nn.init.normal_(source.weight)
    shards = pieces_of(other)

    shards.check(shards.fill(tensors_of(source)), "now")

    assert all(torch.equal(other.state_dict()[name], tensor) for name, tensor in source.state_dict().items())


@pytest.mark.usefixtures("_one_rank")
def test_a_weight_that_is_not_the_first_rank_s_is_named() -> None:
    module = nn.Linear(3, 2)
    shards = pieces_of(module)
    wanted = shards.fill(tensors_of(nn.Linear(3, 2)))
    with torch.no_grad():
        module.bias[1] += 1

    with pytest.raises(RuntimeError, match="now: 1 of 2 tensors are not the first rank's, bias for one"):
        shards.check(wanted, "now")


@pytest.mark.usefixtures("_one_rank")
def test_a_tensor_without_memory_is_named() -> None:
    module = nn.Linear(3, 2)
    module.weight = nn.Parameter(module.weight.to("meta"))

    with pytest.raises(RuntimeError, match=r"weight has 6 elements, but the ranks hold \[0\] of them"):
        pieces_of(module)


@pytest.mark.usefixtures("_one_rank")
@pytest.mark.parametrize("limit", [0.5, 1e6, float("inf")])
def test_clipping_is_torch_s(limit: float) -> None:
    mine, theirs = [nn.Parameter(normal(3, 2)) for _ in range(2)], [nn.Parameter(normal(3, 2)) for _ in range(2)]
    for one in (mine[0], theirs[0]):
        one.grad = normal(3, 2, seed=1)

    norm = clip_grad_norm(mine, limit)

    assert torch.equal(norm, nn.utils.clip_grad_norm_(theirs, limit))
    torch.testing.assert_close(mine[0].grad, theirs[0].grad, rtol=1e-7, atol=0)


@pytest.mark.usefixtures("_one_rank")
def test_weights_that_are_not_finite_are_not_sent(kosmos_tower: str) -> None:
    model = tiny_model(kosmos_tower)
    with torch.no_grad():
        model.decoder.layers[1].ffn.fc1.bias[3] = float("nan")

    with pytest.raises(UserError, match=r"the initial weights are not finite: decoder\.layers\.1\.ffn\.fc1\.bias holds NaN"):
        build_on_rank_zero(lambda: model)
