"""SQuAD's exact match and F1, and VQA accuracy, by their published rules; expected values are worked out by hand."""

from __future__ import annotations

import pytest

from kosmos_lit.evaluation.answer_metrics import exact_match, f1, normalise_squad, normalise_vqa, vqa_accuracy


@pytest.mark.parametrize(
    ("text", "normalised"),
    [("The  Answer!", "answer"), ("$5,000", "5000"), ("a-b", "ab"), ("theatre", "theatre"), ("A.n", ""), ("“x”", "“x”")],
)
def test_squad_texts_lose_case_punctuation_articles_and_blanks(text: str, normalised: str) -> None:
    assert normalise_squad(text) == normalised


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


# ---- VQA


@pytest.mark.parametrize(
    ("text", "normalised"),
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
def test_vqa_answers_are_normalised_by_the_rules(text: str, normalised: str) -> None:
    assert normalise_vqa(text) == normalised


@pytest.mark.parametrize(
    ("n_matches", "accuracy"),
    # Leaving each of ten out: m times m - 1 others agree, 10 - m times m do.
    [(0, 0), (1, 9 / 30), (2, (2 * 1 + 8 * 2) / 30), (3, (3 * 2 + 7 * 3) / 30), (4, 1), (10, 1)],
)
def test_vqa_accuracy_leaves_each_person_out_once(n_matches: int, accuracy: float) -> None:
    answers = ["the Dog."] * n_matches + [f"cat {i}" for i in range(10 - n_matches)]

    assert vqa_accuracy("dog", answers) == pytest.approx(accuracy)


@pytest.mark.parametrize(("n_matches", "accuracy"), [(0, 0), (1, 1 / 3), (2, 2 / 3), (3, 1), (10, 1)])
def test_plain_vqa_accuracy_is_matches_over_three(n_matches: int, accuracy: float) -> None:
    answers = ["2"] * n_matches + ["3"] * (10 - n_matches)

    assert vqa_accuracy("two", answers, leave_one_out=False) == pytest.approx(accuracy)
