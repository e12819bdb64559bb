"""Devices by their usual names: memory, peak arithmetic rate, and bandwidth to other devices."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import torch

from kosmos_lit.checks.memory import device_memory
from kosmos_lit.costs.peaks import Precision, peak_flops
from kosmos_lit.errors import UserError

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
"""By the name that `--device` takes: the name that `peak_flops` knows, and the bytes that CUDA reports, which are somewhat
fewer than advertised."""
LINKS: dict[str, tuple[float, float]] = {
    "h100": (450e9, 50e9),
    "h200": (450e9, 50e9),
    "b200": (900e9, 50e9),
    "a100-80": (300e9, 25e9),
    "a100-40": (300e9, 25e9),
    "v100-32": (150e9, 12.5e9),
    "mi300x": (448e9, 50e9),
}
"""Nominal bytes a second in each direction: to devices of the same node (NVLink, Infinity Fabric) by the devices' data
sheets, and of a network as in their vendors' own machines, with a port of 400, 200 or 100 Gbit/s for each device."""
PCIE = (32e9, 12.5e9)
"""The same for all other devices: PCIe 4 with 16 lanes, and 100 Gbit/s."""
UNITS = {"GB": 1e9, "GIB": GIB, "TB": 1e12, "MB": 1e6, "": 1e9}


@dataclass(frozen=True)
class Device:
    """The kind of device that a plan is for."""

    name: str
    memory: float | None
    """Bytes; None: unknown."""
    peak: float | None
    """FLOP/s in the run's precision; None: unknown."""
    share: float
    """Share of the peak that the run is assumed to reach."""
    peak_fp8: float | None = None
    """FLOP/s of products in 8 bits; None: unknown, or not supported."""
    within_node: float | None = None
    """Bytes a second in each direction to devices of the same node; None: unknown."""
    between_nodes: float | None = None
    """The same to devices of other nodes."""

    def peak_of_blocks(self, fp8: bool) -> float:
        """Return the known peak, in FLOP/s, of products with the layers' matrices."""
        assert self.peak is not None
        return self.peak_fp8 if fp8 and self.peak_fp8 is not None else self.peak


def find_device(
    name: str | None,
    memory: str | None,
    peak: float | None,
    share: float,
    precision: str,
    *,
    on_cpu: bool,
    tf32: bool = False,
    links: tuple[float | None, float | None] = (None, None),
) -> Device:
    """Return the device of a plan.

    Args:
        name: a key of `DEVICES`; None: this machine for a run on the CPU, else an H100.
        memory: a size such as 80GB that replaces the device's.
        peak: TFLOP/s that replace the device's.
        share: of the peak, assumed to be reached.
        precision: of the run, by Lightning's name.
        on_cpu: whether the run is on a CPU.
        tf32: whether float32 matrices are multiplied in TF32.
        links: GB/s within a node and between nodes that replace the device's.

    Raises: UserError for an unknown device, or for a memory, peak, share or bandwidth that is no valid number.
    """
    for option, value in zip(("node_gb_s", "network_gb_s"), links, strict=True):
        if value is not None and not value > 0:
            raise UserError(f"plan: --{option} must be positive, in GB/s, got {value:g}")
    device = _find_device(name, memory, peak, share, precision, on_cpu=on_cpu, tf32=tf32)
    nominal = LINKS.get(device.name, PCIE) if device.name in DEVICES else (None, None)
    within, between = (default if value is None else value * 1e9 for value, default in zip(links, nominal, strict=True))
    return replace(device, within_node=within, between_nodes=between)


def _find_device(
    name: str | None, memory: str | None, peak: float | None, share: float, precision: str, *, on_cpu: bool, tf32: bool
) -> Device:
    if name is not None and name not in DEVICES:
        raise UserError(f"plan: no device {name!r}; there are {', '.join(DEVICES)}, or --memory 80GB --peak 989")
    # Written so that NaN is refused too.
    if not 0 < share <= 1:
        raise UserError(f"plan: --peak_share must lie in (0, 1], got {share:g}")
    if peak is not None and not peak > 0:
        raise UserError(f"plan: --peak must be positive, in TFLOP/s, got {peak:g}")
    memory_bytes = None if memory is None else parse_bytes(memory)
    flops = None if peak is None else peak * 1e12
    if on_cpu and name is None:
        return Device("cpu", memory_bytes or device_memory(torch.device("cpu")), flops, share)
    # The memory alone does not tell which device it is, so the peak is unknown unless set.
    if name is None and memory_bytes is not None:
        return Device("device", memory_bytes, flops, share)
    name = name or "h100"
    product, size = DEVICES[name]
    # Lightning's names begin with the format: "bf16-mixed", "16-mixed".
    kind: Precision = {"bf16": "bf16", "16": "fp16"}.get(precision.split("-")[0], "tf32" if tf32 else _float32_format())  # type: ignore[assignment]
    peak_fp8 = None if flops else peak_flops(product, "fp8")  # a peak that is given stands for all products
    return Device(name, memory_bytes or size, flops or peak_flops(product, kind), share, peak_fp8)


def _float32_format() -> Precision:
    """Return the format in which PyTorch multiplies float32 matrices, by its current setting."""
    return "fp32" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def parse_bytes(text: str) -> float:
    """Return the bytes that 80GB, 80GiB or 80 (gigabytes) stands for.

    Raises: UserError if the text is no size, or 0.
    """
    # A number, then any of K, M, G, T, perhaps "I", perhaps "B"; UNITS decides which of these are sizes.
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?B?)\s*", text.upper())
    if match is None or match[2] not in UNITS or not float(match[1]):
        raise UserError(f"plan: --memory {text} is no size; write 80GB or 80GiB")
    return float(match[1]) * UNITS[match[2]]
