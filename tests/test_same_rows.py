"""A step has the same rows and gradient for all numbers of ranks, workers and micro-batches, with real processes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice, product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from datamodules.corpus import IndexedCorpus
from datamodules.loader import BatchLayout, Loader, MicroBatches, RenderOptions
from datamodules.stream import Stream
from kosmos_lit.batch import CORPORA, DIGEST_MASK, KosmosBatch
from kosmos_lit.lit import KosmosLit
from kosmos_lit.model import Kosmos
from kosmos_lit.tokenizer import Tokenizer
from tests.datamodules import sample_data
from tests.kosmos_lit.tiny_kosmos import LATENTS, SIDE, TOWER, shaken, tiny_config

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("same_rows")]  # one worker: its runs are made once

G, FIRST_ROW, N_STEPS, SEQ_LEN = 16, 5, 2, 101
RATIO = (5, 5, 2, 3)
RANKS, WORKERS, ACCUMULATIONS = (1, 2, 4), (0, 1, 2), (1, 2, 4)
WAYS = list(product(RANKS, WORKERS, ACCUMULATIONS))


@dataclass(frozen=True)
class Files:
    """Files that every process opens for itself."""

    tokenizer: Path
    corpora: dict[str, Path]
    tower: str
    out: Path


@dataclass(frozen=True)
class Step:
    """One optimizer step, over all ranks."""

    rows: dict[int, tuple[str, list[int], list[int]]]
    """By number: source, tokens and targets."""
    digest: int
    gradient: list[Tensor]
    """Of every parameter, summed over micro-batches, and averaged over ranks as by DistributedDataParallel."""
    images: list[list[int]]
    """Images of each rank's micro-batches in turn."""


def open_data(files: Files) -> tuple[Stream, RenderOptions]:
    """Open the data: all four kinds."""
    tokenizer = Tokenizer.load(files.tokenizer)
    corpora = {name: IndexedCorpus(folder, tokenizer) for name, folder in files.corpora.items()}
    stream = sample_data.stream(corpora, tokenizer.special, ratio=RATIO, seq_len=SEQ_LEN, n_latents=LATENTS)
    bad = dict.fromkeys(CORPORA, 0.1)
    return stream, RenderOptions(tokenizer=tokenizer, image_size=SIDE, fit="crop", n_latents=LATENTS, max_bad_share=bad)


def loader(data: tuple[Stream, RenderOptions], ranks: int, rank: int, workers: int, accumulation: int) -> Loader:
    m = G // (ranks * accumulation)
    layout = BatchLayout(first_row=FIRST_ROW, global_batch_rows=G, micro_batch_rows=m, rank=rank, world_size=ranks)
    return Loader(MicroBatches(data[0], layout, data[1]), workers)


def model(files: Files) -> Kosmos:
    """The same model in every process, in training mode, without dropout."""
    vocabulary = Tokenizer.load(files.tokenizer).vocab_size
    return shaken(Kosmos.create(tiny_config(files.tower, vocab_size=vocabulary, max_seq_len=SEQ_LEN), 0)).train()


def steps(net: Kosmos, batches: Loader, ranks: int, accumulation: int, group: Any = None) -> Iterator[Step]:
    """Take the gradient of each step as Lightning and DistributedDataParallel do: micro-batches' and ranks' means."""
    lit = KosmosLit(net.config)
    lit.net, lit.trainer = net, SimpleNamespace(accumulate_grad_batches=accumulation, world_size=ranks)
    endless = iter(batches)
    for _ in range(N_STEPS):
        lit.rows_digest = 0
        net.zero_grad(set_to_none=True)
        micro = list(islice(endless, accumulation))
        for number, batch in enumerate(micro):
            (lit.training_step(batch, number) / accumulation).backward()
        own = (_rows(micro), lit.rows_digest, [len(batch.images) for batch in micro])
        gathered, gradient = [own] * ranks, []
        if ranks > 1:
            dist.all_gather_object(gathered, own, group=group)
        for name, parameter in net.named_parameters():
            # A rank without images must have one too, or the others would wait for it here.
            assert parameter.grad is not None, f"{name} has no gradient"
            if ranks > 1:
                dist.all_reduce(parameter.grad, group=group)
            gradient.append(parameter.grad / ranks)
        rows: dict[int, tuple[str, list[int], list[int]]] = {}
        for rank_rows, _, _ in gathered:
            assert not rows.keys() & rank_rows.keys(), "two ranks have the same row"
            rows |= rank_rows
        yield Step(rows, sum(d for _, d, _ in gathered) & DIGEST_MASK, gradient, [images for _, _, images in gathered])


