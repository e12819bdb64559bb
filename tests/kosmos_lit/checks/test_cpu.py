import warnings

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from kosmos_lit.checks import cpu as processor
from kosmos_lit.checks.cpu import settle, threads_of


@pytest.mark.parametrize(
    ("n_processes", "n_cores", "n_now", "expected"), [(2, 8, 8, 4), (3, 8, 8, 2), (4, 2, 2, 1), (2, 64, 3, 3)]
)
def test_processes_share_the_cores(n_processes, n_cores, n_now, expected):
    assert threads_of(n_processes, n_cores, n_now) == expected


def test_threads_are_set_where_nobody_asked_for_a_number(monkeypatch):
    asked: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(processor.os, "cpu_count", lambda: 8)
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    settle(2, torch.float32)
    monkeypatch.delenv("OMP_NUM_THREADS")
    settle(1, torch.float32)
    settle(2, torch.float32)
    assert asked == [4]


def test_bf16_on_a_cpu_without_it_is_said_with_the_reason(monkeypatch):
    monkeypatch.setattr(processor, "multiplies_bf16", lambda: False)
    with pytest.warns(UserWarning, match="no instructions for bfloat16 .*, so bf16-mixed is slower than 32-true here"):
        settle(1, torch.bfloat16)


@pytest.mark.parametrize(("has_it", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_nothing_is_said_where_nothing_is_lost(has_it, dtype, monkeypatch):
    monkeypatch.setattr(processor, "multiplies_bf16", lambda: has_it)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        settle(1, dtype)


class Threads(Dataset[int]):
    def __len__(self) -> int:
        return 1

    def __getitem__(self, _: int) -> int:
        return torch.get_num_threads()


def test_a_loaders_process_has_one_thread():
    assert [int(n) for n in DataLoader(Threads(), num_workers=1)] == [1]
