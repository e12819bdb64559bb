"""The learning rate as a pure function of the step."""

from __future__ import annotations


def warmup_linear(step: int, warmup_steps: int, total_steps: int) -> float:
    """Return the fraction of the peak rate for optimizer step `step`, counted from 0 (section 3.2).

    It rises linearly and reaches 1 at the last warm-up step, then falls linearly to 0 at `total_steps`.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps  # step 0 trains too
    return max(0.0, (total_steps - step) / max(1, total_steps - warmup_steps))
