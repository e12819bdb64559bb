"""The test bench of all GPU measurements: a device, sizes, a clock, and a file of results."""

from __future__ import annotations

import gc
import json
import statistics
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.synthetic_batches import SyntheticBatches
from kosmos_lit.batch import KosmosBatch
from kosmos_lit.checks.device import describe_device
from kosmos_lit.config import ConnectorConfig, DecoderConfig, KosmosConfig, VisionConfig
from kosmos_lit.costs.flops import ModelFlops, Work
from kosmos_lit.costs.peaks import peak_flops
from kosmos_lit.model import Kosmos
from kosmos_lit.tokenizer import SpecialTokens

SHARES = {"text": 5, "caption": 5, "interleaved": 2}
"""Rows of each kind in a micro-batch of the mixture, as 0.5 M : 0.5 M : 0.2 M tokens."""
STEP_TOKENS = 1_200_000
"""Tokens of one step of the paper."""
Results = dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    """The sizes of model, batches and yardsticks."""

    matmul: int
    """Side of the square matrices whose product measures MM."""
    copy_bytes: int
    dim: int
    n_layers: int
    n_heads: int
    vocab: int
    seq_len: int
    rows: tuple[int, ...]
    """Rows of a micro-batch of text, tried one after another."""
    mixture: int
    """A micro-batch of the mixture has this many times `SHARES` rows."""
    tower: str | Mapping[str, Any]
    image_size: int
    """In pixels."""
    image_chunks: tuple[int, ...]
    new_tokens: int

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads


FULL = Sizes(
    matmul=8192, copy_bytes=1 << 32, dim=2048, n_layers=24, n_heads=32, vocab=64_128, seq_len=2048, rows=(16, 32), mixture=2,
    tower="ViT-L-14-quickgelu", image_size=224, image_chunks=(128, 256, 512), new_tokens=128,
)  # fmt: skip
TINY = Sizes(
    matmul=64, copy_bytes=1 << 16, dim=32, n_layers=2, n_heads=2, vocab=1_200, seq_len=512, rows=(1, 2), mixture=1,
    tower={"embed_dim": 16, "vision_cfg": {"image_size": 224, "patch_size": 32, "width": 16, "layers": 2, "head_width": 8},
           "quick_gelu": True},
    image_size=224, image_chunks=(2, 3), new_tokens=4,
)  # fmt: skip


@dataclass
class Bench:
    """A device, and the results measured on it."""

    device: torch.device
    sizes: Sizes = FULL
    n_steps: int = 20
    """Number of measurements whose median is the result."""
    n_warm_up: int = 3
    matmul_rate: float = 0.0
    """Operations per second of a large bf16 product: MM, measured in the same run."""
    copy_rate: float = 0.0
    """Bytes per second, read and written."""
    results: dict[str, Results] = field(default_factory=dict)
    """The results so far, by component or goal."""

    @property
    def tiny(self) -> bool:
        return self.sizes is TINY

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def use_compile(self) -> bool:
        """Whether anything is compiled: not at tiny sizes, which only check that everything runs."""
        return self.on_gpu and not self.tiny

    def seconds(self, act: Callable[[], object], n: int | None = None) -> float:
        """Return the median seconds of `act` after a warm-up, by the device's clock on a GPU."""
        for _ in range(self.n_warm_up):
            act()
        seconds = []
        if not self.on_gpu:
            for _ in range(n or self.n_steps):
                begun = time.perf_counter()
                act()
                seconds.append(time.perf_counter() - begun)
            return statistics.median(seconds)
        marks = [torch.cuda.Event(enable_timing=True) for _ in range((n or self.n_steps) + 1)]
        torch.cuda.synchronize(self.device)
        marks[0].record()
        for mark in marks[1:]:
            act()
            mark.record()
        torch.cuda.synchronize(self.device)
        return statistics.median(a.elapsed_time(b) / 1000 for a, b in pairwise(marks))

    def alternating(self, variants: Mapping[str, Callable[[], object]], n_rounds: int = 3) -> dict[str, float]:
        """Return the median of each variant's medians over rounds in which they take turns."""
        seconds: dict[str, list[float]] = {name: [] for name in variants}
        for _ in range(n_rounds):
            for name, act in variants.items():
                seconds[name].append(self.seconds(act, max(1, self.n_steps // n_rounds + 1)))
        return {name: statistics.median(medians) for name, medians in seconds.items()}

    def peak_bytes(self, act: Callable[[], object]) -> int | None:
        """Return the peak memory of `act` beyond what is allocated before; None on a CPU."""
        if not self.on_gpu:
            return None
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        act()
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device) - before

    def compiled(self, function: Any) -> Any:
        """Compile with static shapes; at tiny sizes or on a CPU return the function as it is."""
        return torch.compile(function, dynamic=False) if self.use_compile else function

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16)

    # ---- models and batches

    def config(self, **decoder: Any) -> KosmosConfig:
        """Return the paper's model, or a tiny one; without dropout by default."""
        s = self.sizes
        fields: dict[str, Any] = {
            "vocab_size": s.vocab, "dim": s.dim, "n_layers": s.n_layers, "n_heads": s.n_heads, "ffn_dim": 4 * s.dim,
            "max_seq_len": s.seq_len, "dropout_rate": 0.0, "attention_dropout_rate": 0.0,
        }  # fmt: skip
        tower = s.tower if isinstance(s.tower, str) else dict(s.tower)
        return KosmosConfig(
            vision=VisionConfig(architecture=tower, pretrained=None, image_size=s.image_size),
            connector=ConnectorConfig(n_heads=s.n_heads, attention_dropout_rate=0.0),
            decoder=DecoderConfig(**(fields | decoder)),
        )

    def model(self, config: KosmosConfig, *, fused: bool = True) -> Kosmos:
        """Return a float32 model in training mode on the device, fused as in a run on a GPU, or plain."""
        model = Kosmos.create(config).to(self.device).train()
        if fused and self.use_compile:
            model.compile_blocks()
        return model

    def synthetic(self) -> SyntheticBatches:
        s = self.sizes
        return SyntheticBatches(
            SpecialTokens.for_pieces(s.vocab - 128), ConnectorConfig().n_latents, s.image_size, s.seq_len
        )

    def batch(self, shares: Mapping[str, int]) -> KosmosBatch:
        """Return a micro-batch on the device, with the given number of rows of each kind."""
        synthetic, draw = self.synthetic(), np.random.default_rng(0)
        return synthetic.batch([row for kind, n in shares.items() for row in synthetic.rows(kind, n, draw)]).to(self.device)

    def work(self, config: KosmosConfig, batch: KosmosBatch, seconds: float) -> Results:
        """Return the rates of a training step over real positions, by both counts of operations."""
        flops = ModelFlops(config).training(Work.of_batch(batch))
        peak = peak_flops(torch.cuda.get_device_name(self.device), "bf16") if self.on_gpu else None
        rate = flops.total / seconds
        return {
            "seconds": seconds, "positions": batch.n_real, "tokens/s": batch.n_real / seconds,
            "images/s": len(batch.images) / seconds, "padding": 1 - batch.n_real / batch.tokens.numel(),
            "TFLOP/s": rate / 1e12, "TFLOP/s, full attention": flops.full / seconds / 1e12,
            "of MM": rate / self.matmul_rate, "of peak": rate / peak if peak else None,
        }  # fmt: skip


class TrainStep:
    """A training step on one micro-batch: forward, backward, clipping, fused AdamW; in bf16 with float32 weights."""

    def __init__(self, bench: Bench, model: Kosmos, batch: KosmosBatch) -> None:
        self.bench, self.model, self.batch = bench, model, batch
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-5, fused=True)

    def __call__(self) -> None:
        with self.bench.autocast():
            loss, _ = self.model.loss(self.batch, 1 / self.batch.n_step_targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in self.trained if p.grad is not None], 2.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


