"""What is evaluated, and how: the top-level key `eval` of a run's configuration."""

from __future__ import annotations

from dataclasses import dataclass, field

from kosmos_lit.errors import UserError
from kosmos_lit.evaluation.image_control import ImageControl
from kosmos_lit.evaluation.task import Task
from kosmos_lit.images import Fit


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Tasks by name, and what holds for all of them."""

    tasks: dict[str, Task | None] = field(default_factory=dict)
    """Tasks by the name of their results; null removes a task of an earlier configuration file."""
    folder: str | None = None
    """Folder of the results; None: `eval` in the run's folder. Samples that it holds already are not evaluated again."""
    image_control: ImageControl = "true"
    """Images of a sample: its own, another sample's (control), an even grey of the same size, or none at all."""
    image_fit: Fit = "square"
    """How an image becomes square; the released evaluation scales both sides."""
    batch_tokens: int = 16384
    """Largest batch, in positions of prompts and of the tokens generated or scored after them."""
    max_samples: int | None = None
    """Largest number of samples of each task; None: as the tasks say."""
    every_n_steps: int | None = None
    """In `fit`: optimizer steps from one evaluation to the next; None: no evaluation in training."""

    def __post_init__(self) -> None:
        for name in ("batch_tokens", "max_samples", "every_n_steps"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise UserError(f"eval.{name} must be positive, got {value}")
        for name in self.tasks:
            # The leading dot also refuses "..", which would leave the folder of the results.
            if not name or name.startswith(".") or set(name) & set("/\\:"):
                raise UserError(f"eval.tasks: {name!r} cannot name a task: its results are in a folder of that name")

    @property
    def enabled_tasks(self) -> dict[str, Task]:
        """The tasks that no configuration file has removed."""
        return {name: task for name, task in self.tasks.items() if task is not None}
