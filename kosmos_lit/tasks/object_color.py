"""MemoryColor and ColorTerms: the usual colour of an object, from text alone."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

from kosmos_lit.errors import UserError
from kosmos_lit.evaluation.dataset_files import read_json_lines, read_lines, require_files
from kosmos_lit.evaluation.multiple_choice import MultipleChoice, Question
from kosmos_lit.evaluation.prompts import fill_template
from kosmos_lit.evaluation.task import Sample

COLORS = ("black", "blue", "brown", "green", "grey", "orange", "pink", "purple", "red", "white", "yellow")
"""The eleven basic colours, as Memory Colors spells them."""


class ObjectColor(MultipleChoice):
    """An object's colour with the paper's prompt, "The color of {Object} is? {Answer}" (its section 4.9).

    Demonstrations are other objects: there is no training split.
    """

    chance: float | None
    file: ClassVar[str]

    def __init__(
        self,
        path: str,
        prompt: str = "The color of {object} is?",
        colors: tuple[str, ...] = COLORS,
        **options: Any,
    ) -> None:
        """Set the prompt, beside the options of every multiple-choice task.

        Args:
            path: Folder with the file.
            prompt: Text before a colour; {object} is the object with its descriptor ("the inside of a pineapple"), {item}
                the object alone.
            colors: The candidates.
            options: Those of `MultipleChoice`.
        """
        # Before the base class's constructor, where the option `chance` takes its place.
        self.chance = 1 / len(colors)
        super().__init__(path, **options)
        self.prompt, self.colors = prompt, tuple(colors)

    @abstractmethod
    def samples(self) -> Sequence[Sample]: ...

    def pool(self) -> Sequence[Sample]:
        return self.samples()

    def question(self, sample: Sample) -> Question:
        # strip: some objects have no descriptor.
        described = f"{sample.data['descriptor']} {sample.data['item']}".strip()
        context = fill_template(self.prompt, object=described, item=sample.data["item"])
        return Question((context,), self.colors, self.colors, self.label(sample, "label", self.colors))


class MemoryColor(ObjectColor):
    """Memory Colors (Norlund et al. 2021), 109 objects, accuracy (the paper's Table 16)."""

    title = "MemoryColor"
    published = "memory_color"
    file = "memory_colors.jsonl"

    def samples(self) -> Sequence[Sample]:
        source = "github.com/lovhag/measure-visual-commonsense-knowledge, memory_colors/data"
        [path] = require_files(self.title, self.path, [self.file], source)
        rows = read_json_lines(path, ["descriptor", "item", "label"])
        return [Sample(key=f"{self.file}:{number}", data=row) for number, row in enumerate(rows, start=1)]


class ColorTerms(ObjectColor):
    """The concrete objects of Bruni et al. 2012 and their colours, accuracy (the paper's Table 16).

    The file is the one that the group's earlier evaluation reads (VaLM, Wang et al. 2022): below a header, an object and
    its colour a line, separated by a comma. "gray" counts as "grey".
    """

    title = "ColorTerms"
    published = "color_terms"
    file = "color-concrete-objects.csv"

    def samples(self) -> Sequence[Sample]:
        source = "github.com/victorwz/VaLM, folder data/object_color (the list of Bruni et al. 2012)"
        [path] = require_files(self.title, self.path, [self.file], source)
        samples = []
        for number, line in enumerate(read_lines(path), start=1):
            if number > 1 and line.strip():  # line 1 is the header
                row = line.split(",")
                if len(row) != 2:
                    raise UserError(f"{path}:{number}: {line!r} is not an object and its colour, separated by a comma")
                label = row[1].strip().replace("gray", "grey")
                data = {"descriptor": "", "item": row[0].strip(), "label": label}
                samples.append(Sample(key=f"{self.file}:{number}", data=data))
        return samples
