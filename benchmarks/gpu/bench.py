"""The test bench of all GPU measurements: a device, sizes, a clock with an end, and a model that parts share."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.synthetic_batches import SyntheticBatches
from kosmos_lit.batch import KosmosBatch
from kosmos_lit.config import ConnectorConfig, DecoderConfig, KosmosConfig, VisionConfig
from kosmos_lit.costs.flops import ModelFlops, Work
from kosmos_lit.costs.memory import EstimateError, MicroBatch, Setting, estimate, meta_model
from kosmos_lit.costs.peaks import peak_flops
from kosmos_lit.model import Kosmos
from kosmos_lit.tokenizer import SpecialTokens

PROFILE_SECONDS = 25.0
"""Time that must be left for a profile."""
Results = dict[str, Any]
Shares = Mapping[str, int]
"""Rows of each corpus kind in a micro-batch."""


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
    rows: int
    """Rows of a micro-batch in the measurements of components."""
    text: tuple[Shares, ...]
    """Micro-batches of text, the largest first: the first one that fits is measured."""
    mixture: tuple[Shares, ...]
    """Micro-batches of the three corpora, 5 : 5 : 2 where their rows allow it."""
    tower: str | Mapping[str, Any]
    image_size: int
    """In pixels."""
    image_chunks: tuple[int, ...]
    new_tokens: int

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads


def _mixture(text: int, caption: int, interleaved: int) -> Shares:
    return {"text": text, "caption": caption, "interleaved": interleaved}


FULL = Sizes(
    matmul=8192,
    copy_bytes=1 << 32,
    dim=2048,
    n_layers=24,
    n_heads=32,
    vocab=64_128,
    seq_len=2048,
    rows=16,
    text=tuple({"text": n} for n in (32, 24, 16, 8, 4, 2)),
    mixture=(_mixture(10, 10, 4), _mixture(5, 5, 2), _mixture(3, 2, 1), _mixture(1, 1, 1)),
    tower="ViT-L-14-quickgelu",
    image_size=224,
    image_chunks=(128, 256, 512),
    new_tokens=128,
)
TINY = Sizes(
    matmul=64,
    copy_bytes=1 << 16,
    dim=32,
    n_layers=2,
    n_heads=2,
    vocab=1_200,
    seq_len=512,
    rows=1,
    text=({"text": 2}, {"text": 1}),
    mixture=(_mixture(5, 5, 2), _mixture(1, 1, 1)),
    tower={
        "embed_dim": 16,
        "vision_cfg": {"image_size": 224, "patch_size": 32, "width": 16, "layers": 2, "head_width": 8},
        "quick_gelu": True,
    },
    image_size=224,
    image_chunks=(2, 3),
    new_tokens=4,
)


@dataclass
class Bench:
    """A device, and what is measured on it."""

    device: torch.device
    sizes: Sizes = FULL
    n_steps: int = 20
    """Number of measurements whose median is the result."""
    n_warm_up: int = 3
    always_profiles: bool = False
    """Whether a part leaves its profile also where nothing is missed."""
    tables: Path | None = None
    """Files of profiles begin with this path; None: none is written."""
    matmul_rate: float = math.nan
    """Operations per second of a large bf16 product: MM, measured in the same run."""
    copy_rate: float = math.nan
    """Bytes per second, read and written."""
    part: str = ""
    """What is measured now."""
    end: float = math.inf
    """`time.monotonic()` when the part must have ended."""
    report: Callable[[Results], None] = lambda _: None
    """Takes more of the part's results, which count if the rest of it does not end in time."""
    _model: list[tuple[Kosmos, bool]] = field(default_factory=list)
    """The model that is kept, and whether it is fused; or nothing."""

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

    # ---- time

    def left(self) -> float:
        """Return the seconds that the part still has."""
        return self.end - time.monotonic()

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

    def attempts(self, variants: Mapping[str, Callable[[], Results]]) -> dict[str, Results]:
        """Return the results of each variant, or its error: a kernel may lack a device, a dtype or a library.

        A variant for which no time is left is skipped; what has been measured is reported after each.
        """
        results: dict[str, Results] = {}
        longest = 0.0
        for name, measure in variants.items():
            if self.left() < longest:
                results[name] = {"skipped": f"{self.left():.0f} s left, and another variant took {longest:.0f} s"}
                continue
            begun = time.monotonic()
            try:
                results[name] = measure()
            except Exception as error:  # one failure must not cost the other variants'
                if is_fatal(error):
                    raise
                results[name] = {"error": first_line(error)}
                del error
                self.free()
            longest = max(longest, time.monotonic() - begun)
            self.report({"variants": results})
        return results

    # ---- memory

    def peak_bytes(self, act: Callable[[], object], *, beyond: bool = True) -> int | None:
        """Return the peak memory of `act`, or what of it is beyond that allocated before; None on a CPU."""
        if not self.on_gpu:
            return None
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device) if beyond else 0
        act()
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device) - before

    def free(self) -> None:
        """Give memory that nothing refers to back to the device."""
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()

    def available_bytes(self) -> float:
        """Return the device's free memory, this process's own included, whose tensors an estimate counts too."""
        if not self.on_gpu:
            return math.inf
        free, _ = torch.cuda.mem_get_info(self.device)
        return float(free + torch.cuda.memory_reserved(self.device))

    def fitting(self, config: KosmosConfig, candidates: Sequence[Shares]) -> Iterator[tuple[KosmosBatch, Results]]:
        """Yield micro-batches on the device, the largest first, whose step is estimated to fit its free memory.

        The first one that runs is what counts: the caller goes on to the next one where an estimate was too low. Where no
        estimate can be made, all are yielded. With each comes what is known of its memory.
        """
        available = self.available_bytes()
        for shares in candidates:
            batch = self.batch(shares)
            (B, T), n_images, n_targets = batch.tokens.shape, len(batch.images), len(batch.loss_at)
            sizes = MicroBatch(rows=B, seq_len=T, n_images=n_images, n_targets=n_targets)
            setting = Setting(batch=sizes, device=self.device.type, precision="bf16-mixed")  # type: ignore[arg-type]
            known: Results = {"rows": dict(shares), "available bytes": available}
            try:
                memory = estimate(config, setting)
            except EstimateError as error:
                yield batch.to(self.device), known | {"estimate": str(error)}
                continue
            if memory.needed <= available:
                yield batch.to(self.device), known | {"estimated bytes": memory.total}

    # ---- models and batches

    def compiled(self, function: Any) -> Any:
        """Compile with static shapes; at tiny sizes or on a CPU return the function as it is."""
        return torch.compile(function, dynamic=False) if self.use_compile else function

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16)

    def config(self, **decoder: Any) -> KosmosConfig:
        """Return the paper's model, or a tiny one; without dropout by default."""
        s = self.sizes
        fields: dict[str, Any] = {
            "vocab_size": s.vocab,
            "dim": s.dim,
            "n_layers": s.n_layers,
            "n_heads": s.n_heads,
            "ffn_dim": 4 * s.dim,
            "max_seq_len": s.seq_len,
            "dropout_rate": 0.0,
            "attention_dropout_rate": 0.0,
        }
        tower = s.tower if isinstance(s.tower, str) else dict(s.tower)
        return KosmosConfig(
            vision=VisionConfig(architecture=tower, pretrained=None, image_size=s.image_size),
            connector=ConnectorConfig(n_heads=s.n_heads, attention_dropout_rate=0.0),
            decoder=DecoderConfig(**(fields | decoder)),
        )

    def model(self, config: KosmosConfig, *, fused: bool = True) -> Kosmos:
        """Return a model in training mode as bf16-mixed training has it on the device, fused as on a GPU, or plain.

        The last one is kept: a part that asks for the same model gets it, compiled as it is.
        """
        fuses = fused and self.use_compile
        if self._model and (self._model[0][0].config, self._model[0][1]) == (config, fuses):
            return self._model[0][0]
        self.drop_model()
        model = drawn(config, self.device).train()
        if fuses:
            model.compile_blocks()
        # As KosmosLit does under bf16-mixed: frozen matrices of the tower are cast once, not at each use.
        if (round_frozen := getattr(model.vision, "round_frozen", None)) is not None:
            round_frozen(torch.bfloat16)
        self._model.append((model, fuses))
        return model

    def drop_model(self) -> None:
        """Free the model that is kept, and the compiled variants of its layers, of which torch allows some eight."""
        self._model.clear()
        torch.compiler.reset()
        self.free()

    def synthetic(self) -> SyntheticBatches:
        s = self.sizes
        return SyntheticBatches(
            SpecialTokens.for_pieces(s.vocab - 128), ConnectorConfig().n_latents, s.image_size, s.seq_len
        )

    def batch(self, shares: Shares) -> KosmosBatch:
        """Return a micro-batch in host memory, with the given number of rows of each kind."""
        synthetic, draw = self.synthetic(), np.random.default_rng(0)
        return synthetic.batch([row for kind, n in shares.items() for row in synthetic.rows(kind, n, draw)])

    def work(self, config: KosmosConfig, batch: KosmosBatch, seconds: float) -> Results:
        """Return the rates of a training step over real positions, by both counts of operations."""
        flops = ModelFlops(config).training(Work.of_batch(batch))
        peak = peak_flops(torch.cuda.get_device_name(self.device), "bf16") if self.on_gpu else None
        rate = flops.total / seconds
        return {
            "seconds": seconds,
            "positions": batch.n_real,
            "tokens/s": batch.n_real / seconds,
            "images/s": len(batch.images) / seconds,
            "padding": 1 - batch.n_real / batch.tokens.numel(),
            "TFLOP/s": rate / 1e12,
            "TFLOP/s, full attention": flops.full / seconds / 1e12,
            "of MM": rate / self.matmul_rate,
            "of peak": rate / peak if peak else None,
        }

    # ---- profiles

    def explain(self, act: Callable[[], object], verdicts: Mapping[str, Results], n_rows: int = 40) -> Results:
        """Return the kernels that take most of the time of `act`, which is warm, if a verdict is missed and time is left.

        The whole table is written to a file.
        """
        missed = [name for name, v in verdicts.items() if not v["reached"]]
        if not (missed or self.always_profiles):
            return {}
        if self.left() < PROFILE_SECONDS:
            return {"profile": f"skipped: {self.left():.0f} s left"}
        self.report({"verdicts": dict(verdicts)})
        try:
            return {"profile": self._kernels(act, n_rows)}
        except Exception as error:  # what was measured must not be lost for its explanation
            if is_fatal(error):
                raise
            return {"profile": f"failed: {first_line(error)}"}

    def _kernels(self, act: Callable[[], object], n_rows: int) -> list[Results]:
        with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.on_gpu else [])]) as trace:
            act()
            if self.on_gpu:
                torch.cuda.synchronize(self.device)
        events, by = trace.key_averages(), "self_device_time_total" if self.on_gpu else "self_cpu_time_total"
        if self.tables is not None:
            path = self.tables.with_name(f"{self.tables.name}.{self.part}.txt")
            path.write_text(events.table(sort_by=by, row_limit=n_rows, max_name_column_width=80) + "\n", encoding="utf-8")
        kind = DeviceType.CUDA if self.on_gpu else DeviceType.CPU
        # Compiled graphs are annotated: such a range would count its kernels again.
        kernels = [e for e in events if e.device_type == kind and not e.is_user_annotation and getattr(e, by) > 0]
        times = {e.key: (getattr(e, by), e.count) for e in kernels}
        total = sum(time for time, _ in times.values())
        top = sorted(times.items(), key=lambda item: -item[1][0])[:n_rows]
        return [
            {"kernel": name[:160], "ms": round(time / 1000, 3), "share": round(time / total, 4), "calls": count}
            for name, (time, count) in top
        ]


