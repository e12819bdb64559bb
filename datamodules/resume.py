"""The state of a run's data in its checkpoints: a step, its next row, and what the rows are made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from datamodules.mixture.history import History
from datamodules.mixture.steps import Steps
from kosmos_lit.errors import UserError

KEYS = ("step", "next_row", "steps", "rules", "sources", "phases")
"""Keys of the state in a checkpoint."""


@dataclass(frozen=True)
class DataState:
    """Where a run stands in its stream, and the history that its rows follow from."""

    step: int
    """Optimizer steps done."""
    steps: Steps
    history: History

    @property
    def next_row(self) -> int:
        """Return the first row of the next step."""
        return self.steps.row(self.step)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for a checkpoint."""
        return {"step": self.step, "next_row": self.next_row, "steps": self.steps.to_list()} | self.history.to_dict()

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> DataState:
        """Undo `to_dict`.

        Raises: UserError if an earlier version of this project wrote the checkpoint.
        """
        # Earlier versions wrote `legs` for `phases`, or no `steps`.
        if missing := [key for key in KEYS if key not in data]:
            raise UserError(
                f"the checkpoint's data state has no {' and no '.join(missing)}: an earlier version wrote it. Go on with "
                "that version, or start a new run from the checkpoint's weights with model.init_from"
            )
        return cls(data["step"], Steps.from_list(data["steps"]), History.from_dict(data))

    def resume(
        self, configured: Callable[[Steps], History], global_batch_rows: int, *, accept: bool
    ) -> tuple[DataState, list[str]]:
        """Return the state of a run that goes on from this one, and a description of each change.

        Args:
            configured: the history that the run's configuration describes, by the run's steps.
            global_batch_rows: rows of a step from here on.
            accept: whether the mixture may change.

        Raises: UserError naming what must not change, or, unless `accept`, changes of the mixture.
        """
        # Ratios may change at given steps, so that the rows at which they do follow from the rows of past steps.
        steps = self.steps.resume(self.step, global_batch_rows)
        history, changes = self.history.resume(configured(steps), self.next_row, accept=accept)
        if (before := self.steps.borders[-1][2]) != global_batch_rows:
            changes = [*changes, f"a step reads {global_batch_rows} rows (global_batch_rows), not {before}"]
        return DataState(self.step, steps, history), changes
