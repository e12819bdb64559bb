"""PIQA: which of two ways reaches a goal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kosmos_lit.evaluation.multiple_choice import MultipleChoice, Question
from kosmos_lit.evaluation.prompts import fill_template
from kosmos_lit.evaluation.task import Sample

PUBLISHED = "yonatanbisk.com/piqa/data"


class Piqa(MultipleChoice):
    """PIQA validation (Bisk et al. 2020), accuracy (the paper's Table 13).

    The goal is continued by each solution, as the group's released tool has it.
    """

    title = "PIQA"
    published = "piqa"
    chance = 1 / 2

    def __init__(self, path: str, prompt: str = "{goal}", **options: Any) -> None:
        """Take the prompt beside what every choice has.

        Args:
            path: Folder with the files.
            prompt: What a solution follows; {goal} stands for the question.
            options: As `MultipleChoice` has them.
        """
        super().__init__(path, **options)
        self.prompt = prompt

    def samples(self) -> Sequence[Sample]:
        return self._read("valid")

    def pool(self) -> Sequence[Sample]:
        return self._read("train")

    def _read(self, split: str) -> list[Sample]:
        names = [f"{split}.jsonl", f"{split}-labels.lst"]
        rows = self.read_labelled(names, ["goal", "sol1", "sol2"], PUBLISHED)
        return [Sample(key=f"{names[0]}:{number}", data=row) for number, row in enumerate(rows, start=1)]

    def question(self, sample: Sample) -> Question:
        ways = (sample.data["sol1"].strip(), sample.data["sol2"].strip())
        context = fill_template(self.prompt, goal=sample.data["goal"].strip())
        return Question((context,), ways, ways, self.label(sample, "label", ("0", "1")))
