"""Evaluation on a trainer's devices: `test` with tasks, each of them one step of the test loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import lightning as L

from kosmos_lit.batch import KosmosBatch
from kosmos_lit.errors import UserError
from kosmos_lit.evaluation.config import EvalConfig
from kosmos_lit.evaluation.progress import metrics_table
from kosmos_lit.evaluation.results import METRICS
from kosmos_lit.evaluation.runner import Evaluation
from kosmos_lit.inference.engine import Engine
from kosmos_lit.lit import KosmosLit
from kosmos_lit.sharding.strategy import NET, ShardedStrategy
from kosmos_lit.state_dicts.keys import check_shapes, shapes_of
from kosmos_lit.tokenizer import Tokenizer
from kosmos_lit.trainer_internals import attached_trainer


class TrainerRanks:
    """The processes of a trainer, as `Ranks`."""

    def __init__(self, trainer: L.Trainer) -> None:
        """Take the trainer, whose processes have been started."""
        self.rank, self.world_size, self._strategy = trainer.global_rank, trainer.world_size, trainer.strategy

    def broadcast(self, value: Any) -> Any:
        """Return rank zero's value on all ranks, after all of them have called."""
        # In a broadcast alone, rank zero would not wait for the others.
        self._strategy.barrier()
        return self._strategy.broadcast(value)


class EvaluationData(L.LightningDataModule):
    """The tasks of an evaluation as a data module, in the place of corpora."""

    kinds: Mapping[str, int] = {}  # of corpora: none

    def __init__(
        self,
        config: EvalConfig,
        tokenizer: Tokenizer,
        seq_len: int,
        folder: Path,
        model_info: dict[str, Any],
        write_report: Callable[[Path], Sequence[Path]],
    ) -> None:
        """Take the tasks, and what their results need.

        Args:
            config: tasks and settings.
            tokenizer: the model's.
            seq_len: positions of the model's rows.
            folder: of the results.
            model_info: facts of the model for `metrics.json`, beside its parameters.
            write_report: writes the report of a folder of results, and returns the paths of its files.
        """
        super().__init__()
        self.config, self.tokenizer, self.seq_len = config, tokenizer, seq_len
        self.folder, self.model_info, self.write_report = folder, model_info, write_report

    def test_dataloader(self) -> Sequence[str]:
        """Return the names of the tasks."""
        # Lightning iterates over any sequence; each name is the batch of one test step.
        return list(self.config.enabled_tasks)


@dataclass
class RunningEvaluation:
    """An evaluation in progress."""

    evaluation: Evaluation
    whole_net: ExitStack
    """Keeps the unsharded model on this process until it is closed."""
    entries: dict[str, dict[str, Any]] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)


class EvaluatedLit(KosmosLit):
    """A model in `test`: its loss on held-out rows, or with `EvaluationData` its metrics on tasks."""

    _evaluation: RunningEvaluation | None = None

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Raises: UserError naming missing and unexpected tensors of the checkpoint."""
        super().on_load_checkpoint(checkpoint)
        data: object = self._data if attached_trainer(self) is not None else None
        # The sharded strategy checks the tensors itself, when each rank loads its shards.
        if isinstance(data, EvaluationData) and not isinstance(self._strategy, ShardedStrategy):
            tensors = {name.removeprefix(NET): tensor for name, tensor in checkpoint["state_dict"].items()}
            check_shapes(shapes_of(tensors), shapes_of(self.net.state_dict()), str(data.model_info["checkpoint"]))

    def on_test_start(self) -> None:
        """Read the samples of all tasks."""
        data = self._data
        if not isinstance(data, EvaluationData):
            return
        whole_net = ExitStack()
        # Gathered once for all tasks, and freed in on_test_end.
        net = whole_net.enter_context(self.full_net())
        model_info = data.model_info | {"precision": str(self.trainer.precision), "config": asdict(self.config)}
        ranks = TrainerRanks(self.trainer)
        evaluation = Evaluation(Engine(net, self.tokenizer), data.config, data.folder, model_info=model_info, ranks=ranks)
        self._evaluation = RunningEvaluation(evaluation, whole_net)

    def test_step(self, batch: KosmosBatch | str, batch_idx: int) -> None:
        """Add the loss of a micro-batch, or run the task of a name."""
        if not isinstance(batch, str):
            super().test_step(batch, batch_idx)
            return
        assert self._evaluation is not None
        try:
            self._evaluation.entries[batch] = self._evaluation.evaluation.run(batch)
        except UserError as error:  # the same on all ranks; the other tasks still run
            self._evaluation.errors.append(str(error))

    def on_test_epoch_end(self) -> None:
        if self._evaluation is None:
            super().on_test_epoch_end()

    def on_test_end(self) -> None:
        """Print the metrics and write the report.

        Raises: UserError if a task has failed.
        """
        if (running := self._evaluation) is None:
            return
        self._evaluation = None
        running.whole_net.close()
        data = self._data
        assert isinstance(data, EvaluationData)
        if self.trainer.is_global_zero and running.entries:
            print(metrics_table(running.entries))
            paths = [data.folder / METRICS, *data.write_report(data.folder)]
            print(f"wrote {', '.join(map(str, paths))}")
        # Last: the metrics of the other tasks are on disk by now.
        if running.errors:
            raise UserError("; ".join(running.errors))
