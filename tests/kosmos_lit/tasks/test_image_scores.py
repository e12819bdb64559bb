"""Scores of the vision-language tasks, for responses written by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kosmos_lit import tasks
from kosmos_lit.errors import UserError
from kosmos_lit.evaluation.config import EvalConfig
from kosmos_lit.evaluation.runner import read_samples
from tests.kosmos_lit.tasks import image_datasets
from tests.kosmos_lit.tasks.scripted_responses import candidates, continuation, metric_values, outcome

PLAIN: dict[str, Any] = {"metrics": ["cider"], "tokens": "plain"}


def test_captions_that_are_references_score_highest_and_others_zero(tmp_path: Path) -> None:
    pytest.importorskip("pycocoevalcap")
    task = tasks.CocoCaption(str(image_datasets.karpathy(tmp_path)), **PLAIN)
    samples = task.samples()

    right = [outcome(task, sample, [continuation(sample.data["captions"][0])]) for sample in samples]
    wrong = [outcome(task, sample, [continuation("quartz")]) for sample in samples]

    assert metric_values(task.metrics(right))["exact_match"] == 1
    assert metric_values(task.metrics(wrong)) == {"cider_plain": 0, "exact_match": 0}
    assert task.metrics(right)["cider_plain"].value > 1
    assert task.main_metric == "cider_plain"


def test_an_exact_caption_is_so_whatever_its_case_and_full_stop(tmp_path: Path) -> None:
    task = tasks.CocoCaption(str(image_datasets.karpathy(tmp_path)), metrics=[])

    assert outcome(task, task.samples()[0], [continuation(" a RED square")]).scores == {"exact_match": 1}


def test_the_answer_of_eight_people_is_right(tmp_path: Path) -> None:
    task = tasks.Vqav2(str(image_datasets.vqav2(tmp_path)))
    first = task.samples()[0]

    assert outcome(task, first, [continuation("Red.")]).scores == {"vqa_accuracy": 1}
    # One person of ten said so: without one of the others 1 matches, without that person 0: (9 * 1/3 + 1 * 0) / 10.
    assert outcome(task, first, [continuation("teal")]).scores["vqa_accuracy"] == pytest.approx(0.3)
    assert outcome(task, first, [continuation("mauve")]).scores == {"vqa_accuracy": 0}


def test_the_accuracy_without_leaving_one_out_is_matches_over_three(tmp_path: Path) -> None:
    task = tasks.Vqav2(str(image_datasets.vqav2(tmp_path)), leave_one_out=False)

    assert outcome(task, task.samples()[0], [continuation("teal")]).scores["vqa_accuracy"] == pytest.approx(1 / 3)


def test_predictions_without_public_answers_go_to_the_server(tmp_path: Path) -> None:
    task = tasks.Vqav2(str(image_datasets.vqav2(tmp_path, "test-dev2015", n=2, answered=False)), split="test-dev2015")

    outcomes = [outcome(task, sample, [continuation(f"answer {sample.key}")]) for sample in task.samples()]

    assert task.metrics(outcomes) == {}
    (name, text), *_ = task.submission_files(outcomes, []).items()
    assert name == "submission_test-dev2015.json"
    assert json.loads(text) == [{"question_id": 10, "answer": "answer 10"}, {"question_id": 11, "answer": "answer 11"}]


def test_a_question_that_failed_has_an_empty_answer_for_the_server(tmp_path: Path) -> None:
    task = tasks.Vqav2(str(image_datasets.vqav2(tmp_path, "test-dev2015", n=2, answered=False)), split="test-dev2015")
    outcomes = [outcome(task, task.samples()[0], [continuation("a cat")])]

    [text] = task.submission_files(outcomes, ["11"]).values()

    assert json.loads(text) == [{"question_id": 10, "answer": "a cat"}, {"question_id": 11, "answer": ""}]


def test_missing_demonstrations_are_an_error_before_the_first_request(tmp_path: Path) -> None:
    task = tasks.Vqav2(str(image_datasets.vqav2(tmp_path, "val2014", n=2)), n_shots=2)

    with pytest.raises(UserError, match=r"v2_OpenEnded_mscoco_train2014_questions\.json"):
        read_samples(EvalConfig(tasks={"vqav2_2": task}))


def test_vizwiz_answers_go_by_image(tmp_path: Path) -> None:
    task = tasks.VizWiz(str(image_datasets.vizwiz(tmp_path, "test", 1, answered=False)), split="test")

    outcomes = [outcome(task, sample, [continuation("a can")]) for sample in task.samples()]

    assert json.loads(task.submission_files(outcomes, [])["submission_test.json"]) == [
        {"image": "VizWiz_test_00000000.jpg", "answer": "a can"}
    ]


def test_ten_equal_answers_without_ids_are_ten_people(tmp_path: Path) -> None:
    task = tasks.VizWiz(str(image_datasets.vizwiz(tmp_path)))

    assert outcome(task, task.samples()[0], [continuation("unanswerable")]).scores == {"vqa_accuracy": 1}


# ---- Raven


def test_the_candidate_with_the_likeliest_yes_is_the_answer(tmp_path: Path) -> None:
    task = tasks.Raven(str(image_datasets.raven(tmp_path)))

    result = outcome(task, task.samples()[1], [candidates(Yes=p) for p in (0.1, 0.3, 0.2, 0.05, 0.01, 0.02)])

    assert (result.prediction, result.target, result.scores) == ("1", "1", {"accuracy": 1})
    assert result.data["confidence"] == pytest.approx([0.1, 0.3, 0.2, 0.05, 0.01, 0.02])


def test_candidates_that_are_equal_share_the_point(tmp_path: Path) -> None:
    task = tasks.Raven(str(image_datasets.raven(tmp_path)))

    assert outcome(task, task.samples()[2], [candidates(Yes=0.25)] * 6).scores["accuracy"] == pytest.approx(1 / 6)


def test_against_no_a_likelier_yes_can_lose(tmp_path: Path) -> None:
    task = tasks.Raven(str(image_datasets.raven(tmp_path)), no="No")

    result = outcome(task, task.samples()[0], [candidates(Yes=0.1, No=0.1), *[candidates(Yes=0.3, No=0.6)] * 5])

    assert result.scores == {"accuracy": 1}
    assert result.data["confidence"] == pytest.approx([1 / 2, *[1 / 3] * 5])


# ---- classes


def test_the_likelier_sentiment_is_the_answer(tmp_path: Path) -> None:
    task = tasks.RenderedSst2(str(image_datasets.rendered(tmp_path)))
    sample = task.samples()[4]

    result = outcome(task, sample, [candidates(positive=0.1, negative=0.3)])

    assert (sample.data["label"], result.prediction, result.scores) == ("negative", "negative", {"accuracy": 1})
    assert result.data["probabilities"] == pytest.approx({"positive": 0.25, "negative": 0.75})


def test_the_rationale_is_kept(tmp_path: Path) -> None:
    task = tasks.RenderedSst2ChainOfThought(str(image_datasets.rendered(tmp_path)))

    result = outcome(task, task.samples()[0], [continuation("it is dull")], [candidates(positive=0.1, negative=0.3)])

    assert (result.scores, result.data["rationale"]) == ({"accuracy": 0}, "it is dull")


def test_memes_are_ranked_by_the_share_of_yes(tmp_path: Path) -> None:
    task = tasks.HatefulMemes(str(image_datasets.memes(tmp_path)))
    # Two hateful among five (the second and fourth): one above all others, one below one of the three: 5 of 6 pairs.
    yes = [0.01, 0.3, 0.4, 0.2, 0.1]
    no = [0.09, 0.1, 0.6, 0.6, 0.9]  # shares 0.1, 0.75, 0.4, 0.25, 0.1

    outcomes = [outcome(task, s, [candidates(no=n, yes=y)]) for s, n, y in zip(task.samples(), no, yes, strict=True)]

    assert metric_values(task.metrics(outcomes)) == pytest.approx({"roc_auc": 5 / 6, "accuracy": 4 / 5})


def test_memes_can_be_ranked_by_yes_alone(tmp_path: Path) -> None:
    task = tasks.HatefulMemes(str(image_datasets.memes(tmp_path)), score="yes")

    assert outcome(task, task.samples()[0], [candidates(no=0.6, yes=0.2)]).data["score"] == pytest.approx(0.2)


def test_an_answer_on_a_page_is_matched_as_squad_does(tmp_path: Path) -> None:
    task = tasks.WebSrc(str(image_datasets.websrc(tmp_path)))
    first = task.samples()[0]

    assert outcome(task, first, [continuation("The 5000.")]).scores == {"exact_match": 1, "f1": 1}
    assert outcome(task, first, [continuation("5,000 dollars")]).scores == pytest.approx({"exact_match": 0, "f1": 2 / 3})


# ---- names


@pytest.mark.parametrize(
    ("prediction", "accuracy"), [("giant panda", 1), ("Giant panda.", 1), ("giant panda eats", 0), ("panda", 0)]
)
def test_a_name_must_be_exact(tmp_path: Path, prediction: str, accuracy: float) -> None:
    task = tasks.ImageNet(str(image_datasets.imagenet(tmp_path)), names=str(tmp_path / "names.txt"))

    assert outcome(task, task.samples()[3], [continuation(prediction)]).scores == {"accuracy": accuracy}


@pytest.mark.parametrize(
    ("prediction", "accuracy"),
    [
        ("three toed", 1),
        ("It is a Three-toed woodpecker.", 1),
        ("downy woodpecker", 0),
        ("three toed or downy", 0),
        ("three toedness", 0),
        ("", 0),
    ],
)
def test_a_bird_is_right_if_the_prediction_names_it_alone(tmp_path: Path, prediction: str, accuracy: float) -> None:
    task = tasks.Birds(str(image_datasets.birds(tmp_path)))

    assert outcome(task, task.samples()[0], [continuation(prediction)]).scores == {"accuracy": accuracy}


# ---- an empty text


def test_an_empty_caption_scores_zero(tmp_path: Path) -> None:
    pytest.importorskip("pycocoevalcap")
    task = tasks.CocoCaption(str(image_datasets.karpathy(tmp_path)), **PLAIN)

    outcomes = [outcome(task, sample, [continuation("")]) for sample in task.samples()]

    assert metric_values(task.metrics(outcomes)) == {"cider_plain": 0, "exact_match": 0}
