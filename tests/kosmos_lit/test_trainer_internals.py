"""Lightning's undocumented names that the model, callbacks and strategies use still exist and mean the same."""

from __future__ import annotations

import inspect
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.fabric.strategies.launchers.subprocess_script import _ChildProcessObserver
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.plugins import FSDPPrecision, MixedPrecision, Precision
from lightning.pytorch.plugins.environments import LightningEnvironment, SLURMEnvironment
from lightning.pytorch.strategies import (
    DDPStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
)
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from lightning.pytorch.strategies.parallel import ParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from kosmos_lit.sharding.fsdp import Fsdp1Strategy
from kosmos_lit.trainer_internals import (
    attached_trainer,
    cluster_environment,
    end_started_ranks,
    has_bucket_views,
    leave_signals_alone,
    loss_scaler,
    lr_schedulers,
    release_started_ranks,
    set_batch_progress,
    started_ranks,
    take_checkpoint_as_named,
)

N_STEPS, N_MICRO_BATCHES = 5, 2


class Line(L.LightningModule):
    """Fits one weight, on the data that it carries itself, and records what it sees of the loop."""

    def __init__(self, start: int | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.start = start
        self.batch_indexes: list[int] = []

    def on_train_start(self) -> None:
        if self.start is not None:
            set_batch_progress(self.trainer, self.start)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.batch_indexes.append(batch_idx)
        return (self.weight - batch).square().mean()

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Loader:
    """Yields a hundred batches."""

    def __len__(self) -> int:
        return 100

    def __iter__(self) -> Iterator[Tensor]:
        return iter([torch.ones(3)] * len(self))

    # Lightning warns when it resumes on a loader without state.
    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Ones(L.LightningDataModule):
    def train_dataloader(self) -> Loader:
        return Loader()


def fit(folder: Path, module: Line, checkpoint: Path | None = None, **settings: Any) -> L.Trainer:
    defaults = {"max_steps": N_STEPS, "accumulate_grad_batches": N_MICRO_BATCHES, "enable_checkpointing": False}
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = L.Trainer(accelerator="cpu", devices=1, default_root_dir=folder, **(defaults | quiet | settings))
    trainer.fit(module, datamodule=Ones(), ckpt_path=checkpoint)
    return trainer


def test_trainer_of_a_module_is_none_until_it_is_attached(tmp_path: Path) -> None:
    module = Line()
    assert attached_trainer(module) is None

    trainer = fit(tmp_path, module)

    assert attached_trainer(module) is trainer


def test_datamodule_is_the_trainers(tmp_path: Path) -> None:
    assert isinstance(fit(tmp_path, Line()).datamodule, Ones)  # type: ignore[attr-defined]


def test_scaler_is_the_gradient_scaler_of_float16_alone() -> None:
    scaler = object()
    half = MixedPrecision("16-mixed", "cuda", scaler=scaler)  # type: ignore[arg-type]

    assert loss_scaler(SimpleNamespace(precision_plugin=half)) is scaler  # type: ignore[arg-type]
    for plugin in (Precision(), MixedPrecision("bf16-mixed", "cpu")):
        assert loss_scaler(SimpleNamespace(precision_plugin=plugin)) is None  # type: ignore[arg-type]


def test_batch_progress_counts_the_micro_batches_of_a_run(tmp_path: Path) -> None:
    progress = fit(tmp_path, Line()).fit_loop.epoch_loop.batch_progress

    for counts in (progress.current, progress.total):
        assert vars(counts) == dict.fromkeys(("ready", "started", "processed", "completed"), N_STEPS * N_MICRO_BATCHES)


def test_batch_progress_decides_which_micro_batch_a_resumed_run_starts_at(tmp_path: Path) -> None:
    fit(tmp_path, Line()).save_checkpoint(tmp_path / "end.ckpt")
    module = Line(start=3 * N_STEPS)
    fit(tmp_path, module, tmp_path / "end.ckpt", accumulate_grad_batches=3, max_steps=N_STEPS + 1)

    assert module.batch_indexes == [15, 16, 17]


def test_lr_scheduler_configs_hold_the_schedulers_of_the_module(tmp_path: Path) -> None:
    [schedule] = lr_schedulers(fit(tmp_path, Line()))

    assert isinstance(schedule, torch.optim.lr_scheduler.LambdaLR)
    assert schedule.base_lrs == [0.1]


def test_a_lightning_optimizer_holds_torchs(tmp_path: Path) -> None:
    module = Line()
    fit(tmp_path, module)
    wrapped = module.optimizers()

    assert isinstance(wrapped, LightningOptimizer)
    assert isinstance(wrapped.optimizer, torch.optim.SGD)


def test_monitor_candidates_name_and_rank_checkpoints(tmp_path: Path) -> None:
    class ByTens(ModelCheckpoint):
        def _monitor_candidates(self, trainer: L.Trainer) -> dict[str, Tensor]:
            return super()._monitor_candidates(trainer) | {"step": torch.tensor(10 * trainer.global_step)}

    callback = ByTens(dirpath=tmp_path, filename="{step}", monitor="step", mode="max", save_top_k=2, every_n_train_steps=1)
    trainer = fit(tmp_path, Line(), callbacks=[callback], enable_checkpointing=True)

    assert {path.name for path in tmp_path.glob("*.ckpt")} == {"step=40.ckpt", "step=50.ckpt"}
    assert callback.format_checkpoint_name(callback._monitor_candidates(trainer)).endswith("step=50.ckpt")


def test_data_and_tensor_parallel_size_are_the_mesh_of_model_parallel() -> None:
    strategy = ModelParallelStrategy(data_parallel_size=3, tensor_parallel_size=1)
    assert (strategy._data_parallel_size, strategy._tensor_parallel_size) == (3, 1)

    default = ModelParallelStrategy()
    assert (default._data_parallel_size, default._tensor_parallel_size) == ("auto", "auto")


def test_precision_plugin_is_stored_in_one_attribute() -> None:
    plugin = MixedPrecision("bf16-mixed", "cpu")
    assert SingleDeviceStrategy(precision_plugin=plugin)._precision_plugin is plugin

    sharded = Fsdp1Strategy()
    sharded.accelerator = CPUAccelerator()
    sharded.precision_plugin = FSDPPrecision("bf16-mixed")
    assert isinstance(sharded._precision_plugin, MixedPrecision)


def test_setup_model_wraps_the_root_of_fsdp1() -> None:
    class Wrapping(FSDPStrategy):
        def _setup_model(self, model: nn.Module) -> nn.Module:
            return nn.Sequential(model)

    strategy, module = Wrapping(parallel_devices=[torch.device("cpu")]), Line()
    strategy.accelerator = CPUAccelerator()
    strategy.connect(module)
    strategy.setup(SimpleNamespace(state=SimpleNamespace(fn="validate")))  # type: ignore[arg-type]

    assert isinstance(strategy.model, nn.Sequential)
    assert strategy.model[0] is module


def a_trainer(**more: Any) -> L.Trainer:
    return L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, **more)


