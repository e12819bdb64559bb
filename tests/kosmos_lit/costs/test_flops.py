"""The analytic count equals torch's on small models, and published figures of the paper's."""

from __future__ import annotations

from dataclasses import astuple, replace
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from kosmos_lit.batch import KosmosBatch
from kosmos_lit.config import ConnectorConfig, DecoderConfig, KosmosConfig, LoraConfig, VisionConfig
from kosmos_lit.costs.flops import Flops, ModelFlops, Work
from kosmos_lit.init_from import freeze
from kosmos_lit.model import Kosmos
from tests.kosmos_lit.tiny_kosmos import batch_of, image_doc, text_doc, tiny_config

PAPER = KosmosConfig()
SMALL_TOWERS = {
    "patches of 8, narrow": {
        "image_size": 32,
        "patch_size": 8,
        "width": 24,
        "layers": 3,
        "head_width": 12,
        "mlp_ratio": 3.0,
    },
    "convolutions": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "head_width": 4},
    "timm, patches": {"image_size": 32, "timm_model_name": "test_vit"},
    "timm, depthwise": {"image_size": 64, "timm_model_name": "test_convnext"},
}


def counted(config: KosmosConfig, batch: KosmosBatch, patterns: tuple[str, ...] = ()) -> tuple[int, int]:
    """Return torch's count of a forward and of a backward pass."""
    model = Kosmos.create(config).train()
    freeze(model, patterns)
    # The math backend, since torch counts a flash kernel's backward pass as five products, one of them recomputed.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        loss = model.nll(batch).sum()
        forward = counter.get_total_flops()
        if loss.requires_grad:
            loss.backward()
    return forward, counter.get_total_flops() - forward


def assert_counts_agree(config: KosmosConfig, batch: KosmosBatch, patterns: tuple[str, ...] = ()) -> None:
    ours, work = ModelFlops(config, patterns), Work.of_batch(batch, config.decoder.document_attention)
    forward, backward = counted(config, batch, patterns)

    assert ours.forward(work).full == forward
    assert ours.training(work).full == forward + backward


def plain(tower: str, **fields: Any) -> KosmosConfig:
    """A config whose attention is plain products of matrices, which torch counts with all pairs of positions."""
    return tiny_config(tower, attention_kernel="reference", **fields)


@pytest.fixture
def batch() -> KosmosBatch:
    """Two rows of one document each, 38 positions and 3 images: torch counts padding too, so there is none."""
    return batch_of([[image_doc(13, n_images=2, seed=1)], [image_doc(31, seed=2)]], 38)


@pytest.fixture
def texts() -> KosmosBatch:
    return batch_of([[text_doc(36)], [text_doc(36, seed=1)]], 38)


# ---- against torch


@pytest.mark.parametrize("norm", ["sub", "pre", "post", "deepnorm"])
@pytest.mark.parametrize("connector", ["resampler", "perceiver", "linear", "mlp", "pool"])
def test_torch_counts_the_same_for_every_connector_and_norm(
    kosmos_tower: str, batch: KosmosBatch, connector: str, norm: str
) -> None:
    assert_counts_agree(plain(kosmos_tower, connector=connector, norm=norm), batch)


@pytest.mark.parametrize("connector", ["resampler", "perceiver", "linear", "mlp", "pool"])
@pytest.mark.parametrize("trainable", ["none", "last_block", "all"])
def test_torch_counts_the_same_whatever_of_the_tower_trains(
    kosmos_tower: str, batch: KosmosBatch, trainable: str, connector: str
) -> None:
    assert_counts_agree(plain(kosmos_tower, connector=connector, vision={"trainable": trainable}), batch)


@pytest.mark.parametrize("positions", ["xpos", "learned", "none"])
@pytest.mark.parametrize(
    "patterns",
    [
        ("decoder.embed_tokens",),
        ("decoder",),
        ("decoder.embed_tokens", "decoder.embed_positions", "decoder.layers.0"),
        ("*.weight",),
        ("vision", "decoder.layers.0.self_attn.[qk]_proj.*", "*.bias"),
    ],
)
def test_torch_counts_the_same_with_frozen_parts(
    kosmos_tower: str, batch: KosmosBatch, patterns: tuple[str, ...], positions: str
) -> None:
    patterns = tuple(p for p in patterns if positions == "learned" or "positions" not in p)
    assert_counts_agree(plain(kosmos_tower, positions=positions), batch, patterns)


@pytest.mark.parametrize("connector", ["resampler", "mlp"])
@pytest.mark.parametrize(
    "targets", [("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"), ("ffn.fc2",), ("dense", "fc1")]
)
def test_torch_counts_the_same_with_adapters(
    kosmos_tower: str, batch: KosmosBatch, texts: KosmosBatch, targets: tuple[str, ...], connector: str
) -> None:
    config = replace(plain(kosmos_tower, connector=connector), lora=LoraConfig(rank=7, targets=targets, dropout_rate=0.0))
    assert_counts_agree(config, batch)
    assert_counts_agree(config, texts)


@pytest.mark.parametrize("patterns", [(), ("decoder",), ("decoder.embed_tokens",)])
def test_torch_counts_the_same_without_images(kosmos_tower: str, texts: KosmosBatch, patterns: tuple[str, ...]) -> None:
    assert_counts_agree(plain(kosmos_tower), texts, patterns)


def test_torch_counts_the_same_where_a_rows_documents_see_each_other(kosmos_tower: str) -> None:
    rows = batch_of([[text_doc(11), image_doc(17)], [text_doc(35)]], 37)
    assert_counts_agree(plain(kosmos_tower, document_attention="row"), rows)


