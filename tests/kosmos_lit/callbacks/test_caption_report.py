"""The report on what a run has learnt: its figures, and its sheet of pictures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from kosmos_lit.callbacks.caption_report import Answered, draw_sheet, exact, exact_blind
from kosmos_lit.cli import main
from tests.running import tiny_run

PICTURE = torch.zeros(3, 11, 11, dtype=torch.uint8)


def answered(right: str, said: str, blind: str) -> Answered:
    return Answered("object", PICTURE, right, said, blind)


ANSWERS = [answered("a", "a", "b"), answered("b", "b", "b"), answered("c", "c d", "a"), answered("d", "D", "a")]


def test_an_answer_counts_if_it_is_exactly_right() -> None:
    assert exact(ANSWERS) == 0.5


def test_the_control_counts_answers_to_other_pictures() -> None:
    assert exact_blind(ANSWERS) == 0.25


def test_nothing_asked_is_nothing_right() -> None:
    assert exact([]) == 0


def test_the_sheet_has_room_for_every_picture() -> None:
    sheet = draw_sheet(ANSWERS * 3, columns=5, side=17)

    assert sheet.size[0] >= 5 * 17
    assert sheet.size[1] >= 3 * 17


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory, tiny_world: Path) -> Path:
    """The folder of a short run that ends with a report."""
    folder = tmp_path_factory.mktemp("reported")
    report = ["--trainer.callbacks+=kosmos_lit.callbacks.CaptionReport", "--trainer.callbacks.max_new_tokens=5"]
    assert main(tiny_run("fit", folder, tiny_world, *report, "--trainer.num_sanity_val_steps=-1")) == 0
    return folder


def test_a_run_ends_with_its_figures(reported: Path) -> None:
    report = json.loads((reported / "report.json").read_text(encoding="utf-8"))

    wanted = {"exact_match", "exact_match_shuffled", "train_seconds", "loss_before", "loss_after", "tokens_per_second"}
    assert wanted <= set(report)
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
    assert set(rows[0]) == {"task", "right", "said", "said_with_another_picture"}


def test_the_picture_sheet_is_a_picture(reported: Path) -> None:
    with Image.open(reported / "sheet.png") as sheet:
        assert min(sheet.size) > 400
