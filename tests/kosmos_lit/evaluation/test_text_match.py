"""Exact match and F1 as SQuAD's rules have them, against values worked out by hand."""

from __future__ import annotations

import pytest

from kosmos_lit.evaluation.answer_metrics import exact_match, f1, normalised


@pytest.mark.parametrize(
    ("given", "compared"),
    [("The  Answer!", "answer"), ("$5,000", "5000"), ("a-b", "ab"), ("theatre", "theatre"), ("A.n", ""), ("“x”", "“x”")],
)
def test_texts_lose_case_punctuation_articles_and_blanks(given: str, compared: str) -> None:
    assert normalised(given) == compared


def test_any_reference_will_do() -> None:
    assert exact_match("the Penguin", ["owl", "penguin."]) == 1
    assert exact_match("penguins", ["owl", "penguin"]) == 0


@pytest.mark.parametrize(
    ("prediction", "references", "value"),
    [
        ("red blue green", ["blue green black white"], 2 * 2 / 7),  # precision 2/3, recall 2/4
        ("red red", ["red"], 2 * 1 / 3),  # a word counts as often as both have it
        ("red", ["blue", "red car"], 2 / 3),
        ("red", ["blue"], 0),
        ("the", ["a"], 1),
        ("", ["red"], 0),
        ("The red", ["red"], 1),
    ],
)
def test_f1_is_the_harmonic_mean_of_precision_and_recall(prediction: str, references: list[str], value: float) -> None:
    assert f1(prediction, references) == pytest.approx(value)