def _rows(batches: list[KosmosBatch]) -> dict[int, tuple[str, list[int], list[int]]]:
    return {
        number: (batch.sources[b], batch.tokens[b].tolist(), batch.targets[b].tolist())
        for batch in batches
        for b, number in enumerate(batch.rows)
    }


def _rank(rank: int, files: Files, port: int) -> None:
    """Run one of four processes: it takes part in every distribution with at least `rank` + 1 ranks."""
    torch.set_num_threads(1)
    mp.set_start_method("fork", force=True)  # loaders start workers as in a run, not as this process was started
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=max(RANKS))
    groups = {ranks: dist.new_group(list(range(ranks))) for ranks in RANKS}
    net, data = model(files), open_data(files)
    for ranks, workers, accumulation in WAYS:
        if rank >= ranks:
            continue
        batches = loader(data, ranks, rank, workers, accumulation)
        results = [vars(step) for step in steps(net, batches, ranks, accumulation, groups[ranks])]
        if rank == 0:
            torch.save(results, files.out / f"{ranks}-{workers}-{accumulation}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def files(
    tmp_path_factory: pytest.TempPathFactory,
    tokenizer_folder: Path,
    corpora: dict[str, IndexedCorpus],
    examples: IndexedCorpus,
) -> Files:
    out = tmp_path_factory.mktemp("ranks")
    (out / "same_rows_tower.json").write_text(json.dumps(TOWER), encoding="utf-8")
    folders = {name: corpus.folder for name, corpus in (corpora | {"instruct": examples}).items()}
    return Files(tokenizer_folder, folders, str(out / "same_rows_tower.json"), out)


@pytest.fixture(scope="module")
def alone(files: Files) -> list[Step]:
    """The steps of a single process, each in one batch."""
    return list(steps(model(files), loader(open_data(files), 1, 0, 0, 1), 1, 1))


@pytest.fixture(scope="module")
def distributed(files: Files) -> dict[tuple[int, int, int], list[Step]]:
    """The steps of every distribution over ranks, workers and micro-batches."""
    # A store in a file would be locked by the loaders' processes, which inherit it.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    mp.spawn(_rank, (files, store.port), nprocs=max(RANKS))
    return {
        way: [Step(**step) for step in torch.load(files.out / f"{way[0]}-{way[1]}-{way[2]}.pt", weights_only=True)]
        for way in WAYS
    }


@pytest.fixture(params=WAYS, ids=[f"{r}_ranks_{w}_workers_{a}_micro_batches" for r, w, a in WAYS])
def one_way(request: pytest.FixtureRequest, distributed: dict[tuple[int, int, int], list[Step]]) -> list[Step]:
    return distributed[request.param]


def test_every_step_has_the_same_rows(alone: list[Step], one_way: list[Step]) -> None:
    firsts = [FIRST_ROW + s * G for s in range(N_STEPS)]
    assert [sorted(step.rows) for step in one_way] == [list(range(first, first + G)) for first in firsts]
    assert [step.rows for step in one_way] == [step.rows for step in alone]
    assert [step.digest for step in one_way] == [step.digest for step in alone]


def test_every_step_has_the_same_gradient(alone: list[Step], one_way: list[Step]) -> None:
    # float32, and only the order of sums differs: over at most G * SEQ_LEN = 1616 positions of either sign, so an entry may
    # be off by sqrt(1616) * 2 ** -24 = 2.4e-6 of the size of what is summed up. That size is taken as the largest entry of
    # the parameter's gradient, or 1e-2 of that of all parameters: a bias of keys, say, moves all inputs of a softmax alike,
    # so that its gradient is a sum of large terms that cancel. A row of the 16 that is missing or counted twice is off by
    # some 6e-2.
    for one, other in zip(alone, one_way, strict=True):
        largest = max(float(g.abs().max()) for g in one.gradient)
        for a, b in zip(one.gradient, other.gradient, strict=True):
            assert (a - b).abs().max() <= 1e-5 * max(float(a.abs().max()), 1e-2 * largest)


def test_every_part_of_the_model_learns_in_every_step(alone: list[Step]) -> None:
    for step in alone:
        assert all(bool(gradient.any()) for gradient in step.gradient)


@pytest.mark.parametrize("ranks", [2, 4])
def test_some_ranks_had_no_image_while_others_had(distributed: dict[tuple[int, int, int], list[Step]], ranks: int) -> None:
    at_once = [
        micro
        for (n, _, _), results in distributed.items()
        if n == ranks
        for step in results
        for micro in zip(*step.images, strict=True)
    ]
    assert any(0 in micro and any(micro) for micro in at_once)
