"""What all parts measure with: a device, sizes, a clock, and a file that keeps what has been measured."""

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

from benchmarks.made_batches import Made
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
"""Of the paper's step."""
Figures = dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    """How large everything is."""

    matmul: int
    """Side of the square matrices whose product is the yardstick."""
    copy_bytes: int
    dim: int
    n_layers: int
    n_heads: int
    vocab: int
    seq_len: int
    rows: tuple[int, ...]
    """Rows of a micro-batch of text, to be tried one after another."""
    mixture: int
    """Times `SHARES` rows of a micro-batch of the mixture."""
    tower: str | Mapping[str, Any]
    side: int
    """Of images, in pixels."""
    image_chunks: tuple[int, ...]
    new_tokens: int

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads


FULL = Sizes(
    matmul=8192, copy_bytes=1 << 32, dim=2048, n_layers=24, n_heads=32, vocab=64_128, seq_len=2048, rows=(16, 32), mixture=2,
    tower="ViT-L-14-quickgelu", side=224, image_chunks=(128, 256, 512), new_tokens=128,
)  # fmt: skip
TINY = Sizes(
    matmul=64, copy_bytes=1 << 16, dim=32, n_layers=2, n_heads=2, vocab=1_200, seq_len=512, rows=(1, 2), mixture=1,
    tower={"embed_dim": 16, "vision_cfg": {"image_size": 224, "patch_size": 32, "width": 16, "layers": 2, "head_width": 8},
           "quick_gelu": True},
    side=224, image_chunks=(2, 3), new_tokens=4,
)  # fmt: skip


@dataclass
class Rig:
    """A device and what is measured on it."""

    device: torch.device
    sizes: Sizes = FULL
    n_steps: int = 20
    """Measurements of which the median is taken."""
    n_warm_up: int = 3
    matmul_rate: float = 0.0
    """Operations a second of a large bf16 product: MM, measured in the same run."""
    copy_rate: float = 0.0
    """Bytes a second, read and written."""
    found: dict[str, Figures] = field(default_factory=dict)
    """The figures of the parts before."""

    @property
    def tiny(self) -> bool:
        return self.sizes is TINY

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def fuses(self) -> bool:
        """Whether anything is compiled: not at tiny sizes, where all that is looked at is whether it runs."""
        return self.on_gpu and not self.tiny

    def seconds(self, act: Callable[[], object], n: int | None = None) -> float:
        """Return the median time of `act`, by the device's clock on a GPU, after a warm-up."""
        for _ in range(self.n_warm_up):
            act()
        taken = []
        if not self.on_gpu:
            for _ in range(n or self.n_steps):
                begun = time.perf_counter()
                act()
                taken.append(time.perf_counter() - begun)
            return statistics.median(taken)
        marks = [torch.cuda.Event(enable_timing=True) for _ in range((n or self.n_steps) + 1)]
        torch.cuda.synchronize(self.device)
        marks[0].record()
        for mark in marks[1:]:
            act()
            mark.record()
        torch.cuda.synchronize(self.device)
        return statistics.median(a.elapsed_time(b) / 1000 for a, b in pairwise(marks))

    def alternating(self, sides: Mapping[str, Callable[[], object]], n_rounds: int = 3) -> dict[str, float]:
        """Return the median of each side's medians over rounds in which they take turns."""
        taken: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(n_rounds):
            for name, side in sides.items():
                taken[name].append(self.seconds(side, max(1, self.n_steps // n_rounds + 1)))
        return {name: statistics.median(of_side) for name, of_side in taken.items()}

    def peak_bytes(self, act: Callable[[], object]) -> int | None:
        """Return the most memory that `act` takes beside what lies there already; None on a CPU."""
        if not self.on_gpu:
            return None
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        act()
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device) - before

    def compiled(self, function: Any) -> Any:
        """Compile with static shapes, where anything is compiled."""
        return torch.compile(function, dynamic=False) if self.fuses else function

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16)

    # ---- models and batches

    def config(self, **decoder: Any) -> KosmosConfig:
        """Return the paper's model, or a tiny one; without dropout unless asked for."""
        s = self.sizes
        fields: dict[str, Any] = {
            "vocab_size": s.vocab, "dim": s.dim, "n_layers": s.n_layers, "n_heads": s.n_heads, "ffn_dim": 4 * s.dim,
            "max_seq_len": s.seq_len, "dropout_rate": 0.0, "attention_dropout_rate": 0.0,
        }  # fmt: skip
        tower = s.tower if isinstance(s.tower, str) else dict(s.tower)
        return KosmosConfig(
            vision=VisionConfig(architecture=tower, pretrained=None, image_size=s.side),
            connector=ConnectorConfig(n_heads=s.n_heads, attention_dropout_rate=0.0),
            decoder=DecoderConfig(**(fields | decoder)),
        )

    def model(self, config: KosmosConfig, *, fused: bool = True) -> Kosmos:
        """Return a model in training mode on the device, in float32; fused as a run on a GPU has it, or plain."""
        model = Kosmos.create(config).to(self.device).train()
        if fused and self.fuses:
            model.fuse()
        return model

    def made(self) -> Made:
        s = self.sizes
        return Made(SpecialTokens.after(s.vocab - 128), ConnectorConfig().n_latents, s.side, s.seq_len)

    def batch(self, shares: Mapping[str, int]) -> KosmosBatch:
        """Return a micro-batch of so many rows of each kind, on the device."""
        made, draw = self.made(), np.random.default_rng(0)
        return made.batch([row for kind, n in shares.items() for row in made.rows(kind, n, draw)]).to(self.device)

    def work(self, config: KosmosConfig, batch: KosmosBatch, seconds: float) -> Figures:
        """Return the figures of a training step: rates by both counts, of real positions."""
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
    """Forward, backward, clipping and fused AdamW of a model on one micro-batch, in bf16 with float32 weights."""

    def __init__(self, rig: Rig, model: Kosmos, batch: KosmosBatch) -> None:
        self.rig, self.model, self.batch = rig, model, batch
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-5, fused=True)

    def __call__(self) -> None:
        with self.rig.autocast():
            loss, _ = self.model.loss(self.batch, 1 / self.batch.n_step_targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in self.trained if p.grad is not None], 2.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


