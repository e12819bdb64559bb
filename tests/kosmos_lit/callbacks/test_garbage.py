"""The garbage collector runs on its schedule, changes nothing, and is as before when training is over."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kosmos_lit.callbacks import GarbageCollection
from kosmos_lit.cli import main
from kosmos_lit.lit import KosmosLit
from tests.cli_runs import losses, tiny_run


@pytest.fixture
def collections(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """A list that grows with each collection that is asked for; the collector is left as it was."""
    asked: list[int] = []
    monkeypatch.setattr("kosmos_lit.callbacks.garbage.gc.collect", lambda *_: asked.append(1))
    yield asked
    gc.unfreeze()
    gc.enable()


def test_it_collects_at_its_steps_and_after_validations_only(collections: list[int]) -> None:
    callback, trainer, module = GarbageCollection(every_n_steps=3), SimpleNamespace(global_step=4), SimpleNamespace()

    callback.on_train_start(trainer, module)  # type: ignore[arg-type]
    assert not gc.isenabled()
    counts = [len(collections)]
    for step in (4, 5, 5, 6, 6, 7, 8, 9):  # two micro-batches of step 6 and of step 7
        trainer.global_step = step
        callback.on_train_batch_end(trainer)  # type: ignore[arg-type]
        counts.append(len(collections))
    callback.on_validation_end(trainer, module)  # type: ignore[arg-type]
    counts.append(len(collections))
    callback.on_train_end(trainer, module)  # type: ignore[arg-type]

    assert counts == [1, 1, 1, 1, 2, 2, 2, 2, 3, 4]
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0
    callback.on_validation_end(trainer, module)  # type: ignore[arg-type]
    assert len(collections) == 4


@pytest.mark.usefixtures("collections")
def test_a_collector_that_is_off_or_unscheduled_is_left_alone() -> None:
    trainer: Any = SimpleNamespace(global_step=0)
    GarbageCollection(every_n_steps=None).on_train_start(trainer, trainer)
    assert gc.isenabled()

    gc.disable()
    callback = GarbageCollection()
    callback.on_train_start(trainer, trainer)
    callback.on_train_end(trainer, trainer)
    assert not gc.isenabled()


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
    def fails(*_: Any) -> None:
        raise RuntimeError("in the middle")

    monkeypatch.setattr(KosmosLit, "training_step", fails)
    with pytest.raises(RuntimeError, match="in the middle"):
        main(tiny_run("fit", tmp_path, tiny_world))

    assert gc.isenabled()
    assert gc.get_freeze_count() == 0


def test_a_schedule_of_no_steps_is_refused(tmp_path: Path, tiny_world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(tiny_run("fit", tmp_path, tiny_world, "--garbage_collection.every_n_steps=0")) == 2

    assert "garbage_collection.every_n_steps must be positive, or null, got 0" in capsys.readouterr().err
