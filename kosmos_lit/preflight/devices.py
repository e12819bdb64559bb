"""Devices by the names that people give them: their memory, and what they compute at most."""

from __future__ import annotations

import re

import torch

from kosmos_lit.checks.memory import device_memory
from kosmos_lit.costs.peaks import Precision, peak_flops
from kosmos_lit.errors import UserError
from kosmos_lit.preflight.estimates import Device

GIB = 1 << 30
DEVICES: dict[str, tuple[str, float]] = {
    "h100": ("H100 HBM3", 79.2 * GIB),
    "h200": ("H200", 139.8 * GIB),
    "b200": ("B200", 178.4 * GIB),
    "a100-80": ("A100", 79.2 * GIB),
    "a100-40": ("A100", 39.4 * GIB),
    "l40s": ("L40S", 44.4 * GIB),
    "a40": ("A40", 44.4 * GIB),
    "l4": ("L4", 22.0 * GIB),
    "rtx-4090": ("RTX 4090", 23.5 * GIB),
    "rtx-3090": ("RTX 3090", 23.6 * GIB),
    "v100-32": ("V100 SXM2", 31.7 * GIB),
    "mi300x": ("MI300X", 191.4 * GIB),
}
"""Name that `peak_flops` knows, and the bytes that CUDA reports: somewhat less than is on the box."""
UNITS = {"GB": 1e9, "GIB": GIB, "TB": 1e12, "MB": 1e6, "": 1e9}


def find_device(
    name: str | None, memory: str | None, peak: float | None, share: float, precision: str, *, on_cpu: bool
) -> Device:
    """Return the device of a plan.

    Args:
        name: a key of `DEVICES`; None: this machine's memory for a run on the CPU, else an H100.
        memory: wins over the device's, such as 80GB.
        peak: wins over the device's, TFLOP/s.
        share: of the peak that is reached.
        precision: Lightning's name of the run's.
        on_cpu: whether the run is on a CPU.

    Raises: UserError for a device that is not known, or a size that is none.
    """
    if name is not None and name not in DEVICES:
        raise UserError(f"plan: no device {name!r}; there are {', '.join(DEVICES)}, or --memory 80GB --peak 989")
    if not 0 < share <= 1:
        raise UserError(f"plan: --peak-share must lie in (0, 1], got {share:g}")
    if peak is not None and not peak > 0:
        raise UserError(f"plan: --peak must be positive, in TFLOP/s, got {peak:g}")
    given = None if memory is None else parse_bytes(memory)
    operations = None if peak is None else peak * 1e12
    if on_cpu and name is None:
        return Device("cpu", given or device_memory(torch.device("cpu")), operations, share)
    if name is None and given is not None:
        return Device("given", given, operations, share)
    chosen = name or "h100"
    official, size = DEVICES[chosen]
    kind: Precision = {"bf16": "bf16", "16": "fp16"}.get(precision.split("-")[0], _single())  # type: ignore[assignment]
    return Device(chosen, given or size, operations or peak_flops(official, kind), share)


def _single() -> Precision:
    """Return what PyTorch multiplies float32 matrices in, as it is set."""
    return "fp32" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def parse_bytes(text: str) -> float:
    """Read 80GB, 80GiB or 80, which is gigabytes.

    Raises: UserError if it is none of these.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?B?)\s*", text.upper())
    if found is None or found[2] not in UNITS or not float(found[1]):
        raise UserError(f"plan: --memory {text} is no size; write 80GB or 80GiB")
    return float(found[1]) * UNITS[found[2]]
