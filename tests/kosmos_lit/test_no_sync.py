"""A training step never asks a tensor for its value, so that a GPU never waits for the host, nor the host for it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kosmos_lit.batch import KosmosBatch
from kosmos_lit.config import LossWeights, OptimizerConfig
from kosmos_lit.lit import KosmosLit
from tests.host_waits import HostWaits
from tests.kosmos_lit.tiny_kosmos import batch_of, image_doc, text_doc, tiny_config, tiny_model

T = 37
BATCH = batch_of([[image_doc(4, n_images=2), text_doc(7)], [text_doc(19), image_doc(2)]], T, corpus=[2, 1])


def step(lit: KosmosLit, optimizer: torch.optim.Optimizer, batch: KosmosBatch = BATCH) -> None:
    loss = lit.training_step(batch, 0)
    loss.backward()
    lit.configure_gradient_clipping(optimizer, 1.0, "norm")
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("weights", [LossWeights(), LossWeights(caption=0.5)], ids=["equal", "weighted"])
@pytest.mark.parametrize("fields", [{}, {"document_attention": "row"}, {"loss_chunk": 5, "recompute": "full"}], ids=str)
def test_a_training_step_asks_no_tensor_for_its_value(
    kosmos_tower: str, weights: LossWeights, fields: dict[str, Any]
) -> None:
    rates = {"dropout_rate": 0.1, "attention_dropout_rate": 0.1}
    lit = KosmosLit(tiny_config(kosmos_tower), OptimizerConfig(total_steps=7), weights)
    lit.net = tiny_model(kosmos_tower, vision={"trainable": "last_block"}, **rates, **fields).train()
    lit.trainer = SimpleNamespace(  # of one process
        accumulate_grad_batches=2, world_size=1, max_steps=7, gradient_clip_algorithm="norm", strategy=None
    )  # type: ignore[assignment]
    optimizer = lit.configure_optimizers()["optimizer"]  # type: ignore[index, call-overload]
    step(lit, optimizer)  # tables and optimizer state are made once
    with HostWaits() as waiting:
        step(lit, optimizer)
    assert waiting.n_operations > 100
    assert waiting.calls == []


@pytest.mark.parametrize("ask", [lambda t: t.item(), lambda t: t[t > 0], lambda t: bool(t > 0), lambda t: t.nonzero()])
def test_asking_a_tensor_for_its_value_is_noticed(ask: Any) -> None:
    with HostWaits() as waiting:
        ask(torch.ones(1))
    assert waiting.calls
