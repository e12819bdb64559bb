"""One test for each name of Lightning's Trainer that the data module uses and Lightning does not document."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from torch.utils.data import DataLoader

from datamodules.trainer import is_fitting, limit_steps, resumed_checkpoint, set_accumulation
from kosmos_lit.errors import UserError


class CountingModel(BoringModel):
    """Counts training batches, and notes how many there were at each validation."""

    def __init__(self) -> None:
        super().__init__()
        self.n_batches = 0
        self.validated_at: list[int] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.n_batches += 1
        return super().training_step(batch, batch_idx)

    def on_validation_start(self) -> None:
        self.validated_at.append(self.n_batches)


class HookedData(L.LightningDataModule):
    """Calls a function with the trainer where `MixtureData` uses it."""

    def __init__(self, **hooks: Callable[[L.Trainer], Any]) -> None:
        super().__init__()
        self.hooks = hooks
        self.calls: list[tuple[str, Any]] = []

    def _call(self, name: str) -> None:
        assert self.trainer is not None
        if name in self.hooks:
            self.calls.append((name, self.hooks[name](self.trainer)))

    def setup(self, stage: str) -> None:
        self._call("setup")

    def train_dataloader(self) -> DataLoader[Any]:
        self._call("train_dataloader")
        return self.val_dataloader()

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(torch.zeros(64, 32))  # type: ignore[arg-type]

    def state_dict(self) -> dict[str, Any]:
        return {"next_row": 7}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._call("load_state_dict")


@pytest.fixture
def trainer(tmp_path: Path) -> Callable[..., L.Trainer]:
    """Builds a trainer of a few steps that prints and logs nothing."""

    def build(max_steps: int = 2, **options: Any) -> L.Trainer:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about loggers and devices of this machine
            return L.Trainer(
                accelerator="cpu",
                max_steps=max_steps,
                default_root_dir=tmp_path,
                limit_val_batches=1,
                num_sanity_val_steps=0,
                logger=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                enable_checkpointing=False,
                **options,
            )

    return build


def fit(trainer: L.Trainer, data: HookedData, **options: Any) -> CountingModel:
    model = CountingModel()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(model, data, **options)
    return model


def test_accumulate_grad_batches_set_in_setup_is_the_micro_batches_of_a_step(trainer):
    t = trainer(max_steps=2)
    model = fit(t, HookedData(setup=lambda t: set_accumulation(t, 3, "")))
    assert (t.global_step, model.n_batches) == (2, 6), "trainer.accumulate_grad_batches no longer decides a step"


def test_val_check_interval_set_in_setup_counts_micro_batches(trainer):
    model = fit(trainer(max_steps=4, val_check_interval=2), HookedData(setup=lambda t: set_accumulation(t, 3, "")))
    assert model.validated_at == [6, 12], "trainer.val_check_interval no longer counts micro-batches"


def test_accumulate_grad_batches_is_1_by_default_and_another_number_is_refused(trainer):
    assert trainer().accumulate_grad_batches == 1
    with pytest.raises(UserError, match=r"accumulate_grad_batches is 5, but it follows .*: 12 rows make 4; leave it out"):
        set_accumulation(trainer(accumulate_grad_batches=5), 4, "12 rows")


def test_max_steps_of_the_epoch_loop_ends_training(trainer):
    t = trainer(max_steps=7)
    fit(t, HookedData(train_dataloader=lambda t: limit_steps(t, 3)))
    assert (t.max_steps, t.global_step) == (3, 3), "trainer.fit_loop.epoch_loop.max_steps no longer ends training"


@pytest.mark.parametrize(("max_steps", "limit", "expected"), [(7, 3, 3), (3, 3, 3), (3, 7, 3), (-1, 5, 5)])
def test_steps_are_limited_unless_training_ends_before(trainer, max_steps, limit, expected):
    t = trainer(max_steps=max_steps)
    assert limit_steps(t, limit) == (expected != max_steps)
    assert t.max_steps == expected


@pytest.mark.parametrize(("verb", "expected"), [("fit", True), ("validate", False)])
def test_state_fn_is_the_verb_where_the_data_state_is_loaded(trainer, tmp_path, verb, expected):
    first = trainer()
    fit(first, HookedData())
    first.save_checkpoint(tmp_path / "a.ckpt")
    data = HookedData(load_state_dict=is_fitting)
    t = trainer(max_steps=3)
    if verb == "fit":
        fit(t, data, ckpt_path=tmp_path / "a.ckpt")
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            t.validate(CountingModel(), data, ckpt_path=tmp_path / "a.ckpt", verbose=False)
    assert data.calls == [("load_state_dict", expected)], "trainer.state.fn is no longer the verb"


def test_ckpt_path_is_the_resumed_checkpoint_from_load_state_dict_to_the_loader(trainer, tmp_path):
    first = trainer()
    fresh = HookedData(train_dataloader=resumed_checkpoint)
    fit(first, fresh)
    first.save_checkpoint(tmp_path / "a.ckpt")
    path = str(tmp_path / "a.ckpt")
    resumed = HookedData(load_state_dict=resumed_checkpoint, train_dataloader=resumed_checkpoint)
    fit(trainer(max_steps=3), resumed, ckpt_path=path)
    assert fresh.calls == [("train_dataloader", None)]
    assert resumed.calls == [("load_state_dict", path), ("train_dataloader", path)], "trainer.ckpt_path has another meaning"


def test_a_checkpoint_holds_the_data_state_under_the_name_of_its_class(trainer, tmp_path):
    t = trainer()
    fit(t, HookedData())
    t.save_checkpoint(tmp_path / "a.ckpt")
    checkpoint = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert checkpoint["HookedData"] == {"next_row": 7}, "the data's state has another key"
