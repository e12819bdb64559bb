"""Peak rates of devices: dense matrix products, in operations a second.

From NVIDIA's and AMD's data sheets and architecture papers, without the factor of two for sparse matrices. For GeForce
cards, 16-bit and fp8 products accumulate in float32, as PyTorch's do, at half the advertised rate.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

Precision = Literal["fp32", "tf32", "fp16", "bf16", "fp8"]


# Lightning has such a table too, but it gives an H200 the sparse rates and does not match its driver's name, and it takes
# an L40S for an L4.
@dataclass(frozen=True)
class Peak:
    """TFLOP/s of one device by the dtype of the factors; None: not supported, or no faster than float32."""

    fp32: float
    tf32: float | None
    fp16: float | None
    bf16: float | None
    fp8: float | None


_H100_SXM = Peak(66.9, 494.7, 989.4, 989.4, 1978.9)
_H100_NVL = Peak(60.0, 417.5, 835.5, 835.5, 1670.5)
PEAKS: dict[str, Peak] = {
    # HGX B200/B300 and GB200/GB300 NVL72 data sheets
    "gb300": Peak(80.0, 1250.0, 2500.0, 2500.0, 5000.0),
    "gb200": Peak(80.0, 1250.0, 2500.0, 2500.0, 5000.0),
    "b300": Peak(75.0, 1125.0, 2250.0, 2250.0, 4500.0),
    "b200": Peak(75.0, 1125.0, 2250.0, 2250.0, 4500.0),
    # H100 architecture paper; H100, H200 and GH200 data sheets
    "gh200": _H100_SXM,
    "h200 nvl": _H100_NVL,
    "h200": _H100_SXM,
    "h100 nvl": _H100_NVL,
    "h100 pcie": Peak(51.2, 378.0, 756.0, 756.0, 1513.0),
    "h100 hbm2e": Peak(51.2, 378.0, 756.0, 756.0, 1513.0),  # the same card under older drivers
    "h100 hbm3": _H100_SXM,
    "h100 sxm": _H100_SXM,  # as people call it
    "h800 hbm3": _H100_SXM,
    # A100, A30, A40, A10, L40S, L40 and L4 data sheets; Ada, GA102 and RTX Blackwell architecture papers
    "a100": Peak(19.5, 156.0, 312.0, 312.0, None),
    "a800": Peak(19.5, 156.0, 312.0, 312.0, None),
    "a30": Peak(10.3, 82.0, 165.0, 165.0, None),
    "a40": Peak(37.4, 74.8, 149.7, 149.7, None),
    "a10": Peak(31.2, 62.5, 125.0, 125.0, None),
    "rtx a6000": Peak(38.7, 77.4, 154.8, 154.8, None),
    "l40s": Peak(91.6, 183.0, 362.0, 362.0, 733.0),
    "l40": Peak(90.5, 90.5, 181.0, 181.0, 362.0),
    "l4": Peak(30.3, 60.0, 121.0, 121.0, 242.5),
    "rtx 6000 ada": Peak(91.1, 182.1, 364.2, 364.2, 728.5),
    "rtx 5090": Peak(104.8, 104.8, 209.5, 209.5, 419.0),
    "rtx 4090": Peak(82.6, 82.6, 165.2, 165.2, 330.3),
    "rtx 3090": Peak(35.6, 35.6, 71.0, 71.0, None),
    # V100 and T4 data sheets: no bfloat16 in their tensor cores
    "v100 sxm2": Peak(15.7, None, 125.0, None, None),
    "t4": Peak(8.1, None, 65.0, None, None),
    # CDNA 3 architecture paper
    "mi300x": Peak(163.4, 653.7, 1307.4, 1307.4, 2614.9),
}
"""By words of the device's name."""
VARIANTS = {"mig", "laptop", "ti", "d", "max"}
"""Words of a name that mean another device than the name without them, or a part of one."""


def peak_flops(device: str, precision: Precision) -> float | None:
    """Return the peak operations a second of a device by the name that CUDA gives it; None if it is unknown.

    `NVIDIA H100 80GB HBM3`, `H100 HBM3` and `h100 sxm` name the same device.
    """
    words = set(re.split(r"[^a-z0-9]+", device.lower()))
    matches = [name for name in PEAKS if set(name.split()) <= words]
    if not matches or words & VARIANTS:
        return None
    # The most specific name: an H200 NVL is no H200.
    rate: float | None = getattr(PEAKS[max(matches, key=len)], precision)
    return None if rate is None else rate * 1e12
