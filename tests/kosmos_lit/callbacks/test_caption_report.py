"""The report at the end of a run: its metrics, answers and contact sheet."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from kosmos_lit.batch import PromptBatch
from kosmos_lit.callbacks.caption_report import (
    AnsweredQuestion,
    CaptionReport,
    draw_contact_sheet,
    exact_match,
    exact_match_shuffled,
)
from kosmos_lit.cli import main
from kosmos_lit.errors import UserError
from kosmos_lit.lit import KosmosLit
from tests.cli_runs import tiny_run
from tests.kosmos_lit.tiny_kosmos import tiny_config, tiny_model

pytestmark = pytest.mark.xdist_group("caption_report")  # one worker: its run is made once

IMAGE = torch.zeros(3, 11, 11, dtype=torch.uint8)


def answer(target: str, prediction: str, prediction_shuffled: str) -> AnsweredQuestion:
    return AnsweredQuestion("object", IMAGE, target, prediction, prediction_shuffled)


ANSWERS = [answer("a", "a", "b"), answer("b", "b", "b"), answer("c", "c d", "a"), answer("d", "D", "a")]


def test_exact_match_is_the_share_of_equal_predictions() -> None:
    assert exact_match(ANSWERS) == 0.5


def test_the_image_control_counts_predictions_from_shuffled_images() -> None:
    assert exact_match_shuffled(ANSWERS) == 0.25


def test_no_question_has_an_exact_match_of_zero() -> None:
    assert exact_match([]) == 0


def test_the_sheet_has_room_for_every_image() -> None:
    sheet = draw_contact_sheet(ANSWERS * 3, columns=5, side=17)

    assert sheet.size[0] >= 5 * 17
    assert sheet.size[1] >= 3 * 17


class Questions:
    """A data module of question batches; without any it raises."""

    def __init__(self, *batches: PromptBatch) -> None:
        self.batches = batches

    def predict_dataloader(self) -> Iterator[PromptBatch]:
        yield from self.batches
        if not self.batches:
            raise UserError("there are no questions")


def questions(*n_images: int) -> PromptBatch:
    """A batch of prompts with so many images; image i is of colour i + 1."""
    images = [torch.full((3, 11, 11), i + 1, dtype=torch.uint8) for i in range(sum(n_images))]
    n = len(n_images)
    return PromptBatch(
        prompts=["x"] * n,
        images=torch.stack(images) if images else torch.zeros(0, 3, 11, 11, dtype=torch.uint8),
        n_images=n_images,
        targets=["y"] * n,
        tasks=["object"] * n,
    )


def lit_that_generates(text: str, tower: str) -> KosmosLit:
    lit = KosmosLit(tiny_config(tower))
    lit.net = tiny_model(tower)
    lit.generate_texts = lambda batch, settings: [text] * len(batch.prompts)  # type: ignore[method-assign, assignment]
    return lit


def end_of_run(folder: Path, lit: KosmosLit, *batches: PromptBatch) -> dict[str, Any]:
    """Return the report of a run that ends with these questions."""
    trainer = SimpleNamespace(
        datamodule=Questions(*batches), is_global_zero=True, default_root_dir=str(folder), callback_metrics={}, global_step=7
    )
    callback = CaptionReport()
    callback.on_train_start(trainer, lit)  # type: ignore[arg-type]
    callback.on_train_end(trainer, lit)  # type: ignore[arg-type]
    report: dict[str, Any] = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    return report


def test_each_question_has_its_own_first_image_or_none(kosmos_tower: str) -> None:
    rows = CaptionReport()._answer(lit_that_generates("y", kosmos_tower), questions(1, 0, 2, 0, 1, 0))

    assert [None if a.image is None else int(a.image[0, 0, 0]) for a in rows] == [1, None, 2, None, 4, None]


def test_a_run_whose_questions_have_no_images_ends_with_its_report(tmp_path: Path, kosmos_tower: str) -> None:
    report = end_of_run(tmp_path, lit_that_generates("y", kosmos_tower), questions(0, 0, 0))

    assert (report["exact_match"], report["n_questions"]) == (1.0, 3)
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert min(sheet.size) > 100


def test_a_run_without_questions_ends_with_its_report(tmp_path: Path, kosmos_tower: str) -> None:
    report = end_of_run(tmp_path, lit_that_generates("y", kosmos_tower))

    assert (report["n_questions"], report["tasks"], report["steps"]) == (0, {}, 7)
    assert (tmp_path / "answers.jsonl").read_text(encoding="utf-8") == ""


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory, tiny_world: Path) -> Path:
    """The folder of a short run that ends with a report."""
    folder = tmp_path_factory.mktemp("reported")
    report = ["--trainer.callbacks+=kosmos_lit.callbacks.CaptionReport", "--trainer.callbacks.max_new_tokens=5"]
    assert main(tiny_run("fit", folder, tiny_world, *report, "--trainer.num_sanity_val_steps=-1")) == 0
    return folder


def test_a_run_ends_with_its_metrics(reported: Path) -> None:
    report = json.loads((reported / "report.json").read_text(encoding="utf-8"))

    keys = {"exact_match", "exact_match_shuffled", "train_seconds", "loss_before", "loss_after", "tokens_per_second"}
    assert keys <= set(report)
    assert set(report["tasks"]) == {"object", "count", "pair"}
    assert report["n_questions"] == report["n_distinct"] >= 200
    assert report["train_seconds"] > 0


def test_losses_before_are_those_of_the_untrained_model(reported: Path) -> None:
    report = json.loads((reported / "report.json").read_text(encoding="utf-8"))

    assert set(report["loss_before"]) == {"text", "caption", "interleaved"}
    assert all(report["loss_after"][name] < loss for name, loss in report["loss_before"].items())


def test_every_answer_is_kept(reported: Path) -> None:
    rows = [json.loads(line) for line in (reported / "answers.jsonl").read_text(encoding="utf-8").splitlines()]
    report = json.loads((reported / "report.json").read_text(encoding="utf-8"))

    assert len(rows) == sum(task["n"] for task in report["tasks"].values())
    assert set(rows[0]) == {"task", "target", "prediction", "prediction_shuffled"}


def test_the_image_sheet_is_an_image(reported: Path) -> None:
    with Image.open(reported / "sheet.png") as sheet:
        assert min(sheet.size) > 400
