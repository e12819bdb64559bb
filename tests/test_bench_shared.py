"""benchmarks/shared.py measures runs that take turns beside busy processes."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.shared import DEFAULT, FIT, ONE_THREAD, Step, run, same_losses, table, verdicts
from tests.cli_runs import TINY


@pytest.mark.slow
def test_each_setting_is_measured_beside_each_number_of_busy_processes(tmp_path: Path, tiny_world: Path) -> None:
    results = run(tmp_path, tiny_world, Path(TINY), busy=[0, 1], spin_counts=[7], seconds=1.0, n_rounds=1)

    lines = results["speeds"]
    assert [(line["busy processes"], line["setting"]) for line in lines] == [
        (n, name) for n in (0, 1) for name in (FIT, DEFAULT, ONE_THREAD, "GOMP_SPINCOUNT=7")
    ]
    assert all(line["tokens/s"] > 0 for line in lines)
    assert results["equal losses"] >= 3


def test_ratios_are_those_of_the_same_round_and_have_their_bars() -> None:
    speeds = {
        (FIT, 0): [90.0, 45.0, 9.0],
        (DEFAULT, 0): [100.0, 50.0, 11.0],
        (ONE_THREAD, 0): [60.0, 30.0, 6.0],
        (FIT, 4): [28.0, 24.0, 36.0],
        (DEFAULT, 4): [3.0, 3.0, 3.0],
        (ONE_THREAD, 4): [60.0, 60.0, 60.0],
    }
    lines = table(speeds, [FIT, DEFAULT, ONE_THREAD], [0, 4])

    assert list(lines[0].values()) == [0, FIT, 45, 0.9, 1.5]
    results = [(line["busy processes"], line["ratio"], line["verdict"]) for line in verdicts(lines)]
    assert results == [(0, 0.9, "goal"), (4, 0.47, "MISSED")]


def test_losses_that_differ_in_a_bit_are_an_error() -> None:
    one, other = (1.5).hex(), (1.5 + 2**-52).hex()

    assert same_losses([Step(1.0, 5, one)] * 2, [Step(2.0, 5, one)] * 3) == 2
    with pytest.raises(RuntimeError, match=r"losses of step 1 differ: 1.5 and 1.5000000000000002"):
        same_losses([Step(1.0, 5, one)] * 2, [Step(2.0, 5, one), Step(3.0, 5, other)])
