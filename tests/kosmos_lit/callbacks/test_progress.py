"""Progress lines of a run, on a terminal and in a file."""

from __future__ import annotations

import os
import shutil
from typing import Any

import pytest
import torch

from kosmos_lit.callbacks import Progress
from kosmos_lit.callbacks.progress import clock_time
from tests.kosmos_lit.callbacks.fake_run import FakeRun, Recorder
from tests.kosmos_lit.tiny_kosmos import batch_of, text_doc, tiny_config

METRICS = {"tokens_per_second": 12_345.6, "data_wait": 0.034, "seconds_left": 11_225.2, "peak_share": 0.613, "lr": 2e-4}


class Terminal:
    """A fake standard error that keeps its output, and gives the lines that a terminal would show."""

    def __init__(self, patch: pytest.MonkeyPatch, *, tty: bool = True, columns: int = 200) -> None:
        self.written, self._tty = "", tty
        patch.setattr("sys.stderr", self)
        patch.setattr(shutil, "get_terminal_size", lambda *_, **__: os.terminal_size((columns, 24)))

    def write(self, text: str) -> None:
        self.written += text

    def flush(self) -> None: ...

    def isatty(self) -> bool:
        return self._tty

    @property
    def lines(self) -> list[str]:
        return [line.split("\r\x1b[K")[-1] for line in self.written.split("\n")]


class ShownRun:
    """A fake run with a Progress callback."""

    def __init__(self, tower: str, metrics: dict[str, float] = METRICS, **fields: Any) -> None:
        self.run, self.module = FakeRun(**fields), Recorder(tiny_config(tower))
        self.run.trainer.callback_metrics = {name: torch.tensor(value) for name, value in metrics.items()}
        self.batch = batch_of([[text_doc(5)]], 11)
        self.module.step_loss.update(torch.full((6,), 2.5), self.batch)
        self.progress = Progress()
        self.progress.clock = self.run.clock
        self.progress.setup(self.run.trainer, self.module, "fit")
        self.progress.on_train_start(self.run.trainer, self.module)

    def step(self, takes: float = 1.0, ends: bool = True) -> None:
        self.run.micro_batch(self.progress, self.module, self.batch, takes=takes, ends=ends)


ON_TERMINAL = "loss 2.500  12,346 tokens/s  data wait 3%  3:07:05 left  61% of peak  lr 2.0e-04  text 2.500"
ROW = "loss 2.500 (text 2.500)  12,346 tokens/s  data wait 3%  3:07:05 left  61% of peak  lr 2.0e-04"


def test_a_file_gets_one_plain_line_a_row(kosmos_tower: str, monkeypatch: pytest.MonkeyPatch) -> None:
    file = Terminal(monkeypatch, tty=False)
    shown_run = ShownRun(kosmos_tower, max_steps=6_000, log_every_n_steps=3)
    for _ in range(7):
        shown_run.step()
    shown_run.progress.on_train_end()

    assert file.written == f"step 3/6,000  {ROW}\nstep 6/6,000  {ROW}\n"


def test_on_a_terminal_one_line_is_drawn_again_with_every_step(kosmos_tower: str, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal(monkeypatch)
    shown_run = ShownRun(kosmos_tower, max_steps=10, log_every_n_steps=3)
    seen = []
    for _ in range(5):
        shown_run.step()
        seen.append(terminal.lines[-1])

    assert seen[1] == "[##........] step 2/10  "
    assert seen[2] == f"[###.......] step 3/10  {ON_TERMINAL}"
    assert seen[4] == f"[#####.....] step 5/10  {ON_TERMINAL}"
    assert "\n" not in terminal.written


def test_a_terminal_is_not_drawn_on_at_every_one_of_many_quick_steps(
    kosmos_tower: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = Terminal(monkeypatch)
    shown_run = ShownRun(kosmos_tower, log_every_n_steps=1_000)
    for _ in range(64):
        shown_run.step(takes=1 / 64)

    assert 9 <= terminal.written.count("\r") <= 11


def test_micro_batches_of_one_step_show_it_once(kosmos_tower: str, monkeypatch: pytest.MonkeyPatch) -> None:
    file = Terminal(monkeypatch, tty=False)
    shown_run = ShownRun(kosmos_tower, log_every_n_steps=1)
    for ends in (False, False, True, False):
        shown_run.step(ends=ends)

    assert file.written == f"step 1/100  {ROW}\n"


def test_a_narrow_terminals_line_is_cut_to_fit(kosmos_tower: str, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal(monkeypatch, columns=51)
    shown_run = ShownRun(kosmos_tower, log_every_n_steps=1)
    shown_run.step()

    assert terminal.lines == [f"[..........] step 1/100  {ON_TERMINAL}"[:50]]


def test_a_terminal_of_eighty_columns_shows_loss_speed_and_data_wait(
    kosmos_tower: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = Terminal(monkeypatch, columns=80)
    shown_run = ShownRun(kosmos_tower, METRICS | {"tokens_per_second": 1_380_000.0}, log_every_n_steps=1, max_steps=300_000)
    shown_run.run.trainer.global_step = 123_455
    shown_run.step()

    assert terminal.lines[0].endswith("step 123,456/300,000  loss 2.500  1,380,000 tokens/s  data wait 3%")


def test_validation_losses_stay_on_the_terminal(kosmos_tower: str, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal(monkeypatch)
    shown_run = ShownRun(kosmos_tower, {"val/loss": 1.25, "val/loss/caption": 1.5, "loss": 9.0})
    shown_run.step()
    shown_run.progress.on_validation_end(shown_run.run.trainer, shown_run.module)
    shown_run.step()

    assert terminal.lines[0] == "step 1 validation  loss 1.250 (caption 1.500)"
    assert terminal.lines[1].startswith("[..........] step 2/100  loss 2.500")


def test_only_the_first_rank_prints(kosmos_tower: str, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal(monkeypatch)
    shown_run = ShownRun(kosmos_tower, METRICS | {"val/loss": 1.0}, is_global_zero=False, log_every_n_steps=1)
    shown_run.step()
    shown_run.progress.on_validation_end(shown_run.run.trainer, shown_run.module)
    shown_run.progress.on_train_end()

    assert terminal.written == ""


def test_a_run_without_throughput_shows_its_other_metrics(kosmos_tower: str, monkeypatch: pytest.MonkeyPatch) -> None:
    file = Terminal(monkeypatch, tty=False)
    shown_run = ShownRun(kosmos_tower, {"lr": 2e-4}, max_steps=-1, log_every_n_steps=1)
    shown_run.step()

    assert file.written == "step 1  loss 2.500 (text 2.500)  lr 2.0e-04\n"


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00"), (59.6, "1:00"), (3_599, "59:59"), (360_061, "100:01:01")])
def test_times_are_hours_minutes_and_seconds(seconds: float, text: str) -> None:
    assert clock_time(seconds) == text
