"""Evaluation on a trainer's devices: `test` with tasks, each of them one step of the test loop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import lightning as L

from kosmos_lit.batch import KosmosBatch
from kosmos_lit.errors import UserError
from kosmos_lit.evaluation.config import EvalConfig
from kosmos_lit.evaluation.runner import Evaluation, summary
from kosmos_lit.lit import KosmosLit
from kosmos_lit.sharding.strategy import NET, ShardedStrategy
from kosmos_lit.tokenizer import Tokenizer
from kosmos_lit.trainer_internals import attached_trainer
from kosmos_lit.weights.keys import check_shapes, shapes_of


class TrainerRanks:
    """The processes of a trainer."""

    def __init__(self, trainer: L.Trainer) -> None:
        """Take the trainer, whose processes have been started."""
        self.rank, self.world, self._strategy = trainer.global_rank, trainer.world_size, trainer.strategy

    def broadcast(self, value: Any) -> Any:
        """Return what the first process gives, on all of them; nobody goes on before all have come here."""
        self._strategy.barrier()
        return self._strategy.broadcast(value)


class EvaluationData(L.LightningDataModule):
    """The tasks of an evaluation in the place of corpora."""

    kinds: Mapping[str, int] = {}

    def __init__(
        self, config: EvalConfig, tokenizer: Tokenizer, seq_len: int, folder: Path, about: dict[str, Any]
    ) -> None:
        """Take what is evaluated.

        Args:
            config: tasks, and how to ask.
            tokenizer: the model's.
            seq_len: positions of the model's rows.
            folder: where results are kept.
            about: what the results are to say of the model, beside what it says itself.
        """
        super().__init__()
        self.config, self.tokenizer, self.seq_len = config, tokenizer, seq_len
        self.folder, self.about = folder, about

    def test_dataloader(self) -> Sequence[str]:
        """Return the names of the tasks."""
        return list(self.config.named)


@dataclass
class RunningEvaluation:
    """An evaluation that is under way."""

    evaluation: Evaluation
    whole: ExitStack
    """Keeps the whole model on this process."""
    entries: dict[str, dict[str, Any]] = field(default_factory=dict)
    mistakes: list[str] = field(default_factory=list)


class EvaluatedLit(KosmosLit):
    """A model in `test`: its loss on held-out rows, or, where the data are `EvaluationData`, its figures on tasks."""

    _exam: RunningEvaluation | None = None

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Raises: UserError naming the tensors that the checkpoint lacks, or has too many."""
        super().on_load_checkpoint(checkpoint)
        if attached_trainer(self) is None or isinstance(self._strategy, ShardedStrategy):
            return  # the strategy checks shapes itself
        if isinstance(self._data, EvaluationData):
            found = {name.removeprefix(NET): tensor for name, tensor in checkpoint["state_dict"].items()}
            check_shapes(shapes_of(found), shapes_of(self.net.state_dict()), str(self._data.about["checkpoint"]))

    def on_test_start(self) -> None:
        """Read the samples of all tasks."""
        data = self._data
        if not isinstance(data, EvaluationData):
            return
        whole = ExitStack()
        net = whole.enter_context(self.full_net())
        about = data.about | {"precision": str(self.trainer.precision), "config": asdict(self.config)}
        ranks = TrainerRanks(self.trainer)
        evaluation = Evaluation(net, self.tokenizer, data.config, data.folder, about=about, ranks=ranks)
        self._exam = RunningEvaluation(evaluation, whole)

    def test_step(self, batch: KosmosBatch | str, batch_idx: int) -> None:
        """Take a micro-batch's loss, or run the task of that name."""
        if not isinstance(batch, str):
            super().test_step(batch, batch_idx)
            return
        assert self._exam is not None
        try:
            self._exam.entries[batch] = self._exam.evaluation.run(batch)
        except UserError as error:  # on all ranks alike; the other tasks are worth something all the same
            self._exam.mistakes.append(str(error))

    def on_test_epoch_end(self) -> None:
        if self._exam is None:
            super().on_test_epoch_end()

    def on_test_end(self) -> None:
        """Write the report, and say what came out.

        Raises: UserError if a task could not be run.
        """
        if (exam := self._exam) is None:
            return
        self._exam = None
        exam.whole.close()
        if self.trainer.is_global_zero and exam.entries:
            print(summary(exam.entries))
            print(f"wrote {', '.join(map(str, exam.evaluation.report()))}")
        if exam.mistakes:
            raise UserError("; ".join(exam.mistakes))
