"""Weights as exact fractions, and the whole numbers in their proportion that rows are apportioned by."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

from kosmos_lit.errors import UserError

MAX_PERIOD = 100_000
"""Weights whose least common period is longer are rounded to this many parts: shares are then exact to 1e-5."""

Weight = float | Fraction


def check_weights(where: str, weights: Sequence[Weight], advice: str = "") -> None:
    """Raise UserError unless all weights are finite, none is negative and one is positive; `advice` is for the last."""
    if not all(math.isfinite(w) and w >= 0 for w in weights):
        raise UserError(f"{where}: weights must be finite and not negative, got {_plain(weights)}")
    if not any(weights):
        raise UserError(f"{where}: at least one weight must be positive, got {_plain(weights)}{advice}")


def exact(weight: Weight) -> Fraction:
    """Return a weight as it is written: 0.1 is a tenth."""
    # By its decimal digits: Fraction(0.1) would have a denominator of 2 ** 55, and a mixture as long a period.
    return weight if isinstance(weight, Fraction) else Fraction(str(float(weight)))


def to_parts(weights: Sequence[Weight], *, round_always: bool = False) -> list[int]:
    """Return the smallest whole numbers in the proportion of the weights.

    They are rounded to a sum of MAX_PERIOD, by largest remainder, if their sum is larger or `round_always` is set.

    Raises: UserError if a weight that is not 0 would be rounded to 0.
    """
    fractions = [exact(w) for w in weights]
    scale = math.lcm(*(f.denominator for f in fractions))
    # Exact: the scale is a multiple of each denominator.
    integers = [int(f * scale) for f in fractions]
    divisor = math.gcd(*integers)
    integers = [w // divisor for w in integers]
    if sum(integers) <= MAX_PERIOD and not round_always:
        return integers
    parts = [Fraction(w * MAX_PERIOD, sum(integers)) for w in integers]
    rounded = [int(p) for p in parts]
    # The largest remainders first; of equal ones the lower option, as sorting is stable.
    by_remainder = sorted(range(len(parts)), key=lambda k: rounded[k] - parts[k])
    for k in by_remainder[: MAX_PERIOD - sum(rounded)]:
        rounded[k] += 1
    if lost := [weights[k] for k in range(len(parts)) if integers[k] and not rounded[k]]:
        raise UserError(
            f"weight {_plain(lost)} is less than 1 part in {MAX_PERIOD} of {_plain(weights)}; raise it, or set it to 0"
        )
    return rounded


def _plain(weights: Sequence[Weight]) -> str:
    return f"[{', '.join(f'{float(w):g}' if isinstance(w, Fraction) else str(w) for w in weights)}]"