def drop_gradients(*modules: nn.Module) -> None:
    """Drop the gradients of modules."""
    for module in modules:
        module.zero_grad(set_to_none=True)


class Record:
    """A JSON file of results, written after each measurement, so that an interrupted run keeps its results."""

    def __init__(self, path: Path | None, bench: Bench) -> None:
        self.path, self.bench = path, bench
        self.contents: dict[str, Any] = {
            "machine": describe_device(bench.device), "tiny": bench.tiny, "steps": bench.n_steps, "results": bench.results,
            "errors": {},
        }  # fmt: skip

    def take(self, name: str, measure: Callable[[Bench], Results]) -> None:
        """Measure and record the results, or the error, so that the next measurement can run."""
        begun = time.monotonic()
        try:
            results = measure(self.bench)
        except Exception as error:  # noqa: BLE001  # one failure must not cost the other results
            self.contents["errors"][name] = f"{type(error).__name__}: {error}"
            traceback.print_exc()
        else:
            rates = {"MM, TFLOP/s": self.bench.matmul_rate / 1e12, "copy, GB/s": self.bench.copy_rate / 1e9}
            self.bench.results[name] = results | rates | {"took, s": round(time.monotonic() - begun, 1)}
        gc.collect()
        if self.bench.on_gpu:
            torch.cuda.empty_cache()
        self.write()

    def write(self) -> None:
        if self.path is not None:
            temporary = self.path.with_name(self.path.name + ".part")
            temporary.write_text(json.dumps(self.contents, indent=1) + "\n", encoding="utf-8")
            temporary.replace(self.path)


def attempts(variants: Mapping[str, Callable[[], Results]]) -> dict[str, Results]:
    """Return the results of each variant, or its error: a kernel may lack a device, a dtype or a library."""
    results: dict[str, Results] = {}
    for name, measure in variants.items():
        try:
            results[name] = measure()
        except Exception as error:  # noqa: BLE001  # one failure must not cost the other variants'
            results[name] = {"error": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}
    return results


def measured(results: Mapping[str, Results], metric: str) -> dict[str, float]:
    """Return the values of one metric, by variant, without the variants that lack it."""
    return {name: result[metric] for name, result in results.items() if result.get(metric) is not None}


def tiny_bench(device: str = "cpu") -> Bench:
    """Return a bench of tiny sizes, for tests."""
    return replace(Bench(torch.device(device), TINY), n_steps=2, n_warm_up=1)