@pytest.mark.parametrize("trainable", ["none", "all"])
@pytest.mark.parametrize("name", list(SMALL_TOWERS))
def test_any_tower_of_open_clip_is_counted(name: str, trainable: str) -> None:
    table = {"embed_dim": 12, "vision_cfg": SMALL_TOWERS[name]}
    side = SMALL_TOWERS[name]["image_size"]
    config = KosmosConfig(
        vision=VisionConfig(architecture=table, pretrained=None, image_size=side, trainable=trainable),
        connector=ConnectorConfig(n_latents=3, n_heads=2),
        decoder=tiny_config("unused").decoder,
    )
    model = Kosmos.create(config).train()
    # Torch 2.11 does not count its fused attention on the CPU.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.vision(torch.zeros(1, 3, side, side, dtype=torch.uint8))

    forward, training = (
        count(Work(n_images=1)).vision for count in (ModelFlops(config).forward, ModelFlops(config).training)
    )

    assert forward == counter.get_total_flops()
    if trainable == "none":
        assert training == forward
    else:  # a gradient of each matrix and of each input but the pixels
        assert 2.5 * forward < training <= 3 * forward


# ---- what torch does not count


def test_padding_costs_nothing(kosmos_tower: str) -> None:
    padded = batch_of([[image_doc(5)], [text_doc(35)]], 37)

    work = Work.of_batch(padded)

    assert work == Work(n_tokens=12 + 37, n_pairs=12**2 + 37**2, n_targets=len(padded.loss_at), n_images=1)


def test_documents_of_a_row_do_not_pay_for_each_other() -> None:
    rows = [[text_doc(9), text_doc(16)], [image_doc(10)]]

    own, row = Work.of_batch(batch_of(rows, 31)), Work.of_batch(batch_of(rows, 31), "row")

    assert own.n_pairs == 11**2 + 18**2 + 17**2
    assert row.n_pairs == 29**2 + 17**2
    assert (own.n_tokens, own.n_targets, own.n_images) == (row.n_tokens, row.n_targets, row.n_images) == (46, 38, 1)


def test_recomputed_chunks_of_the_loss_count_once(kosmos_tower: str, batch: KosmosBatch) -> None:
    work = Work.of_batch(batch)

    unchunked, chunked = (ModelFlops(plain(kosmos_tower, loss_chunk=n)).training(work) for n in (None, 7))

    assert chunked == unchunked


def test_every_part_adds_to_the_sum() -> None:
    parts = Flops(blocks=2.0, attention=3.0, head=5.0, connector=7.0, vision=11.0)

    assert (parts.total, parts.full) == (28.0, 31.0)
    assert astuple(parts + parts) == (4.0, 6.0, 10.0, 14.0, 22.0)


# ---- the paper's model, as published or computed elsewhere


def test_the_papers_tower_costs_162_gflop_an_image() -> None:
    forward = ModelFlops(PAPER).forward(Work(n_images=1))

    assert forward.vision == pytest.approx(162.03e9, rel=1e-4)  # open_clip's docs/model_profile.csv


def test_the_papers_resampler_costs_22_gflop_an_image_to_train_on_a_frozen_tower() -> None:
    frozen = replace(PAPER, vision=VisionConfig(trainable="none"))

    training = ModelFlops(frozen).training(Work(n_images=1))

    assert training.connector == pytest.approx(22.0e9, rel=5e-3)
    assert training.vision == ModelFlops(frozen).forward(Work(n_images=1)).vision


def test_the_papers_decoder_costs_8_gflop_a_token_to_train_and_attention() -> None:
    text = ModelFlops(PAPER).training(Work.of_documents([2048], n_targets=2048, n_images=0))

    assert (text.blocks + text.head) / 2048 == pytest.approx(8.034e9, rel=1e-4)  # 6 (1,207.96 M + 131.09 M)
    assert text.full / 2048 == pytest.approx(9.242e9, rel=1e-4)  # and 12 L D T
    assert text.total / 2048 == pytest.approx(8.638e9, rel=1e-4)  # and 6 L D T


def test_the_papers_step_costs_11_pflop() -> None:
    """0.5 million positions of text, 5,952 captions of 84 and 513 pages of 390 with two images, every position counted."""
    model = ModelFlops(replace(PAPER, vision=VisionConfig(trainable="none")))
    rows, captions, pages = 500_000 // 2048, 5_952, 513
    lengths = [2048] * rows + [500_000 % 2048] + [84] * captions + [390] * pages
    step = Work.of_documents(lengths, n_targets=sum(lengths), n_images=captions + 2 * pages)
    supervised = replace(step, n_targets=step.n_tokens - 66 * step.n_images)

    assert model.training(step).total == pytest.approx(11.26e15, rel=2e-3)
    assert model.training(step).vision == pytest.approx(1.13e15, rel=2e-3)
    assert model.training(supervised).total == pytest.approx(10.90e15, rel=2e-3)  # only positions with a loss in the head


def test_more_of_the_tower_costs_more() -> None:
    costs = [
        ModelFlops(replace(PAPER, vision=VisionConfig(trainable=rule))).training(Work(n_images=1)).vision  # type: ignore[arg-type]
        for rule in ("none", "last_block", "all")
    ]

    forward = costs[0]
    assert costs[1] == pytest.approx(forward * (1 + 2 / 24), rel=1e-2)  # one block of 24, and its gradients
    assert 2.98 * forward < costs[2] < 3 * forward  # the pixels need no gradient


def test_a_frozen_decoder_costs_its_input_gradients_only_where_there_are_images() -> None:
    model = ModelFlops(KosmosConfig(decoder=DecoderConfig()), freeze=["decoder"])
    text = Work.of_documents([2048], n_targets=2048, n_images=0)

    assert model.training(text) == model.forward(text)
    assert model.training(replace(text, n_images=1)).blocks == 2 * model.forward(text).blocks
