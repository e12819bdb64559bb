"""How fast attention kernels are on a device, and which one `decoder.attention_kernel: auto` takes there.

A choice must be the same at every start of a run, so it follows from this table and not from timing at run time. A row says
where its figures come from: `ours` are those of `benchmarks/gpu`, all others are public and were measured with other code.
**None is ours yet.** Public figures leave out what our own code does around the kernel (a mask's form, padded lists of
documents), so that a kernel must be `MARGIN` times as fast as FlashAttention-2, which xformers runs, to take its place.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Within = Literal["own", "row"]
"""`decoder.document_attention`. `row`: whole rows of one length; `own`: documents of any lengths."""
MARGIN = 1.25
"""How many times as fast as xformers' kernel another one must be in public figures."""
HOPPER = (9, 0)


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """Times of kernels that were measured beside one another."""

    capability: tuple[int, int]
    """Of the CUDA device."""
    torch: tuple[int, int]
    """First version that the row holds for."""
    head_dims: tuple[int, int]
    """Narrowest and widest head that the row holds for."""
    within: Within
    seconds: dict[str, float]
    """Time of one forward and backward pass by kernel, in any unit: only their ratios count."""
    figures: str
    """As they were published or measured."""
    date: str
    """Year and month, and day where it is known."""
    source: str
    ours: bool = False
    """Whether `benchmarks/gpu` measured it."""


MEASUREMENTS = (
    Measurement(
        capability=HOPPER,
        torch=(2, 15),
        head_dims=(64, 64),
        within="row",
        # A backward pass has 2.5 times the operations of a forward one.
        seconds={"xformers": 1 / 262 + 2.5 / 264, "cudnn": 1 / 334 + 2.5 / 395},
        figures="H100, 2,048 positions, TFLOP/s: FlashAttention-2 262 forward (causal), 264 backward (full); cuDNN 334, 395",
        date="2024-07",
        source="FlashAttention-3 (arXiv 2407.08608), read off its plots",
    ),
    Measurement(
        capability=HOPPER,
        torch=(2, 15),
        head_dims=(8, 128),
        within="own",
        seconds={"xformers": 1 / 280, "cudnn": 1 / 60},
        figures="GH200, thousand tokens/s of a user's encoder by torch.nn.attention.varlen: FlashAttention 280, cuDNN 60",
        date="2026-06-20",
        source="github.com/pytorch/pytorch/issues/187770",
    ),
    Measurement(
        capability=HOPPER,
        torch=(2, 11),
        head_dims=(128, 128),
        within="own",
        seconds={"xformers": 774 + 1956, "flex": 722 + 1559},
        figures="Llama 3 8B, microseconds: FlashAttention-2 774 forward, 1,956 backward; FlexAttention 722, 1,559",
        date="2025-11-19",
        source="github.com/pytorch/torchtitan/pull/2000",
    ),
)


def faster_kernels(capability: tuple[int, int], torch: tuple[int, int], head_dim: int, within: Within) -> tuple[str, ...]:
    """Return the kernels that the measurement for a CUDA device puts before xformers, fastest first."""
    rows = [
        row
        for row in MEASUREMENTS
        if (row.capability, row.within) == (capability, within)
        and row.torch <= torch
        and row.head_dims[0] <= head_dim <= row.head_dims[1]
    ]
    if not rows:
        return ()
    # Our own figures come first, then those of the newest torch.
    row = max(rows, key=lambda row: (row.ours, row.torch, row.date))
    limit = row.seconds["xformers"] / (1 if row.ours else MARGIN)
    return tuple(sorted((k for k, seconds in row.seconds.items() if seconds < limit), key=row.seconds.__getitem__))
