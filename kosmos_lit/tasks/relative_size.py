"""RelativeSize: which of two objects is larger, from text alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from kosmos_lit.errors import UserError
from kosmos_lit.evaluation.dataset_files import read_lines, require_files
from kosmos_lit.evaluation.multiple_choice import MultipleChoice, Question
from kosmos_lit.evaluation.prompts import fill_template
from kosmos_lit.evaluation.task import Sample

SOURCE = "the relative size dataset of grail.cs.washington.edu/projects/size, file ObjectSize/sizePairsFull.txt"


class RelativeSize(MultipleChoice):
    """RelativeSize (Bagherinezhad et al. 2016), accuracy (the paper's Table 16).

    The paper's prompt; its answers, "Yes" and "No", are the candidates. The file names the larger of two objects first, and
    the paper does not say in which order it asks. In that order alone, as in the group's earlier script (VaLM, Wang et al.
    2022), a model that always answers yes is always right; so by default each pair is asked in both orders, where such a
    model is right half of the time. Demonstrations are questions about other pairs: there is no training split.
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
        """Set the prompt, beside the options of every multiple-choice task.

        Args:
            path: Folder with the file.
            prompt: Text before an answer; {first} and {second} are the objects.
            answers: Words for yes and no.
            orders: Ask each pair in both orders, or with the larger object first.
            file: The file's name; a pair a line, the larger object first, separated by a blank or tab.
            options: Those of `MultipleChoice`.
        """
        if orders == "larger_first":
            self.chance = None  # the right answer is always yes
        super().__init__(path, **options)
        self.prompt, self.answers = prompt, tuple(answers)
        self.orders, self.file = orders, file

    def samples(self) -> Sequence[Sample]:
        [path] = require_files(self.title, self.path, [self.file], SOURCE)
        samples = []
        for number, line in enumerate(read_lines(path), start=1):
            # Objects of several words are only told apart by a tab.
            pair = line.split("\t") if "\t" in line else line.split()
            if line.strip():
                if len(pair) != 2:
                    raise UserError(f"{path}:{number}: {line!r} is not a pair of objects, the larger one first")
                larger, smaller = (name.strip() for name in pair)
                objects = {"first": larger, "second": smaller, "line": number}
                # Labels are indices into `answers`: 0 is yes.
                samples.append(Sample(key=f"{self.file}:{number}", data=objects | {"label": "0"}))
                if self.orders == "both":
                    turned = objects | {"first": smaller, "second": larger, "label": "1"}
                    samples.append(Sample(key=f"{self.file}:{number}, turned", data=turned))
        return samples

    def pool(self) -> Sequence[Sample]:
        return self.samples()

    def shots(self, sample: Sample, pool: Sequence[Sample]) -> list[Sample]:
        """Draw demonstrations from other pairs: the same pair in the other order would give the answer away."""
        return super().shots(sample, [other for other in pool if other.data["line"] != sample.data["line"]])

    def question(self, sample: Sample) -> Question:
        context = fill_template(self.prompt, first=sample.data["first"], second=sample.data["second"])
        return Question((context,), self.answers, self.answers, self.label(sample, "label", ("0", "1")))
