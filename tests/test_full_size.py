"""The paper's full-size model takes a real optimizer step, in bfloat16, within 24 GB."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from benchmarks.full_size_step import measure


def _available() -> int:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


@pytest.mark.slow
@pytest.mark.skipif(_available() < 15 * 10**9, reason="needs 15 GB of free memory")
def test_the_full_size_model_takes_a_step(tmp_path: Path) -> None:
    metrics = measure(tmp_path)

    assert float(str(metrics["loss"])) == pytest.approx(math.log(64_007), abs=1.5)
    assert math.isfinite(float(str(metrics["grad_norm"])))
    assert int(str(metrics["peak_memory_bytes"])) < 20 * 10**9
