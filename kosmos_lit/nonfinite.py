"""Steps whose gradient has no finite norm: the optimizer leaves them out, and a run ends or goes on as it is told."""

from __future__ import annotations

from collections import deque

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.optim import Optimizer

from kosmos_lit.config import OptimizerConfig
from kosmos_lit.errors import UserError


class NonFiniteSteps:
    """Keeps weights and moments as they are in a step whose gradient holds a NaN or an infinity.

    The norm that is clipped tells, and is the same on all ranks, so all of them decide alike. The decision is the fused
    optimizer's, on the device. The host reads norms where it waits for the device anyway: at rows of the log and before
    checkpoints, on a CPU in the step itself.
    """

    def __init__(self, config: OptimizerConfig, rows_per_step: int) -> None:
        """Take the policy, and the rows of the stream in a step, by which rows are named."""
        self.config, self.rows_per_step = config, rows_per_step
        self._norms: list[tuple[int, Tensor]] = []
        self._skipped: deque[int] = deque()

    def watch(self, optimizer: Optimizer, norm: Tensor, step: int) -> None:
        """Tell the optimizer of a gradient's norm, (), before it takes the step, counted from 1."""
        # What torch's GradScaler sets: a fused optimizer changes nothing where it is 1.
        optimizer.found_inf = norm.isfinite().logical_not().float()  # type: ignore[attr-defined]
        self._norms.append((step, norm.detach()))
        if norm.device.type == "cpu":
            self.check()

    def check(self) -> None:
        """Raises: UserError if a step since the last call ends the run, by its number, norm and rows."""
        norms = torch.stack([norm for _, norm in self._norms]).tolist() if self._norms else []
        steps = [(step, norm) for (step, _), norm in zip(self._norms, norms, strict=True) if not abs(norm) < float("inf")]
        self._norms.clear()
        c = self.config
        for step, norm in steps:
            last = step * self.rows_per_step - 1
            what = f"step {step}: the gradient's norm is {norm}, of rows {last - self.rows_per_step + 1} to {last}"
            while self._skipped and self._skipped[0] <= step - c.skip_window:
                self._skipped.popleft()
            self._skipped.append(step)
            skipped = f"{len(self._skipped)} left out within {c.skip_window} steps"
            if c.on_nonfinite == "stop" or len(self._skipped) > c.max_skipped:
                limit = f" ({skipped}, more than model.optimizer.max_skipped)" if c.on_nonfinite == "skip" else ""
                raise UserError(
                    f"{what}{limit}; no further checkpoint is written. Look at the rows with the verb `rows`, and resume "
                    "from the last checkpoint with a smaller learning rate, a longer warm-up or stronger clipping, or with "
                    "model.optimizer.on_nonfinite: skip"
                )
            rank_zero_info(f"{what}; {skipped}")
