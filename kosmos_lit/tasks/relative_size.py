"""RelativeSize: which of two things is larger, from text alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from kosmos_lit.errors import UserError
from kosmos_lit.evaluation.dataset_files import read_lines, require_files
from kosmos_lit.evaluation.multiple_choice import MultipleChoice, Question
from kosmos_lit.evaluation.prompts import fill_template
from kosmos_lit.evaluation.task import Sample

PUBLISHED = "the relative size dataset of grail.cs.washington.edu/projects/size, file ObjectSize/sizePairsFull.txt"


class RelativeSize(MultipleChoice):
    """RelativeSize (Bagherinezhad et al. 2016), accuracy (the paper's Table 16).

    The paper's prompt; its answers, "Yes" and "No", are the candidates. The file names the larger of two things first, and
    the paper does not say in which order it asks. Asked in that order alone, as the group's earlier script does (VaLM, Wang
    et al. 2022), a model that always says yes gets everything right; so each pair is asked in both orders by default, where
    such a model gets half. Demonstrations are questions about other pairs: there is no training split.
    """

    title = "RelativeSize"
    published = "relative_size"
    chance: float | None = 1 / 2

    def __init__(
        self,
        path: str,
        prompt: str = "Is {first} larger than {second}?",
        answers: tuple[str, str] = ("Yes", "No"),
        orders: Literal["both", "larger_first"] = "both",
        file: str = "sizePairsFull.txt",
        **options: Any,
    ) -> None:
        """Take the prompt beside what every choice has.

        Args:
            path: Folder with the file.
            prompt: What an answer follows; {first} and {second} stand for the things.
            answers: Words for yes and no.
            orders: Whether each pair is asked in both orders, or with the larger thing first.
            file: The file's name; a pair a line, the larger thing first, a blank or tab between.
            options: As `MultipleChoice` has them.
        """
        if orders == "larger_first":
            self.chance = None  # the answer is always yes
        super().__init__(path, **options)
        self.prompt, self.answers = prompt, tuple(answers)
        self.orders, self.file = orders, file

    def samples(self) -> Sequence[Sample]:
        [path] = require_files(self.title, self.path, [self.file], PUBLISHED)
        found = []
        for number, line in enumerate(read_lines(path), start=1):
            pair = line.split("\t") if "\t" in line else line.split()
            if line.strip():
                if len(pair) != 2:
                    raise UserError(f"{path}:{number}: {line!r} is no pair of things, the larger one first")
                larger, smaller = (thing.strip() for thing in pair)
                things = {"first": larger, "second": smaller, "line": number}
                found.append(Sample(key=f"{self.file}:{number}", data=things | {"label": "0"}))
                if self.orders == "both":
                    turned = things | {"first": smaller, "second": larger, "label": "1"}
                    found.append(Sample(key=f"{self.file}:{number}, turned", data=turned))
        return found

    def pool(self) -> Sequence[Sample]:
        return self.samples()

    def shots(self, sample: Sample, pool: Sequence[Sample]) -> list[Sample]:
        """Draw demonstrations among other pairs: the same one turned would give the answer away."""
        return super().shots(sample, [other for other in pool if other.data["line"] != sample.data["line"]])

    def question(self, sample: Sample) -> Question:
        context = fill_template(self.prompt, first=sample.data["first"], second=sample.data["second"])
        return Question((context,), self.answers, self.answers, self.label(sample, "label", ("0", "1")))
