"""Training on CPUs: how many threads, and whether 16 bits are worth it.

Loader processes have one thread each, by PyTorch's own doing.
"""

from __future__ import annotations

import os

import torch
from lightning.pytorch.utilities import rank_zero_warn


def settle(n_processes: int, dtype: torch.dtype) -> None:
    """Share the cores out among this machine's processes, and say so if the run's precision makes it slower.

    The number of threads that OMP_NUM_THREADS asks for is left as it is; Lightning sets it for processes that it starts,
    Slurm does not.
    """
    if n_processes > 1 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(threads_of(n_processes, os.cpu_count() or 1, torch.get_num_threads()))
    if dtype == torch.bfloat16 and not multiplies_bf16():
        rank_zero_warn(
            "trainer.precision: this CPU has no instructions for bfloat16 (AVX512_BF16 or AMX), so bf16-mixed is slower "
            "than 32-true here"
        )


def threads_of(n_processes: int, n_cores: int, n_now: int) -> int:
    """Return how many of a machine's cores each of its processes should use: its share, but no more than it may."""
    return max(1, min(n_now, n_cores // n_processes))


def multiplies_bf16() -> bool:
    """Return whether this CPU has instructions for products in bfloat16; True where PyTorch does not say."""
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    found = [getattr(torch.cpu, name) for name in checks if hasattr(torch.cpu, name)]
    is_x86 = torch.backends.cpu.get_cpu_capability().startswith(("AVX", "DEFAULT", "NO AVX"))
    return not found or not is_x86 or any(check() for check in found)
