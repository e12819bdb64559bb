"""A model's graphs are its own: more variants than torch.compile allows a function run in one process."""

from __future__ import annotations

import gc
import random
import weakref
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from kosmos_lit.batch import KosmosBatch
from kosmos_lit.init_from import freeze
from kosmos_lit.model import Kosmos
from kosmos_lit.ops.graphs import Graphs
from tests.kosmos_lit.tiny_kosmos import LATENTS, batch_of, image_doc, text_doc, tiny_config

LIMIT = 8
"""Graphs of one function that torch.compile makes."""
BATCH = batch_of([[text_doc(7), image_doc(3)], [image_doc(5), text_doc(2)]], 31)
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo looks for it


class Counter:
    """A backend of torch.compile that runs graphs as they are, and counts them."""

    def __init__(self) -> None:
        self.n_graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
        self.n_graphs += 1
        return graph


@pytest.fixture
def counter(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter]:
    """torch.compile with a backend that compiles nothing."""
    torch.compiler.reset()
    backend, real = Counter(), torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: real(function, backend=backend, **options))
    yield backend
    torch.compiler.reset()


def step(model: Kosmos) -> float:
    loss, _ = model.loss(BATCH, 0.1)
    loss.backward()
    return loss.item()


def test_more_models_than_graphs_are_allowed_of_a_function_run_in_one_process(kosmos_tower: str, counter: Counter) -> None:
    assert torch._dynamo.config.recompile_limit == LIMIT
    config, results = tiny_config(kosmos_tower, n_layers=1), {}
    for n in range(1, LIMIT + 3):
        norm = ("sub", "pre", "deepnorm", "post")[n % 4]
        decoder = replace(config.decoder, n_heads=n, dim=4 * n, ffn_dim=5 + n, norm=norm)
        plain, fused = (Kosmos.create(replace(config, decoder=decoder)).train() for _ in range(2))
        fused.compile_blocks()
        results[n] = step(fused), step(plain)
    assert all(fused == pytest.approx(plain, rel=1e-5) for fused, plain in results.values())  # fp32; padded chunks
    assert counter.n_graphs >= 2 * len(results)


def test_training_and_evaluation_of_partly_frozen_models_stay_below_the_limit(kosmos_tower: str, counter: Counter) -> None:
    # Layers train, do not, or do in part, behind an input with a gradient and without; batches of two sizes.
    config = tiny_config(kosmos_tower, n_layers=5)
    model = Kosmos.create(config).train()
    freeze(model, ["vision", "connector", "decoder.embed_tokens", "decoder.layers.[01].*", "decoder.layers.3.ffn"])
    model.compile_blocks()
    step(model)
    model.eval()
    for without_gradient in (torch.no_grad, torch.inference_mode):
        for batch in (BATCH, batch_of([[text_doc(9), image_doc(1)]], 31)):
            with without_gradient():
                model.nll(batch)
    assert counter.n_graphs > LIMIT


def test_layers_of_a_model_share_its_graphs(kosmos_tower: str, counter: Counter) -> None:
    counts = []
    for n_layers in (3, 7):
        before = counter.n_graphs
        model = Kosmos.create(tiny_config(kosmos_tower, n_layers=n_layers)).train()
        model.compile_blocks()
        step(model)
        counts.append(counter.n_graphs - before)
    assert counts[0] == counts[1]


def varied_batches(n: int, row_len: int) -> list[KosmosBatch]:
    """Micro-batches of two rows that differ in documents, images (none to 5) and supervised positions."""
    draw = random.Random(0)
    batches = []
    while len(batches) < n:
        rows, n_images = [], 0
        for _ in range(2):
            row, left = [], row_len
            while left > 12 and draw.random() < 0.9:
                if n_images < 5 and draw.random() < 0.4:
                    row.append(image_doc(words := draw.randint(1, left - 10), seed=left))
                    n_images, left = n_images + 1, left - words - LATENTS - 4
                else:
                    row.append(text_doc(words := draw.randint(1, left - 10), seed=left))
                    left -= words + 2
            rows.append(row or [text_doc(3)])
        batches.append(batch_of(rows, row_len))
    return batches


@pytest.mark.parametrize("fields", [{}, {"recompute": "selective"}], ids=str)
def test_no_graph_is_new_after_the_second_micro_batch(kosmos_tower: str, counter: Counter, fields: dict[str, str]) -> None:
    model = Kosmos.create(tiny_config(kosmos_tower, vision={"chunk": 4}, n_layers=1, loss_chunk=7, **fields)).train()
    model.compile_blocks()
    batches = varied_batches(50, 47)
    # First the most images, which make chunks of both sizes, and another number of supervised positions.
    batches.sort(key=lambda batch: -len(batch.images))
    assert len(batches[0].images) > 4
    counts = []
    for batch in (batches[0], *batches[:0:-1]):
        loss, _ = model.loss(batch, 0.1)
        loss.backward()
        counts.append(counter.n_graphs)
    assert {len(batch.images) for batch in batches} == set(range(6))
    assert 1 in {len(batch.loss_at) % 7 for batch in batches}  # a last chunk of one row
    assert counts[1:] == counts[1:2] * 49


def test_a_runaway_in_one_model_is_an_error(counter: Counter) -> None:
    graphs = Graphs()
    for n in range(1, LIMIT + 1):
        graphs(double)(torch.ones(n))
    with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
        graphs(double)(torch.ones(LIMIT + 1))


def double(x: Tensor) -> Tensor:
    return x * 2


def test_sizes_that_vary_in_one_model_are_constants_in_the_next(counter: Counter) -> None:
    for graphs in (Graphs(), Graphs()):
        before = counter.n_graphs
        for n in (5, 6, 7, 8):  # the first size is a constant, then one graph takes any
            graphs(double, dynamic=None)(torch.ones(n))
        assert counter.n_graphs == before + 2


def test_graphs_keep_no_weights_of_a_model_that_is_gone(kosmos_tower: str, counter: Counter) -> None:
    model = Kosmos.create(tiny_config(kosmos_tower)).train()
    model.compile_blocks()
    step(model)
    weights = [weakref.ref(parameter) for parameter in model.parameters()]
    assert counter.n_graphs
    del model
    gc.collect()
    assert not [weight for weight in weights if weight() is not None]


def test_a_function_that_refers_to_anothers_variables_is_refused() -> None:
    layer = nn.Identity()
    with pytest.raises(AssertionError):
        Graphs()(lambda x: layer(x))
