"""Fused layers compute what plain ones do, whatever the batch; so do layers that compute their activations twice."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kosmos_lit.batch import KosmosBatch
from kosmos_lit.config import LoraConfig
from kosmos_lit.inference.engine import Engine
from kosmos_lit.model import Kosmos
from kosmos_lit.tokenizer import BOS
from tests.kosmos_lit.tiny_kosmos import batch_of, image_doc, shaken, text_doc, tiny_config, tiny_model

T = 37
BATCHES = [
    batch_of([[image_doc(4, seed=1, n_images=2), text_doc(7, seed=2)], [text_doc(19, seed=3)]], T),
    batch_of([[text_doc(3, seed=4), image_doc(5, seed=5), text_doc(8, seed=6)], [image_doc(11, seed=7)]], T),
    batch_of([[text_doc(35, seed=8)], [image_doc(1, seed=n) for n in range(4)]], T),
]
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo looks for it
needs_compiler = pytest.mark.skipif(shutil.which("gcc") is None, reason="inductor needs a C compiler")


@pytest.fixture(autouse=True)
def own_graphs() -> Iterator[None]:
    """Graphs of other tests count towards no limit of this one."""
    torch.compiler.reset()
    with torch._inductor.config.patch(compile_threads=1):
        yield
    torch.compiler.reset()


def losses(model: Kosmos, batches: list[KosmosBatch] = BATCHES) -> list[Tensor]:
    """The loss of each batch and then the gradients of their sum, all in float32."""
    model.zero_grad()
    found = []
    for batch in batches:
        loss, _ = model.loss(batch, 0.1)
        loss.backward()
        found.append(loss.detach())
    return found + [p.grad.clone() for p in model.parameters() if p.grad is not None]


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(found, expected, strict=True):
        assert (a - b).norm() <= 1e-3 * b.norm() + 1e-6  # fp32, 5 layers back and forth, sums in another order


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize(
    "fields", [{}, {"norm": "deepnorm", "positions": "learned"}, {"recompute": "selective"}, {"recompute": "full"}], ids=str
)
def test_a_fused_model_gives_the_losses_of_a_plain_one_compiled_once(kosmos_tower: str, fields: dict[str, str]) -> None:
    expected = losses(tiny_model(kosmos_tower, **fields).train())
    model = tiny_model(kosmos_tower, vision={"chunk": 4}, **fields).train()
    names = list(model.state_dict())
    model.compile_blocks()
    # The batches' 3, 2 and 4 images make chunks of 1 and of 4: both sizes are seen, and each document's length.
    assert_same(losses(model), expected)
    torch._dynamo.utils.counters.clear()
    with torch._dynamo.config.patch(error_on_recompile=True):
        losses(model, BATCHES[::-1])
    assert not torch._dynamo.utils.counters["graph_break"]
    assert not torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert list(model.state_dict()) == names


@needs_compiler
@pytest.mark.slow
def test_a_fused_model_with_adapters_gives_the_losses_of_a_plain_one(kosmos_tower: str) -> None:
    config = replace(tiny_config(kosmos_tower), lora=LoraConfig(rank=2, dropout_rate=0.0))
    models = [shaken(Kosmos.create(config)).train() for _ in range(2)]
    expected = losses(models[0])
    models[1].compile_blocks()
    assert_same(losses(models[1]), expected)


@needs_compiler
@pytest.mark.slow
def test_a_fused_model_in_16_bits_gives_the_losses_of_a_plain_one(kosmos_tower: str) -> None:
    found = []
    for fuses in (False, True):
        model = tiny_model(kosmos_tower).train()
        if fuses:
            model.compile_blocks()
        with torch.autocast("cpu", torch.bfloat16):
            found.append(losses(model)[: len(BATCHES)])
    # Fused kernels round to bf16 less often: 2^-8 a layer, and means over some 20 tokens
    torch.testing.assert_close(found[0], found[1], rtol=3e-2, atol=0)


@needs_compiler
def test_generation_is_not_compiled(kosmos_tower: str) -> None:
    model = tiny_model(kosmos_tower)
    engine, tokens = Engine(model, None), torch.tensor([[BOS, 7, 11, 13]])
    expected = engine.logits(tokens)
    model.compile_blocks()
    torch._dynamo.utils.counters.clear()
    assert torch.equal(engine.logits(tokens), expected)
    assert not torch._dynamo.utils.counters["stats"]


# ---- activations that are computed twice


@pytest.mark.parametrize("recompute", ["selective", "full"])
@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_computing_again_changes_no_loss_and_no_gradient(kosmos_tower: str, recompute: str, rate: float) -> None:
    rates = {"dropout_rate": rate, "attention_dropout_rate": rate}
    found = []
    for choice in ("none", recompute):
        model = tiny_model(kosmos_tower, recompute=choice, **rates).train()
        torch.manual_seed(3)
        found.append(losses(model))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def kept(tower: str, recompute: str) -> int:
    """Numbers that the decoder's layers keep for the backward pass."""
    model = tiny_model(tower, recompute=recompute, n_layers=5).train()
    sizes: dict[int, int] = {}
    weights = {p.data_ptr() for p in model.parameters()}

    def count(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in weights:
            sizes[tensor.data_ptr()] = tensor.numel()
        return tensor

    hidden = torch.zeros(2, T, 20, requires_grad=True)
    mask = torch.ones(1, 1, T, T, dtype=torch.bool).tril()
    with torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
        for layer in model.decoder.layers:
            hidden = layer(hidden, mask, None)
    return sum(sizes.values())


def test_computing_more_again_keeps_less(kosmos_tower: str) -> None:
    none, full = (kept(kosmos_tower, recompute) for recompute in ("none", "full"))
    assert full < none / 4
