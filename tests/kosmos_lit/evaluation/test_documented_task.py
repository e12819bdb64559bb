"""The task in docs/evaluation.md works, and the files that the page names exist."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from kosmos_lit.errors import UserError
from kosmos_lit.evaluation.requests import LogLikelihood
from kosmos_lit.evaluation.task import Outcome, Task
from kosmos_lit.inference.results import ScoredCandidate

DOCS = Path(__file__).parents[3] / "docs" / "evaluation.md"


@pytest.fixture(scope="module")
def documented() -> Any:
    """Return the class in the documentation."""
    (code,) = re.findall(r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(code, str(DOCS), "exec", dont_inherit=True), names)
    return names["Colours"]


def test_the_documented_task_asks_and_counts(documented: Any, tmp_path: Path) -> None:
    lines = ['{"id": "7", "image": "7.png", "colour": "red"}', '{"id": "11", "image": "11.png", "colour": "blue"}']
    (tmp_path / "colours.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    task: Task = documented(str(tmp_path))

    outcomes = [answer_red(task, i) for i in range(2)]

    assert [outcome.scores for outcome in outcomes] == [{"accuracy": 1.0}, {"accuracy": 0.0}]
    assert task.metrics(outcomes)["accuracy"].value == 0.5


def answer_red(task: Task, number: int) -> Outcome:
    """Run a task as the scheduler does, with responses that hold everything red likeliest."""
    sample = task.samples()[number]
    generator = task.ask(sample, [])
    (request,) = next(generator)
    assert request == LogLikelihood((sample.images[0], "The colour of this image is"), ("red", "green", "blue"))
    with pytest.raises(StopIteration) as end:
        generator.send([tuple(ScoredCandidate(text, (-1.0 if text == "red" else -2.0,)) for text in request.candidates)])
    assert isinstance(end.value.value, Outcome)
    return end.value.value


def test_the_documented_task_names_missing_files(documented: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"colours\.jsonl"):
        documented(str(tmp_path)).samples()


def test_every_overlay_that_the_documentation_names_exists() -> None:
    text = DOCS.read_text(encoding="utf-8")

    overlays = re.findall(r"configs/eval/(\w+)\.yaml", text) + re.findall(
        r"`(\w+)`(?:, `\w+`)? \|", text.split("## What the paper")[0]
    )

    assert overlays
    assert not [name for name in overlays if not (DOCS.parents[1] / "configs" / "eval" / f"{name}.yaml").is_file()]
