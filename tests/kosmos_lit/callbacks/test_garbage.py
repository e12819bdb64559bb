"""The garbage collector runs on its schedule, changes nothing, and is as before when training is over."""

from __future__ import annotations

import gc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kosmos_lit.callbacks import GarbageCollection
from kosmos_lit.cli import main
from kosmos_lit.lit import KosmosLit
from tests.cli_runs import losses, tiny_run


class FakeCollector:
    """Python's `gc` as far as the callback uses it, with a record of what is asked of it."""

    def __init__(self, *, is_enabled: bool = True, n_frozen: int = 0) -> None:
        self.is_enabled, self.n_frozen, self.n_collections = is_enabled, n_frozen, 0

    def isenabled(self) -> bool:
        return self.is_enabled

    def enable(self) -> None:
        self.is_enabled = True

    def disable(self) -> None:
        self.is_enabled = False

    def collect(self) -> None:
        self.n_collections += 1

    def get_freeze_count(self) -> int:
        return self.n_frozen

    def freeze(self) -> None:
        self.n_frozen += 7

    def unfreeze(self) -> None:
        self.n_frozen = 0


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> FakeCollector:
    fake = FakeCollector()
    monkeypatch.setattr("kosmos_lit.callbacks.garbage.gc", fake)
    return fake


TRAINER: Any = SimpleNamespace(global_step=4)


def test_it_collects_at_its_steps_and_after_validations_only(collector: FakeCollector) -> None:
    callback, trainer = GarbageCollection(every_n_steps=3), SimpleNamespace(global_step=4)
    arguments: Any = (trainer, None)

    callback.on_train_start(*arguments)
    assert not collector.is_enabled
    assert collector.n_frozen == 7
    counts = [collector.n_collections]
    for step in (4, 5, 5, 6, 6, 7, 8, 9):  # a step ends with its last micro-batch
        trainer.global_step = step
        callback.on_train_batch_end(*arguments)
        counts.append(collector.n_collections)
    callback.on_validation_end(*arguments)
    counts.append(collector.n_collections)
    callback.on_train_end(*arguments)
    callback.on_validation_end(*arguments)

    assert counts == [1, 1, 1, 1, 2, 2, 2, 2, 3, 4]
    assert collector.n_collections == 4
    assert collector.is_enabled
    assert collector.n_frozen == 0


def test_without_a_schedule_python_decides(collector: FakeCollector) -> None:
    GarbageCollection(every_n_steps=None).on_train_start(TRAINER, TRAINER)

    assert collector.is_enabled
    assert collector.n_collections == 0


def test_what_others_have_turned_off_or_frozen_stays_so(collector: FakeCollector) -> None:
    callback, collector.is_enabled = GarbageCollection(), False
    callback.on_train_start(TRAINER, TRAINER)
    callback.on_train_end(TRAINER, TRAINER)
    assert not collector.is_enabled

    collector.is_enabled, collector.n_frozen = True, 5
    callback.on_train_start(TRAINER, TRAINER)
    assert (collector.is_enabled, collector.n_frozen) == (False, 5)
    callback.on_train_end(TRAINER, TRAINER)
    assert (collector.is_enabled, collector.n_frozen) == (True, 5)


def test_a_run_s_losses_are_the_same_with_and_without_a_schedule(
    tmp_path: Path, tiny_world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    enabled: list[bool] = []
    step = KosmosLit.training_step

    def recorded(*args: Any) -> Any:
        enabled.append(gc.isenabled())
        return step(*args)

    monkeypatch.setattr(KosmosLit, "training_step", recorded)
    for name, every in (("scheduled", "2"), ("off", "null")):
        assert main(tiny_run("fit", tmp_path / name, tiny_world, f"--garbage_collection.every_n_steps={every}")) == 0

    assert enabled == [False] * 12 + [True] * 12
    assert losses(tmp_path / "scheduled") == losses(tmp_path / "off")
    assert gc.isenabled()


def test_after_a_failed_run_the_collector_is_on_again(
    tmp_path: Path, tiny_world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    was_frozen = gc.get_freeze_count() > 0  # the tests' own setup freezes what exists before them

    def fails(*_: Any) -> None:
        raise RuntimeError("in the middle")

    monkeypatch.setattr(KosmosLit, "training_step", fails)
    with pytest.raises(RuntimeError, match="in the middle"):
        main(tiny_run("fit", tmp_path, tiny_world))

    assert gc.isenabled()
    assert (gc.get_freeze_count() > 0) == was_frozen


def test_a_schedule_of_no_steps_is_refused(tmp_path: Path, tiny_world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(tiny_run("fit", tmp_path, tiny_world, "--garbage_collection.every_n_steps=0")) == 2

    assert "garbage_collection.every_n_steps must be positive, or null, got 0" in capsys.readouterr().err
