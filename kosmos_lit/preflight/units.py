"""Numbers with units, for people."""

from __future__ import annotations


def format_bytes(n: float) -> str:
    """Return bytes in TB, GB or MB: 39.9 GB."""
    return f"{n / 1e12:.1f} TB" if n >= 1e12 else f"{n / 1e9:.1f} GB" if n >= 1e8 else f"{n / 1e6:.1f} MB"


def format_count(n: float) -> str:
    """Return a number with three digits and a letter: 1.66 B."""
    for size, letter in ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1e4, " k")):
        if abs(n) >= size:  # from 10,000 on; 1,234 is as short as 1.23 k
            return f"{n / (1e3 if letter == ' k' else size):.3g}{letter}"
    return f"{n:,.0f}" if abs(n) >= 10 or n == int(n) else f"{n:.2g}"


def format_scaled(n: float, unit: str) -> str:
    """Return a number of a unit with an SI prefix: 11.3 PFLOP."""
    for size, prefix in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G")):
        if n >= size:
            return f"{n / size:.3g} {prefix}{unit}"
    return f"{n / 1e6:,.3g} M{unit}"


def format_duration(seconds: float) -> str:
    """Return a time in the largest unit of which there are at least two: 20.7 days."""
    for size, unit in ((86400.0, "days"), (3600.0, "hours"), (60.0, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:,.0f} seconds"
