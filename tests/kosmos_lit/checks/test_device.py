import warnings

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from kosmos_lit.checks import device as checks
from kosmos_lit.checks.device import configure_cpu, threads_per_process


@pytest.mark.parametrize(
    ("n_processes", "n_cores", "n_current", "expected"), [(2, 8, 8, 4), (3, 8, 8, 2), (4, 2, 2, 1), (2, 64, 3, 3)]
)
def test_processes_share_the_cores(n_processes, n_cores, n_current, expected):
    assert threads_per_process(n_processes, n_cores, n_current) == expected


@pytest.fixture
def settings(monkeypatch):
    """The numbers of threads that are set, on a machine of 8 CPUs."""
    numbers: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", numbers.append)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(checks, "shared_cpus", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    return numbers


def test_threads_are_set_where_the_environment_sets_none(settings, monkeypatch):
    configure_cpu(2, torch.float32)
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    configure_cpu(2, torch.float32)
    assert settings == [4]


def test_one_process_keeps_the_threads_that_it_starts_with(settings):
    configure_cpu(1, torch.float32)
    assert settings == []


def test_one_process_has_no_more_threads_than_its_container_has_cpus(settings, monkeypatch):
    monkeypatch.setattr(checks, "shared_cpus", lambda: 2)
    configure_cpu(1, torch.float32)
    assert settings == [2]


def test_bf16_on_a_cpu_without_it_warns_with_the_reason(monkeypatch):
    monkeypatch.setattr(checks, "has_bf16_instructions", lambda: False)
    with pytest.warns(UserWarning, match="no instructions for bfloat16 .*, so bf16-mixed is slower than 32-true on it"):
        configure_cpu(1, torch.bfloat16)


@pytest.mark.parametrize(("has_it", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_a_precision_that_loses_no_speed_warns_of_nothing(has_it, dtype, monkeypatch):
    monkeypatch.setattr(checks, "has_bf16_instructions", lambda: has_it)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        configure_cpu(1, dtype)


class Threads(Dataset[int]):
    def __len__(self) -> int:
        return 1

    def __getitem__(self, _: int) -> int:
        return torch.get_num_threads()


def test_a_loader_process_has_one_thread():
    assert [int(n) for n in DataLoader(Threads(), num_workers=1)] == [1]
