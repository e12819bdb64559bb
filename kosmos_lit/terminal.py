"""Text for terminals: progress lines, tables, durations. In a file or a pipe the same text stands line after line."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterable, Sequence
from itertools import zip_longest


def write_line(text: str, *, keep: bool = False) -> None:
    """Print a line to stderr; a terminal shows it over the line before, unless that was printed with `keep`."""
    is_terminal = sys.stderr.isatty()
    if is_terminal and not keep:  # a wrapped line could not be overwritten
        text = text[: shutil.get_terminal_size().columns - 1]
    if text or is_terminal:
        print(f"\r\x1b[K{text}" if is_terminal else text, end="" if is_terminal and not keep else "\n", file=sys.stderr)
    sys.stderr.flush()


def table(headers: Sequence[str], rows: Iterable[Sequence[object]], align: str = "lr") -> str:
    """Return a table as plain text: columns as wide as their widest cell, two spaces apart.

    Args:
        headers: one a column; empty for a table without a header line.
        rows: cells are text, whole numbers (printed with thousands separators), or None (printed as nothing).
        align: `l` or `r` a column; the last letter also holds for all columns after it.
    """
    lines = [[_cell(value) for value in row] for row in ([headers] if headers else []) + list(rows)]
    widths = [max(map(len, column)) for column in zip_longest(*lines, fillvalue="")]
    pads = [str.ljust if letter == "l" else str.rjust for letter in align.ljust(len(widths), align[-1])]
    return "\n".join(
        "  ".join(pad(cell, width) for cell, width, pad in zip(line, widths, pads, strict=False)).rstrip() for line in lines
    )


def _cell(value: object) -> str:
    return "" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def clock_time(seconds: float) -> str:
    """Return hours, minutes and seconds as `3:07:05`, or `7:05` where there are no hours."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
