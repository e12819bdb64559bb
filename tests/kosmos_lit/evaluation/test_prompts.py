"""Templates and demonstrations."""

from __future__ import annotations

from pathlib import Path

import pytest

from kosmos_lit.errors import UserError
from kosmos_lit.evaluation.prompts import few_shot_prompt, fill_template


def test_demonstrations_stand_before_the_prompt_and_texts_grow_together() -> None:
    one, two = Path("1.png"), Path("2.png")

    assert few_shot_prompt([(one, "A 1"), ("B 2",)], (two, "A"), " | ") == (one, "A 1 | B 2 | ", two, "A")


def test_without_demonstrations_the_prompt_is_itself() -> None:
    assert few_shot_prompt([], (Path("1.png"), "A"), "\n") == (Path("1.png"), "A")


@pytest.mark.parametrize("template", ["{q}", "{", "{0}"])
def test_a_template_that_cannot_be_written_out_is_named(template: str) -> None:
    with pytest.raises(UserError, match="cannot be written out"):
        fill_template(template, question="?")


def test_braces_in_a_value_are_text() -> None:
    assert fill_template("Q: {question} {{}}", question="{x}") == "Q: {x} {}"
