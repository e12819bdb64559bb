"""Winograd schemas: whom a pronoun means."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from xml.etree import ElementTree

from kosmos_lit.evaluation.dataset_files import parsing, require_files
from kosmos_lit.evaluation.multiple_choice import MultipleChoice, Question, gap_question
from kosmos_lit.evaluation.task import Sample

PUBLISHED = "WSCollection.xml at cs.nyu.edu/~davise/papers/WinogradSchemas/WS.html"


class Winograd(MultipleChoice):
    """The Winograd Schema Challenge (Levesque et al. 2012), accuracy (the paper's Table 13).

    Each answer stands in the pronoun's place, and what follows it is scored (partial evaluation), as the group's released
    tool has it. All of the paper's figures are multiples of 1/285, so it had the whole collection; WSC273 is its first 273
    schemas. Demonstrations are other schemas: there is no training split.
    """

    title = "Winograd"
    published = "winograd"
    chance = 1 / 2

    def __init__(self, path: str, n_schemas: int | None = None, **options: Any) -> None:
        """Take how many schemas there are beside what every choice has.

        Args:
            path: Folder with the file.
            n_schemas: The first so many of the collection; None: all of it; 273: the set known as WSC273.
            options: As `MultipleChoice` has them.
        """
        super().__init__(path, **options)
        self.n_schemas = n_schemas

    def samples(self) -> Sequence[Sample]:
        [path] = require_files(self.title, self.path, ["WSCollection.xml"], PUBLISHED)
        with parsing(path):
            schemas = ElementTree.parse(path).getroot().findall("schema")
        return [self._sample(f"{path.name}:{i}", one) for i, one in enumerate(schemas[: self.n_schemas], start=1)]

    def pool(self) -> Sequence[Sample]:
        return self.samples()

    def _sample(self, key: str, schema: ElementTree.Element) -> Sample:
        def text(place: str) -> str:
            return " ".join((schema.findtext(place) or "").split())

        options = [" ".join((answer.text or "").split()) for answer in schema.findall("answers/answer")]
        before, after = text("text/txt1"), text("text/txt2")
        before, after = f"{before} " if before else "", after if after[:1] in ("'", ",", ".", ";", "") else f" {after}"
        label = text("correctAnswer").strip(". ")
        return Sample(key=key, data={"before": before, "after": after, "options": options, "label": label})

    def question(self, sample: Sample) -> Question:
        target = self.label(sample, "label", ("A", "B"))
        return gap_question(sample.data["before"], sample.data["after"], sample.data["options"], target)
