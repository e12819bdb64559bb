"""What a step sends, by hand: a model of 60 parameters in blocks (48 train) and 20 in the root (16 train)."""

from __future__ import annotations

from typing import Any

import pytest

from kosmos_lit.costs.communication import Communication, Links, Sizes, all_gather, all_reduce, communication
from kosmos_lit.costs.memory import MicroBatch, Setting
from tests.kosmos_lit.tiny_kosmos import tiny_model

SIZES = Sizes(blocks=60, blocks_trained=48, root=20, root_trained=16)
LINKS = Links(within_node=10.0, between_nodes=2.0, devices_per_node=4)
BATCH = MicroBatch(rows=1, seq_len=7, n_images=0, n_targets=7)


def sent(block_seconds: float = 0.0, *, sizes: Sizes = SIZES, **fields: Any) -> Communication:
    root = fields.pop("root_every_micro_batch", False)
    setting = Setting(batch=BATCH, precision="bf16-mixed", **fields)
    return communication(sizes, setting, LINKS, block_seconds, root_every_micro_batch=root)


def test_rings_send_all_but_a_rank_s_own_part_once_or_twice() -> None:
    assert all_gather(12.0, 4) == 9.0
    assert all_reduce(12.0, 4) == 18.0
    assert all_gather(12.0, 1) == all_reduce(12.0, 1) == 0.0


def test_ddp_sums_all_gradients_once() -> None:
    c = sent(strategy="ddp", world_size=4, n_micro_batches=5)

    assert (c.within_node, c.between_nodes) == (2 * 3 / 4 * 4 * (48 + 16), 0.0) == (384.0, 0.0)
    assert c.seconds == pytest.approx(38.4)
    assert c.exposed_seconds == pytest.approx(38.4)  # with no operations to hide it


def test_ddp_hides_the_blocks_gradients_behind_the_last_backward_pass() -> None:
    # Of 38.4 s the blocks' take 28.8 s and the root's 9.6 s; a backward pass of 20 s hides so much of the former.
    c = sent(30.0, strategy="ddp", world_size=4, n_micro_batches=5)

    assert c.exposed_seconds == pytest.approx(28.8 - 20.0 + 9.6)
    assert sent(3000.0, strategy="ddp", world_size=4).exposed_seconds == pytest.approx(9.6)


def test_ranks_of_several_nodes_share_the_network() -> None:
    c = sent(strategy="ddp", world_size=8)

    assert (c.within_node, c.between_nodes) == (0.0, 2 * 7 / 8 * 256)
    assert c.seconds == pytest.approx(448 / 2)


GATHER, SCATTER, ROOT = 3 / 4 * 2 * 60, 3 / 4 * 4 * 48, 3 / 4 * 4 * (20 + 16)
"""Bytes of a device in FSDP on 4 ranks: of a gather in bfloat16, of a sum in float32, of the root once."""


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, 6 * GATHER + 3 * SCATTER + ROOT),
        ({"reshards": False}, 3 * GATHER + 3 * SCATTER + ROOT),
        ({"sums_every_micro_batch": False}, 6 * GATHER + SCATTER + ROOT),
        ({"root_every_micro_batch": True}, 6 * GATHER + 3 * SCATTER + 3 * ROOT),
    ],
)
def test_fsdp_gathers_blocks_twice_and_sums_their_gradients_for_each_micro_batch(
    fields: dict[str, Any], expected: float
) -> None:
    c = sent(strategy="fsdp", world_size=4, n_micro_batches=3, **fields)

    assert (c.within_node, c.between_nodes) == (pytest.approx(expected), 0.0)
    assert (c.seconds, c.exposed_seconds) == pytest.approx((expected / 10, expected / 10))


def test_fsdp_hides_each_pass_s_transfers_behind_that_pass() -> None:
    # Forward: a gather of 9 s behind 5 s. Backward: a gather and a sum of 14.4 s behind 10 s. The root's 10.8 s are seen.
    c = sent(15.0, strategy="fsdp", world_size=4, n_micro_batches=3)

    assert c.exposed_seconds == pytest.approx(3 * (9 - 5) + 3 * (9 + 14.4 - 10) + 10.8)


def test_hsdp_gathers_within_a_node_and_sums_shards_between_nodes_once() -> None:
    c = sent(strategy="fsdp", world_size=8, ranks_per_replica=4, n_micro_batches=3)

    shards = 2 * 1 / 2 * 4 * (48 + 16) / 4  # all-reduce of a quarter of the gradients over two replicas
    assert c.within_node == pytest.approx(6 * GATHER + 3 * SCATTER + ROOT)
    assert c.between_nodes == pytest.approx(shards) == 64.0
    assert c.total == c.within_node + c.between_nodes
    assert c.seconds == pytest.approx(c.within_node / 10 + 64 / 2)


def test_hsdp_hides_its_sum_over_replicas_behind_the_last_backward_pass() -> None:
    c = sent(36.0, strategy="fsdp", world_size=8, ranks_per_replica=4, n_micro_batches=3)

    # Backward passes of 24 s hide 9 + 14.4 s of each micro-batch, the last one also 0.6 of the blocks' 24 s between nodes.
    assert c.exposed_seconds == pytest.approx(9 + 14.4 + 24 - 24 + 10.8 + 8)


def test_float32_is_gathered_in_float32() -> None:
    mixed, exact = (
        communication(SIZES, Setting(batch=BATCH, precision=p, strategy="fsdp", world_size=4), LINKS, 0.0).total
        for p in ("bf16-mixed", "32-true")
    )

    assert exact - mixed == pytest.approx(2 * GATHER)


def test_one_device_sends_nothing() -> None:
    assert sent(1.0, strategy="one").total == sent(1.0, strategy="fsdp").total == 0.0


@pytest.mark.parametrize(
    ("n_ranks", "stride", "expected"),
    [(4, 1, True), (2, 1, True), (3, 1, False), (8, 1, False), (2, 2, True), (2, 4, False), (1, 1, True)],
)
def test_consecutive_ranks_that_divide_a_node_lie_in_one(n_ranks: int, stride: int, expected: bool) -> None:
    assert LINKS.in_one_node(n_ranks, stride) is expected


def test_the_frozen_tower_is_never_sent(kosmos_tower: str) -> None:
    net = tiny_model(kosmos_tower, vision={"trainable": "last_block"})
    sizes = Sizes.of(net)

    frozen = sum(p.numel() for p in net.vision.parameters() if not p.requires_grad)
    assert sizes.blocks == sizes.blocks_trained == sum(p.numel() for p in net.decoder.layers.parameters())
    assert sizes.root == sizes.root_trained == sum(p.numel() for p in net.parameters()) - frozen - sizes.blocks
    assert sizes.root > net.decoder.embed_tokens.weight.numel()
