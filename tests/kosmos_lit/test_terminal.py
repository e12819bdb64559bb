"""Tables and progress as text."""

from __future__ import annotations

import pytest

from kosmos_lit import terminal
from kosmos_lit.terminal import Progress, table


def test_columns_are_as_wide_as_their_widest_cell() -> None:
    rows = [("caption", 1234567, "0.5"), ("text", 13, "11.25")]

    assert table(("source", "rows", "share"), rows).splitlines() == [
        "source        rows  share",
        "caption  1,234,567    0.5",
        "text            13  11.25",
    ]


def test_the_last_alignment_holds_for_the_columns_after_it() -> None:
    rows = [("a", "first", 3), ("bb", "a second one", 17)]

    assert table((), rows, align="rl").splitlines() == [" a  first         3", "bb  a second one  17"]


def test_empty_cells_and_short_rows_leave_no_trailing_spaces() -> None:
    assert table(("a", "b"), [("long", None), ("x",)]).splitlines() == ["a     b", "long", "x"]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time in seconds, for tests to set."""
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    return now


def test_progress_in_a_file_is_a_line_now_and_then_and_one_at_the_end(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    progress = Progress("reading", 7, "files", n_before=2)
    for seconds in (0, 11, 31, 33, 65):
        clock[0] = 100 + seconds
        progress.note = f"{10 * seconds} texts"
        progress.add()
    progress.end()

    assert capsys.readouterr().err.splitlines() == [
        "reading  5 of 7 files (310 texts)  0.1/s  0:21 left",
        "reading  7 of 7 files (650 texts)  0.1/s  0:00 left",
        "reading  7 files (650 texts) in 1:05, 2 of them before, 0.1/s",
    ]


def test_progress_on_a_terminal_is_drawn_over(
    clock: list[float], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    progress = Progress("reading", None, "files")
    for _ in range(2):
        clock[0] += terminal.REDRAW_SECONDS
        progress.add()
    progress.end()

    assert capsys.readouterr().err.count("\n") == 1


def test_quiet_progress_prints_nothing(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress("reading", 3, "files", quiet=True)
    clock[0] += 100
    progress.add()
    progress.end()

    assert capsys.readouterr().err == ""