def forget(*modules: nn.Module) -> None:
    """Drop gradients."""
    for module in modules:
        module.zero_grad(set_to_none=True)


class Record:
    """One JSON file, written anew after each part, so that a run that is cut off keeps what it has."""

    def __init__(self, path: Path | None, rig: Rig) -> None:
        self.path, self.rig = path, rig
        self.figures: Figures = {
            "machine": describe_device(rig.device), "tiny": rig.tiny, "steps": rig.n_steps, "parts": rig.found, "errors": {},
        }  # fmt: skip

    def take(self, name: str, part: Callable[[Rig], Figures]) -> None:
        """Measure a part and write it down; what goes wrong in it is written down too, and the next one can run."""
        begun = time.monotonic()
        try:
            found = part(self.rig)
        except Exception as error:  # noqa: BLE001  # whatever fails, the other parts are worth having
            self.figures["errors"][name] = f"{type(error).__name__}: {error}"
            traceback.print_exc()
        else:
            rates = {"MM, TFLOP/s": self.rig.matmul_rate / 1e12, "copy, GB/s": self.rig.copy_rate / 1e9}
            self.rig.found[name] = found | rates | {"took, s": round(time.monotonic() - begun, 1)}
        gc.collect()
        if self.rig.on_gpu:
            torch.cuda.empty_cache()
        self.write()

    def write(self) -> None:
        if self.path is not None:
            temporary = self.path.with_name(self.path.name + ".part")
            temporary.write_text(json.dumps(self.figures, indent=1) + "\n", encoding="utf-8")
            temporary.replace(self.path)


def attempts(sides: Mapping[str, Callable[[], Figures]]) -> dict[str, Figures]:
    """Return the figures of each side, or why it has none: a kernel may lack a device, a dtype or a library."""
    found: dict[str, Figures] = {}
    for name, side in sides.items():
        try:
            found[name] = side()
        except Exception as error:  # noqa: BLE001  # as above: the others are worth having
            found[name] = {"error": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}
    return found


def measured(found: Mapping[str, Figures], figure: str) -> dict[str, float]:
    """Return one figure of the sides that have it."""
    return {name: of_side[figure] for name, of_side in found.items() if of_side.get(figure) is not None}


def tiny_rig(device: str = "cpu") -> Rig:
    """Return what tests measure with."""
    return replace(Rig(torch.device(device), TINY), n_steps=2, n_warm_up=1)
