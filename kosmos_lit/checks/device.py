"""The device of a run: its description, and the checks and settings before the first step."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.utilities import rank_zero_warn

from kosmos_lit.checks.cpus import shared_cpus
from kosmos_lit.config import DecoderConfig
from kosmos_lit.errors import UserError
from kosmos_lit.ops.fp8 import check_fp8
from kosmos_lit.ops.kernels import check_kernel


def check_device(trainer: L.Trainer, config: DecoderConfig, row_len: int, *, trains: bool) -> str:
    """Return the run's attention kernel, after making sure that its device supports what the config asks for.

    Sets the threads of a CPU run.

    Raises: UserError naming what a kernel or 8-bit training lacks on the device, and what would work.
    """
    device, dtype = trainer.strategy.root_device, compute_dtype(trainer.precision)
    kernel = check_kernel(
        config.attention_kernel,
        device,
        dtype,
        config.head_dim,
        config.attention_dropout_rate if trains else 0.0,
        within=config.document_attention,
        capability=torch.cuda.get_device_capability(device) if device.type == "cuda" else None,
    )
    if config.fp8 != "none" and trains:
        check_fp8(device, dtype, {"decoder.dim": config.dim, "decoder.ffn_dim": config.ffn_dim}, row_len)
    if device.type == "cpu":
        configure_cpu(trainer.num_devices, dtype)
    return kernel


def compute_dtype(precision: object) -> torch.dtype:
    """Return the dtype of matrix products and attention under a trainer's precision."""
    dtypes = {"bf16": torch.bfloat16, "16": torch.float16, "64": torch.float64}
    # "bf16-mixed", "16-true", 32 ...
    return dtypes.get(str(precision).split("-")[0], torch.float32)


def check_dtype(trainer: L.Trainer) -> None:
    """Make sure that the run's device computes in the run's precision.

    Raises: UserError naming the device, and a precision that works.
    """
    device = trainer.strategy.root_device
    if device.type != "cuda" or compute_dtype(trainer.precision) != torch.bfloat16:
        return
    # Emulation would be slower than float32.
    if not torch.cuda.is_bf16_supported(including_emulation=False):
        name = torch.cuda.get_device_name(device)
        raise UserError(f"trainer.precision is {trainer.precision}, but {name} has no bfloat16; use 32-true")


def check_backend(trainer: L.Trainer) -> None:
    """Make sure that several GPUs can exchange tensors, before they try.

    Raises: UserError if this build of PyTorch has no NCCL, and no other backend is chosen.
    """
    strategy = trainer.strategy
    if trainer.world_size == 1 or strategy.root_device.type != "cuda" or dist.is_nccl_available():
        return
    if getattr(strategy, "process_group_backend", None) is None:
        raise UserError(
            f"trainer.strategy: {trainer.world_size} GPUs need NCCL, which this build of PyTorch lacks; install PyTorch's "
            "own build for CUDA, or set trainer.devices and trainer.num_nodes to 1"
        )


def uses_compile(config: DecoderConfig, device: torch.device) -> bool:
    """Return whether torch.compile fuses the layers of a run on that device."""
    return device.type == "cuda" if config.compile is None else config.compile


# ---- CPU


def configure_cpu(n_processes: int, dtype: torch.dtype) -> None:
    """Divide the CPUs, or a container's quota, among the run's processes here; warn if its precision makes it slower."""
    # OMP_NUM_THREADS is the user's choice, or Lightning's for processes that it starts; Slurm sets none. Loader processes
    # have one thread each by PyTorch's default.
    n_current = torch.get_num_threads()
    n_threads = threads_per_process(n_processes, shared_cpus(), n_current)
    if n_threads != n_current and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(n_threads)
    if dtype == torch.bfloat16 and not has_bf16_instructions():
        rank_zero_warn(
            "trainer.precision: this CPU has no instructions for bfloat16 (AVX512_BF16 or AMX), so bf16-mixed is slower "
            "than 32-true on it"
        )


def threads_per_process(n_processes: int, n_cores: int, n_current: int) -> int:
    """Return a process's share of a machine's cores, at most its current number of threads."""
    return max(1, min(n_current, n_cores // n_processes))


def has_bf16_instructions() -> bool:
    """Return whether this CPU has instructions for products in bfloat16; True where PyTorch cannot tell."""
    # Private functions of torch that come and go between versions.
    probes = [getattr(torch.cpu, n, None) for n in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")]
    available = [probe for probe in probes if probe is not None]
    # Other architectures report VSX, Z VECTOR or SVE256.
    is_x86 = torch.backends.cpu.get_cpu_capability().startswith(("AVX", "DEFAULT", "NO AVX"))
    return not available or not is_x86 or any(probe() for probe in available)


# ---- description


def describe_device(device: torch.device) -> str:
    """Return a device's name and the versions of torch and Python, to stand beside what was measured on it."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{_cpu_name()}, {os.cpu_count()} cores"
    return f"{name}, torch {torch.__version__}, Python {platform.python_version()}"


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()  # Linux only
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
