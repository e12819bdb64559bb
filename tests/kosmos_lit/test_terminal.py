"""Tables as text."""

from __future__ import annotations

from kosmos_lit.terminal import table


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
