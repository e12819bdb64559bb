"""The command line sets up how OpenMP's threads wait before anything loads OpenMP."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from unittest import mock

import pytest

from kosmos_lit.cli import SPIN_COUNT, set_spin_count
from tests.cli_runs import ROOT


def spin_counts(setting: Mapping[str, str]) -> set[int]:
    """Return what all copies of libgomp that `fit` loads have read from their environment, as they print it."""
    environment = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    end = subprocess.run(
        [sys.executable, "main.py", "fit", "--help"],
        cwd=ROOT,
        env=environment | {"OMP_DISPLAY_ENV": "verbose"} | setting,
        text=True,
        capture_output=True,
        check=True,
    )
    return {int(count) for count in re.findall(r"GOMP_SPINCOUNT = '(\d+)'", end.stderr)}


@pytest.mark.skipif(sys.platform != "linux", reason="PyTorch's wheels for other systems have another OpenMP than libgomp")
@pytest.mark.parametrize(("setting", "expected"), [({}, SPIN_COUNT), ({"GOMP_SPINCOUNT": "77"}, 77)])
def test_openmp_gets_the_spin_count_unless_the_user_sets_one(setting: dict[str, str], expected: int) -> None:
    assert spin_counts(setting) == {expected}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({}, {"GOMP_SPINCOUNT": str(SPIN_COUNT)}),
        ({"OMP_NUM_THREADS": "3"}, {"OMP_NUM_THREADS": "3", "GOMP_SPINCOUNT": str(SPIN_COUNT)}),
        # A count would win over the policy, so none is set beside it.
        ({"OMP_WAIT_POLICY": "active"}, {"OMP_WAIT_POLICY": "active"}),
        ({"GOMP_SPINCOUNT": "0"}, {"GOMP_SPINCOUNT": "0"}),
    ],
)
def test_the_users_own_setting_stays(before: dict[str, str], after: dict[str, str]) -> None:
    with mock.patch.dict(os.environ, before, clear=True):
        set_spin_count()
        assert dict(os.environ) == after
