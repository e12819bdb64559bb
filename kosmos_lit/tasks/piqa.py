"""PIQA: which of two solutions reaches a goal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kosmos_lit.evaluation.multiple_choice import MultipleChoice, Question
from kosmos_lit.evaluation.prompts import fill_template
from kosmos_lit.evaluation.task import Sample

SOURCE = "yonatanbisk.com/piqa/data"


class Piqa(MultipleChoice):
    """PIQA validation (Bisk et al. 2020), accuracy (the paper's Table 13).

    Each solution continues the goal, as in the group's released tool.
    """

    title = "PIQA"
    published = "piqa"
    chance = 1 / 2

    def __init__(self, path: str, prompt: str = "{goal}", **options: Any) -> None:
        """Set the prompt, beside the options of every multiple-choice task.

        Args:
            path: Folder with the files.
            prompt: Text before a solution; {goal} is the question.
            options: Those of `MultipleChoice`.
        """
        super().__init__(path, **options)
        self.prompt = prompt

    def samples(self) -> Sequence[Sample]:
        return self._read("valid")

    def pool(self) -> Sequence[Sample]:
        return self._read("train")

    def _read(self, split: str) -> list[Sample]:
        names = [f"{split}.jsonl", f"{split}-labels.lst"]
        rows = self.read_labelled(names, ["goal", "sol1", "sol2"], SOURCE)
        return [Sample(key=f"{names[0]}:{number}", data=row) for number, row in enumerate(rows, start=1)]

    def question(self, sample: Sample) -> Question:
        # Stripped: a candidate is joined to its context by one space.
        solutions = (sample.data["sol1"].strip(), sample.data["sol2"].strip())
        context = fill_template(self.prompt, goal=sample.data["goal"].strip())
        return Question((context,), solutions, solutions, self.label(sample, "label", ("0", "1")))