def drawn(config: KosmosConfig, device: torch.device, seed: int = 0) -> Kosmos:
    """Return a model whose weights are drawn on the device, which takes a GPU a second and a CPU half a minute.

    Distributions are those of `Kosmos.create`, the numbers are others; of the tower, all matrices are normal with the
    variance that keeps activations at their scale.
    """
    model = meta_model(config).to_empty(device=device)
    torch.manual_seed(seed)
    with torch.no_grad():
        # What nothing below draws leaves NaN in every loss, instead of what the memory held before.
        for parameter in model.parameters():
            parameter.fill_(math.nan)
        for module in model.vision.modules():
            for name, parameter in module.named_parameters(recurse=False):
                _draw_tower(module, name, parameter)
        model.init()
    return model


def _draw_tower(module: nn.Module, name: str, parameter: Tensor) -> None:
    if parameter.ndim > 1:
        nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    elif isinstance(module, nn.LayerNorm) and name == "weight":
        nn.init.ones_(parameter)
    elif name == "class_embedding":
        nn.init.normal_(parameter, std=parameter.numel() ** -0.5)
    else:
        nn.init.zeros_(parameter)


def first_line(error: BaseException) -> str:
    """Return an error's type and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def is_fatal(error: BaseException) -> bool:
    """Return whether an error leaves a process without its device: all later calls of CUDA fail too."""
    return isinstance(error, torch.AcceleratorError) or "CUDA error" in str(error)


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


def verdict(value: float, accept: float, goal: float, *, at_most: bool = False) -> Results:
    """Compare one value with its thresholds; `share` is the part of the accepted value that it reaches."""
    share = accept / value if at_most and value else value / accept
    reached = bool(value <= accept if at_most else value >= accept)
    return {
        "value": value,
        "at most" if at_most else "at least": accept,
        "goal": goal,
        "reached": reached,
        "verdict": "reached" if reached else f"missed: {share:.2f} of the threshold",
    }


def measured(results: Mapping[str, Results], metric: str) -> dict[str, float]:
    """Return the values of one metric, by variant, without the variants that lack it."""
    return {name: result[metric] for name, result in results.items() if result.get(metric) is not None}


def best(results: Mapping[str, Results], metric: str) -> float:
    """Return the largest value of a metric over the variants that have it.

    Raises: RuntimeError with every variant's error if none has.
    """
    values = measured(results, metric)
    if not values:
        raise RuntimeError("; ".join(f"{name}: {r.get('error', r.get('skipped'))}" for name, r in results.items()))
    return max(values.values())


def tiny_bench(device: str = "cpu") -> Bench:
    """Return a bench of tiny sizes, to check that everything runs."""
    return replace(Bench(torch.device(device), TINY), n_steps=2, n_warm_up=1)
