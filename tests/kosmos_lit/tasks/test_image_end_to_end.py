"""Files -> samples -> prompts -> model -> outcomes -> metrics, for every vision-language task."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kosmos_lit import tasks
from kosmos_lit.evaluation.config import EvalConfig
from kosmos_lit.evaluation.runner import evaluate
from kosmos_lit.evaluation.task import Task
from kosmos_lit.inference.config import GenerationConfig
from kosmos_lit.inference.engine import Engine
from kosmos_lit.model import Kosmos
from kosmos_lit.tokenizer import Tokenizer
from tests.kosmos_lit.tasks import image_datasets
from tests.kosmos_lit.tiny_kosmos import tiny_model

SHORT = {"settings": GenerationConfig(max_new_tokens=5)}
BEAM = {"settings": GenerationConfig(n_beams=2, max_new_tokens=5)}
NAMES = {"settings": GenerationConfig(n_beams=2, max_new_tokens=32)}

TASKS: dict[str, Callable[[Path], Task]] = {
    "coco_caption_2": lambda f: tasks.CocoCaption(str(image_datasets.karpathy(f)), n_shots=2, metrics=[], **BEAM),
    "flickr30k": lambda f: tasks.Flickr30k(str(image_datasets.karpathy(f, "flickr30k")), metrics=[], **BEAM),
    "vqav2_2": lambda f: tasks.Vqav2(str(image_datasets.vqav2(image_datasets.vqav2(f), "train2014")), n_shots=2, **SHORT),
    "vizwiz": lambda f: tasks.VizWiz(str(image_datasets.vizwiz(f)), **SHORT),
    "raven_iq50": lambda f: tasks.Raven(str(image_datasets.raven(f)), no="No"),
    "rendered_sst2_4": lambda f: tasks.RenderedSst2(str(image_datasets.rendered(f)), n_shots=4),
    "rendered_sst2_cot": lambda f: tasks.RenderedSst2ChainOfThought(str(image_datasets.rendered(f)), **SHORT),
    "hateful_memes": lambda f: tasks.HatefulMemes(str(image_datasets.memes(f))),
    "websrc": lambda f: tasks.WebSrc(str(image_datasets.websrc(f)), **SHORT),
    "websrc_without_text": lambda f: tasks.WebSrc(str(image_datasets.websrc(f)), with_text=False, **SHORT),
    "imagenet": lambda f: tasks.ImageNet(str(image_datasets.imagenet(f)), names=str(f / "names.txt"), **BEAM),
    "imagenet_constrained": lambda f: tasks.ImageNet(
        str(image_datasets.imagenet(f)), names=str(f / "names.txt"), constrained=True, **NAMES
    ),
    "birds": lambda f: tasks.Birds(str(image_datasets.birds(f)), with_descriptions=False, **SHORT),
    "birds_with_descriptions": lambda f: tasks.Birds(str(image_datasets.birds(f)), **SHORT),
}
METRICS = {
    "coco_caption_2": "exact_match",
    "flickr30k": "exact_match",
    "vqav2_2": "vqa_accuracy",
    "vizwiz": "vqa_accuracy",
    "hateful_memes": "roc_auc",
    "websrc": "f1",
    "websrc_without_text": "exact_match",
}
"""A metric of each task; accuracy for the tasks without an entry."""


@pytest.fixture(scope="module")
def model(kosmos_tower: str) -> Kosmos:
    return tiny_model(kosmos_tower, max_seq_len=499)


def results(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name / "samples.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", TASKS)
def test_a_task_goes_from_files_to_metrics(name: str, model: Kosmos, kosmos_tokenizer: Tokenizer, tmp_path: Path) -> None:
    task = TASKS[name](tmp_path / "data")

    entry = evaluate(Engine(model, kosmos_tokenizer), EvalConfig(tasks={name: task}), tmp_path / "out")[name]

    rows = results(tmp_path / "out", name)
    assert [row["error"] for row in rows] == [None] * len(task.samples())
    assert entry["n_samples"] == entry["metrics"][METRICS.get(name, "accuracy")]["n"] == len(rows)
    assert all(0 <= metric["low"] <= metric["value"] <= metric["high"] <= 1 for metric in entry["metrics"].values())
    assert entry["published"] == name.removesuffix("_2").removesuffix("_4")
    assert all(len(row["requests"][-1]["images"]) >= 1 for row in rows)


def test_constrained_predictions_are_among_the_names(model: Kosmos, kosmos_tokenizer: Tokenizer, tmp_path: Path) -> None:
    task = TASKS["imagenet_constrained"](tmp_path / "data")

    evaluate(Engine(model, kosmos_tokenizer), EvalConfig(tasks={"names": task}), tmp_path / "out")

    assert {row["prediction"] for row in results(tmp_path / "out", "names")} <= {"tench", "giant panda"}


def test_the_rationale_is_in_the_second_prompt(model: Kosmos, kosmos_tokenizer: Tokenizer, tmp_path: Path) -> None:
    task = TASKS["rendered_sst2_cot"](tmp_path / "data")

    evaluate(Engine(model, kosmos_tokenizer), EvalConfig(tasks={"cot": task}), tmp_path / "out")

    for row in results(tmp_path / "out", "cot"):
        first, second = row["requests"]
        assert first["prompt"] == "<image>Introduce this picture in detail:"
        assert row["data"]["rationale"] == first["prediction"].strip()
        assert second["prompt"].startswith(f"<image>{row['data']['rationale']}")


def test_scores_of_captions_are_in_the_samples(model: Kosmos, kosmos_tokenizer: Tokenizer, tmp_path: Path) -> None:
    pytest.importorskip("pycocoevalcap")
    task = tasks.CocoCaption(str(image_datasets.karpathy(tmp_path / "data")), metrics=["cider"], tokens="plain", **SHORT)

    entry = evaluate(Engine(model, kosmos_tokenizer), EvalConfig(tasks={"coco": task}), tmp_path / "out")["coco"]

    rows = results(tmp_path / "out", "coco")
    assert all(row["scores"].keys() == {"cider_plain", "exact_match"} and row["requests"] for row in rows)
    mean = sum(row["scores"]["cider_plain"] for row in rows) / len(rows)
    assert mean == pytest.approx(entry["metrics"]["cider_plain"]["value"])


def test_a_metric_that_is_not_defined_is_null(model: Kosmos, kosmos_tokenizer: Tokenizer, tmp_path: Path) -> None:
    task = tasks.HatefulMemes(
        str(image_datasets.memes(tmp_path / "data")), max_samples=1
    )  # of one class, so without an area

    evaluate(Engine(model, kosmos_tokenizer), EvalConfig(tasks={"memes": task}), tmp_path / "out")

    assert "NaN" not in (text := (tmp_path / "out" / "metrics.json").read_text())
    assert json.loads(text)["tasks"]["memes"]["metrics"]["roc_auc"]["value"] is None


def test_the_servers_input_is_beside_the_results(model: Kosmos, kosmos_tokenizer: Tokenizer, tmp_path: Path) -> None:
    image_datasets.vqav2(tmp_path / "data", "test-dev2015", 3, answered=False)
    task = tasks.Vqav2(str(tmp_path / "data"), split="test-dev2015", **SHORT)

    entry = evaluate(Engine(model, kosmos_tokenizer), EvalConfig(tasks={"vqa": task}), tmp_path / "out")["vqa"]

    assert entry["metrics"] == {}
    submission = json.loads((tmp_path / "out" / "vqa" / "submission_test-dev2015.json").read_text())
    assert [row["question_id"] for row in submission] == [10, 11, 12]
    assert [row["answer"] for row in submission] == [row["prediction"] for row in results(tmp_path / "out", "vqa")]


def test_an_image_that_is_missing_is_listed(model: Kosmos, kosmos_tokenizer: Tokenizer, tmp_path: Path) -> None:
    task = TASKS["vizwiz"](tmp_path / "data")
    task.samples()[1].images[0].unlink()

    entry = evaluate(Engine(model, kosmos_tokenizer), EvalConfig(tasks={"vizwiz": task}), tmp_path / "out")["vizwiz"]

    assert (entry["n_samples"], entry["n_failed"], entry["metrics"]["vqa_accuracy"]["n"]) == (3, 1, 2)


def test_shuffled_images_give_metrics(model: Kosmos, kosmos_tokenizer: Tokenizer, tmp_path: Path) -> None:
    task = tasks.Raven(str(image_datasets.raven(tmp_path / "data", givens=[3, 3, 3])))

    config = EvalConfig(tasks={"raven": task}, image_control="shuffled")
    entry = evaluate(Engine(model, kosmos_tokenizer), config, tmp_path / "out")["raven"]

    assert entry["n_failed"] == 0
    assert not math.isnan(entry["metrics"]["accuracy"]["value"])
