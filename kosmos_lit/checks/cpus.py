"""The CPUs that a machine's or container's processes share."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path


def shared_cpus() -> int:
    """Return the CPUs of this machine, or fewer where a quota (as of a container) allows less.

    CPUs that this process alone may not run on are not left out: a scheduler gives each process of a run others, and the
    threads that PyTorch starts with are at most those that its process may run on.
    """
    return min([os.cpu_count() or 1, *quotas(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))])


def quotas(membership: Path, mount: Path) -> Iterator[int]:
    """Yield the quotas on this process's control groups in CPUs, rounded up, as a part of a CPU is of use too.

    Args:
        membership: /proc/self/cgroup, whose lines are `0::PATH` (version 2) or `NUMBER:CONTROLLERS:PATH` (version 1).
        mount: /sys/fs/cgroup.

    Source: Linux's Documentation, admin-guide/cgroup-v2.rst (`cpu.max`) and scheduler/sched-bwc.rst (`cpu.cfs_quota_us`).
    """
    for line in _text(membership).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        root = mount / "cpu" if controllers else mount
        group = root / path.lstrip("/")
        # A limit holds for all groups below. In a container the path may be the host's: then the mount is its own group.
        for folder in (group, *group.parents):
            limit = _text(folder / "cpu.max") or " ".join(_text(folder / f"cpu.cfs_{n}_us") for n in ("quota", "period"))
            match limit.split():
                case [quota, period] if quota not in ("max", "-1"):
                    yield math.ceil(int(quota) / int(period))
            if folder == root:
                break


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:  # not Linux, or a group without a limit
        return ""
