"""benchmarks/loop.py trains with and without Lightning on the same batches."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.loop import MODELS, TRAINERS, Loop, compare


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Lightning's advice on logging and loaders
def test_each_loop_is_timed(tmp_path: Path) -> None:
    lines = compare(Loop(MODELS["least"], tmp_path, n_steps=3), n_rounds=1)

    assert [line["loop"] for line in lines] == ["bare", *TRAINERS]
    assert all(line["CPU ms a step"] > 0 and line["clock ms a step"] > 0 for line in lines)
    assert lines[0]["clock ratio"] == 1.0
