"""Quotas are read from files as Linux has them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kosmos_lit.checks import cpus
from kosmos_lit.checks.cpus import quotas, shared_cpus


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")


MEMBERSHIP = {
    2: "0::/jobs/7",
    1: "9:name=systemd:/\n3:cpuset:/elsewhere\n2:cpu,cpuacct:/jobs/7\n0::/",
}


@pytest.mark.parametrize(
    ("version", "files", "expected"),
    [
        (2, {"jobs/7/cpu.max": "150000 100000"}, [2]),
        (2, {"jobs/7/cpu.max": "max 100000", "jobs/cpu.max": "300000 100000"}, [3]),
        (2, {"jobs/7/cpu.max": "1000 100000", "jobs/cpu.max": "70000 10000"}, [1, 7]),
        (2, {"cpu.max": "500000 100000"}, [5]),  # a container that sees the host's path
        (2, {"jobs/7/cpu.max": "max 100000"}, []),
        (1, {"cpu/jobs/7/cpu.cfs_quota_us": "250000", "cpu/jobs/7/cpu.cfs_period_us": "50000"}, [5]),
        (1, {"cpu/cpu.cfs_quota_us": "110000", "cpu/cpu.cfs_period_us": "100000"}, [2]),
        (1, {"cpu/jobs/7/cpu.cfs_quota_us": "-1", "cpu/jobs/7/cpu.cfs_period_us": "100000"}, []),
        (1, {"cpuset/elsewhere/cpu.max": "100000 100000"}, []),
    ],
)
def test_quotas_are_those_of_the_group_and_of_all_above(
    version: int, files: dict[str, str], expected: list[int], tmp_path: Path
) -> None:
    write(tmp_path, {"membership": MEMBERSHIP[version]} | {f"mount/{name}": text for name, text in files.items()})

    assert list(quotas(tmp_path / "membership", tmp_path / "mount")) == expected


def test_a_system_without_control_groups_has_no_quota(tmp_path: Path) -> None:
    assert list(quotas(tmp_path / "membership", tmp_path / "mount")) == []


@pytest.mark.parametrize(("limits", "expected"), [([], 11), ([3, 2, 13], 2), ([64], 11)])
def test_a_quota_makes_cpus_fewer_and_never_more(limits: list[int], expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpus, "quotas", lambda *_: iter(limits))
    monkeypatch.setattr(os, "cpu_count", lambda: 11)

    assert shared_cpus() == expected
