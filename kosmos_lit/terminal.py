"""Text for terminals: progress lines, tables, durations. In a file or a pipe the same text stands line after line."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Iterable, Sequence
from itertools import zip_longest
from pathlib import Path

LINE_SECONDS = 30.0
"""Between two lines of progress in a file or a pipe."""
REDRAW_SECONDS = 0.2
"""Between two on a terminal."""


def program() -> str:
    """Return how the command line was called: `kosmos-lit`, `python -m kosmos_lit` or `python main.py`."""
    called = Path(sys.argv[0])
    if called.name == "main.py":
        return "python main.py"
    return "python -m kosmos_lit" if (called.parent.name, called.name) == ("kosmos_lit", "__main__.py") else "kosmos-lit"


def write_line(text: str, *, keep: bool = False) -> None:
    """Print a line to stderr; a terminal shows it over the line before, unless that was printed with `keep`."""
    is_terminal = sys.stderr.isatty()
    if is_terminal and not keep:  # a wrapped line could not be overwritten
        text = text[: shutil.get_terminal_size().columns - 1]
    if text or is_terminal:
        print(f"\r\x1b[K{text}" if is_terminal else text, end="" if is_terminal and not keep else "\n", file=sys.stderr)
    sys.stderr.flush()


class Progress:
    """How far some work is: on a terminal a line that is drawn over, else a line now and then, and one at the end."""

    def __init__(
        self,
        title: str,
        total: int | None,
        unit: str,
        *,
        n_before: int = 0,
        quiet: bool = False,
        line_seconds: float | None = None,
    ) -> None:
        """Start the clock.

        Args:
            title: what is done.
            total: number of units, those done before included; None: not known.
            unit: what is counted, in the plural.
            n_before: units that an earlier start has done, which took no time now.
            quiet: print nothing.
            line_seconds: least time between two lines in a file or a pipe; None: `LINE_SECONDS`.
        """
        self.title, self.total, self.unit, self.n_before, self.quiet = title, total, unit, n_before, quiet
        self.n_new = 0
        self.note = ""
        """What else is to be said, such as the number of something within the units."""
        self._is_terminal = sys.stderr.isatty()
        self._interval = REDRAW_SECONDS if self._is_terminal else LINE_SECONDS if line_seconds is None else line_seconds
        self._start = self._last_line = time.monotonic()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._start

    def add(self, n: int = 1) -> None:
        """Count units, and print a line if the last one is long enough ago."""
        self.n_new += n
        now = time.monotonic()
        if self.quiet or now - self._last_line < self._interval:
            return
        self._last_line = now
        n_done = self.n_before + self.n_new
        # Never 0 seconds: the first line comes an interval after the start.
        speed = self.n_new / self.seconds
        left = f"  {clock_time((self.total - n_done) / speed)} left" if speed and self.total is not None else ""
        of = "" if self.total is None else f" of {self.total:,}"
        write_line(f"{self.title}  {n_done:,}{of} {self.unit}{self._note()}  {self.speed()}{left}")

    def end(self, text: str | None = None) -> None:
        """Print the last line: `text`, or counts, time and speed."""
        if not self.quiet:
            before = f", {self.n_before:,} of them before" if self.n_before else ""
            counts = f"{self.n_before + self.n_new:,} {self.unit}{self._note()} in {clock_time(self.seconds)}{before}"
            write_line(f"{self.title}  {counts}, {self.speed()}" if text is None else text, keep=True)

    def speed(self) -> str:
        """Return the units of a second as text."""
        return f"{self.n_new / max(self.seconds, 1e-9):,.1f}/s"

    def _note(self) -> str:
        return f" ({self.note})" if self.note else ""


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
