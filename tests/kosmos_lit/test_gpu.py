"""What only a GPU shows: the model on CUDA, with xformers' kernel, against the same model on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kosmos_lit.checks.leaks import find_leak
from kosmos_lit.config import KosmosConfig
from kosmos_lit.inference.engine import Engine
from kosmos_lit.model import Kosmos
from kosmos_lit.ops.fp8 import MIN_CAPABILITY
from kosmos_lit.tokenizer import BOS, Tokenizer
from tests.kosmos_lit.tiny_kosmos import SPECIAL, batch_of, image_doc, text_doc, tiny_config

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture
def config(kosmos_tower: str) -> KosmosConfig:
    return tiny_config(kosmos_tower, dim=64, n_heads=2)  # heads of 32, which every CUDA kernel takes


@pytest.mark.parametrize("kernel", ["xformers", "flex", "sdpa", "reference"])
def test_losses_and_gradients_are_those_of_the_cpu(config: KosmosConfig, kernel: str) -> None:
    table = {"attention_kernel": kernel}
    on_gpu = Kosmos.create(KosmosConfig.from_dict({**vars(config), "decoder": {**vars(config.decoder), **table}})).cuda()
    on_cpu = Kosmos.create(config)
    batch = batch_of([[text_doc(7), image_doc(11)], [image_doc(5, n_images=2), text_doc(3)]], 41)

    expected, actual = on_cpu.nll(batch), on_gpu.nll(batch.to("cuda"))
    expected.sum().backward()
    actual.sum().backward()

    # fp32 on both sides, TF32 off: sums in another order
    torch.testing.assert_close(actual.cpu(), expected, rtol=1e-4, atol=1e-4)
    for (name, a), b in zip(on_gpu.named_parameters(), on_cpu.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None and b.grad is not None:
            torch.testing.assert_close(a.grad.cpu(), b.grad, rtol=1e-3, atol=1e-3)


SETTINGS = [{}, {"n_beams": 3}, {"temperature": 0.8, "top_k": 7}, {"choices": ("a cat", "a dog", "a square")}]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_model_generates_the_same_on_gpu_and_cpu(
    config: KosmosConfig, kosmos_tokenizer: Tokenizer, settings: dict[str, Any]
) -> None:
    image = torch.arange(3 * 23 * 29, dtype=torch.int64).view(3, 23, 29).to(torch.uint8)
    engine = Engine(Kosmos.create(config, 3), kosmos_tokenizer)

    on_cpu = engine.generate("the <image> sat on", image, max_new_tokens=7, **settings)
    on_gpu = engine.to("cuda").generate("the <image> sat on", image, max_new_tokens=7, **settings)

    assert on_gpu == on_cpu


def test_scores_and_logits_are_those_of_the_cpu(config: KosmosConfig, kosmos_tokenizer: Tokenizer) -> None:
    image = torch.full((3, 23, 29), 77, dtype=torch.uint8)
    engine = Engine(Kosmos.create(config, 3), kosmos_tokenizer)

    on_cpu, logits = engine.score("the", ["cat sat", "mat"], image), engine.logits([BOS, 7, 11])
    engine.to("cuda")

    totals = [s.total for s in engine.score("the", ["cat sat", "mat"], image)]
    assert totals == pytest.approx([s.total for s in on_cpu], abs=1e-4)  # fp32: sums in another order
    torch.testing.assert_close(engine.logits([BOS, 7, 11]).cpu(), logits, rtol=1e-4, atol=1e-4)


def on_gpu(config: KosmosConfig, **decoder: Any) -> Kosmos:
    """The model with other fields of the decoder, training on CUDA."""
    table = {**vars(config.decoder), **decoder}
    return Kosmos.create(KosmosConfig.from_dict({**vars(config), "decoder": table})).cuda().train()


def losses(model: Kosmos) -> list[float]:
    """Losses of batches whose documents differ in length, after a step on each of them."""
    rows = [[text_doc(7), image_doc(11)], [image_doc(5, n_images=2)]], [[text_doc(30)], [image_doc(9), text_doc(3)]]
    optimizer, actual = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True), []
    for rows_of_batch in rows * 3:
        batch = batch_of(rows_of_batch, 48).to("cuda")
        with torch.autocast("cuda", torch.bfloat16):
            loss, _ = model.loss(batch, 1 / len(batch.loss_at))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        actual.append(float(loss))
    return actual


@pytest.mark.parametrize("fields", [{}, {"recompute": "selective"}, {"recompute": "full"}], ids=str)
def test_a_fused_model_learns_on_the_gpu_as_a_plain_one(config: KosmosConfig, fields: dict[str, str]) -> None:
    plain, fused = on_gpu(config), on_gpu(config, **fields)
    fused.compile_blocks()
    assert losses(fused) == pytest.approx(losses(plain), rel=2e-2)  # bf16: 2^-8 a layer, rounded at other places


@pytest.mark.parametrize("fuses", [False, True])
@pytest.mark.parametrize("scaling", ["tensorwise", "rowwise"])
def test_a_model_in_8_bits_learns_on_the_gpu_as_one_in_16(config: KosmosConfig, scaling: str, fuses: bool) -> None:
    if torch.cuda.get_device_capability() < MIN_CAPABILITY:
        pytest.skip("products in 8 bits need capability 8.9")
    plain, rounded = on_gpu(config, ffn_dim=128), on_gpu(config, ffn_dim=128, fp8=scaling)
    if fuses:
        rounded.compile_blocks()
    assert losses(rounded) == pytest.approx(losses(plain), rel=5e-2)  # e4m3: some 4 % of a product, means over 20 tokens


@pytest.mark.parametrize("kernel", ["xformers", "flex", "sdpa"])
@pytest.mark.parametrize("within", ["own", "row"])
def test_no_kernel_leaks_on_the_gpu(config: KosmosConfig, kernel: str, within: str) -> None:
    model = on_gpu(config, attention_kernel=kernel, document_attention=within)
    with torch.autocast("cuda", torch.bfloat16):
        assert find_leak(model, 61, SPECIAL) is None
        model.compile_blocks()
        assert find_leak(model, 61, SPECIAL) is None


def test_a_training_step_does_not_wait_for_the_gpu(config: KosmosConfig) -> None:
    model, batch = on_gpu(config), batch_of([[text_doc(7), image_doc(11)], [image_doc(5, n_images=2)]], 48).to("cuda")
    model.loss(batch, 0.1)[0].backward()  # tables and buffers are made once
    torch.cuda.set_sync_debug_mode("error")
    try:
        model.loss(batch, 0.1)[0].backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
