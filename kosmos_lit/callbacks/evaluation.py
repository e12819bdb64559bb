"""Evaluation on tasks while a model trains."""

from __future__ import annotations

from math import isfinite
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from kosmos_lit.callbacks.isolation import isolated_evaluation, log_separate_row
from kosmos_lit.errors import UserError
from kosmos_lit.evaluation.config import EvalConfig
from kosmos_lit.evaluation.progress import format_main_metric
from kosmos_lit.evaluation.runner import Evaluation, read_samples
from kosmos_lit.evaluation.task import Sample
from kosmos_lit.evaluation.trainer import TrainerRanks
from kosmos_lit.inference.engine import Engine
from kosmos_lit.lit import KosmosLit


class EvaluateTasks(Callback):
    """Runs tasks every N optimizer steps, and logs `eval/TASK/METRIC`.

    The samples are distributed over all ranks; a sharded model is gathered on each of them meanwhile. Training does not
    notice: random numbers, modes, the stream and the other logs stay as they are, losses and weights are the same bit for
    bit. Results are in RUN/eval/step=N.
    """

    def __init__(self, config: EvalConfig) -> None:
        """Take the tasks, their interval (`every_n_steps`), and the number of their samples (`max_samples`)."""
        self.config = config
        self._step = 0
        self._samples: dict[str, list[Sample]] = {}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Read the samples: a missing dataset is an error before the first step, not hours into training."""
        if stage == "fit" and not self._samples:
            self._samples = read_samples(self.config)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._step = trainer.global_step

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, KosmosLit)
        step, last_step = trainer.global_step, self._step
        self._step = step
        # Micro-batches before the last one of an accumulation leave the step as it was.
        if step == last_step or self.config.every_n_steps is None or step % self.config.every_n_steps:
            return
        with isolated_evaluation(trainer, pl_module):
            metrics, lines = self._evaluate(trainer, pl_module)
        log_separate_row(trainer, pl_module, metrics)
        # Through the bar, which would otherwise overwrite the lines.
        if (bar := trainer.progress_bar_callback) is not None:
            for line in lines:
                bar.print(f"step {step:,} {line}")

    def _evaluate(self, trainer: L.Trainer, pl_module: KosmosLit) -> tuple[dict[str, float], list[str]]:
        folder = Path(self.config.folder or Path(trainer.default_root_dir) / "eval")
        model_info = {"checkpoint": None, "step": trainer.global_step, "precision": str(trainer.precision)}
        # In the run's precision, which an engine alone does not know.
        with pl_module.full_net() as net, trainer.precision_plugin.val_step_context():
            evaluation = Evaluation(
                Engine(net, pl_module.tokenizer),
                self.config,
                folder / f"step={trainer.global_step:08d}",
                model_info=model_info,
                ranks=TrainerRanks(trainer),
                samples=self._samples,
                replace=True,
                quiet=True,
            )
            entries, errors = dict[str, dict[str, Any]](), list[str]()
            for name in self.config.enabled_tasks:
                try:
                    entries[name] = evaluation.run(name)
                except UserError as error:  # training is worth more than one evaluation
                    errors.append(str(error))
        metrics = {
            f"eval/{name}/{key}": metric["value"]
            for name, entry in entries.items()
            for key, metric in entry["metrics"].items()
            if isfinite(metric["value"])
        }
        return metrics, [*(f"{name}  {format_main_metric(entry)}" for name, entry in entries.items()), *errors]
