"""VQA accuracy by the published rules; every right side is worked out by hand from these."""

from __future__ import annotations

import pytest

from kosmos_lit.evaluation.answer_metrics import normalised, vqa_accuracy


@pytest.mark.parametrize(
    ("given", "compared"),
    [
        ("  Yes ", "yes"),
        ("The  dog", "dog"),
        ("an apple\n", "apple"),
        ("Two", "2"),
        ("none", "0"),
        ("ten cats", "10 cats"),
        ("eleven", "eleven"),
        ("u.s.", "us"),
        ("1.5", "1.5"),
        ("1.5.", "1.5"),
        (".5", ".5"),
        ("1,000", "1000"),
        ("1,000 feet/second", "1000 feetsecond"),  # a comma between digits removes all signs
        ("black/white", "black white"),
        ("black / white", "black white"),
        ("yes, it is", "yes it is"),
        ("red,blue", "red blue"),
        ("red,blue, green", "redblue green"),  # a blank beside one comma removes both
        ("t-shirt", "t shirt"),
        ("what?", "what"),
        ("12:30", "12:30"),
        ("dont", "don't"),
        ("don't", "don't"),
        ("couldntve", "couldntve"),
        ("couldn'tve", "couldn't've"),
        ("couldnt've", "couldn't've"),
        ("yall", "y'all"),
        ("dog's", "dog's"),
        ("oclock", "o'clock"),
        ("a an the", ""),
        ("", ""),
    ],
)
def test_answers_are_normalised_by_the_rules(given: str, compared: str) -> None:
    assert normalised(given) == compared


@pytest.mark.parametrize(
    ("n_matches", "accuracy"),
    # Leaving each of ten out: m times m - 1 others agree, 10 - m times m do.
    [(0, 0), (1, 9 / 30), (2, (2 * 1 + 8 * 2) / 30), (3, (3 * 2 + 7 * 3) / 30), (4, 1), (10, 1)],
)
def test_the_accuracy_leaves_each_person_out_once(n_matches: int, accuracy: float) -> None:
    answers = ["the Dog."] * n_matches + [f"cat {i}" for i in range(10 - n_matches)]

    assert vqa_accuracy("dog", answers) == pytest.approx(accuracy)


@pytest.mark.parametrize(("n_matches", "accuracy"), [(0, 0), (1, 1 / 3), (2, 2 / 3), (3, 1), (10, 1)])
def test_the_plain_accuracy_is_matches_over_three(n_matches: int, accuracy: float) -> None:
    answers = ["2"] * n_matches + ["3"] * (10 - n_matches)

    assert vqa_accuracy("two", answers, leave_one_out=False) == pytest.approx(accuracy)