def test_signals_are_left_alone_and_not_broadcast_before_each_micro_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, before = a_trainer(), signal.getsignal(signal.SIGTERM)
    assert callable(trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor)
    assert callable(trainer._signal_connector.register_signal_handlers)
    monkeypatch.setattr("torch.distributed.broadcast", lambda *_, **__: pytest.fail("a broadcast"))

    leave_signals_alone(trainer)
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor()
    trainer._signal_connector.register_signal_handlers()

    assert signal.getsignal(signal.SIGTERM) is before


def test_no_checkpoint_is_taken_that_nobody_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hpc_ckpt_1.ckpt").touch()
    monkeypatch.setattr(SLURMEnvironment, "detect", lambda: True)
    trainer = a_trainer(default_root_dir=tmp_path)
    more = {"model_provided": True, "model_connected": True}
    select = trainer._checkpoint_connector._select_ckpt_path
    assert str(select(TrainerFn.FITTING, None, **more)).endswith("hpc_ckpt_1.ckpt")  # Lightning's own way

    take_checkpoint_as_named(trainer)

    select = trainer._checkpoint_connector._select_ckpt_path
    assert select(TrainerFn.FITTING, None, **more) is None
    assert select(TrainerFn.VALIDATING, "a.ckpt", **more) == "a.ckpt"


def test_started_ranks_are_released_from_the_observer_and_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, observed = a_trainer(), [subprocess.Popen(["sleep", "100"]), subprocess.Popen(["true"])]
    monkeypatch.setattr(type(trainer.strategy), "launcher", SimpleNamespace(procs=observed))

    release_started_ranks(trainer)
    assert observed == []
    assert len(started_ranks(trainer)) == 2
    end_started_ranks(trainer, seconds=0.5)

    assert [process.wait() for process in started_ranks(trainer)] == [-signal.SIGKILL, 0]


def test_the_launcher_watches_the_list_of_started_ranks() -> None:
    # With nobody left in the list it has nobody to wait for.
    assert _ChildProcessObserver(main_pid=0, child_processes=[])._run()
    assert "_launch_process_observer(self.procs)" in inspect.getsource(_SubprocessScriptLauncher.launch)


def test_what_started_the_ranks_is_known() -> None:
    assert cluster_environment(a_trainer()) is None
    assert isinstance(cluster_environment(a_trainer(devices=2, strategy="ddp")), LightningEnvironment)


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (Strategy, "lightning_restore_optimizer"),
        (Strategy, "lightning_module_state_dict"),
        (Strategy, "load_model_state_dict"),
        (Strategy, "load_optimizer_state_dict"),
        (Strategy, "optimizer_state"),
        (ParallelStrategy, "block_backward_sync"),
        (ModelParallelStrategy, "device_mesh"),
        (FSDPStrategy, "precision_plugin"),
    ],
)
def test_members_that_sharded_strategies_override_or_read_exist(owner: type[Strategy], name: str) -> None:
    assert hasattr(owner, name)


@pytest.mark.parametrize("name", ["forward_context", "val_step_context"])
def test_a_precision_plugin_has_contexts(name: str) -> None:
    with getattr(MixedPrecision("bf16-mixed", "cpu"), name)():
        assert torch.is_autocast_enabled("cpu")


def test_ddp_s_bucket_views_are_known_before_ddp_wraps_the_model() -> None:
    def asked(strategy: Strategy | str) -> bool:
        return has_bucket_views(L.Trainer(accelerator="cpu", strategy=strategy, logger=False, enable_checkpointing=False))

    assert asked(DDPStrategy(gradient_as_bucket_view=True))
    assert not asked(DDPStrategy())
    assert not asked("auto")
