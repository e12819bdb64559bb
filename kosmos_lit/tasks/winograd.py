"""Winograd schemas: the referent of a pronoun."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from xml.etree import ElementTree

from kosmos_lit.evaluation.dataset_files import parsing, require_files
from kosmos_lit.evaluation.multiple_choice import MultipleChoice, Question, gap_question
from kosmos_lit.evaluation.task import Sample

SOURCE = "WSCollection.xml at cs.nyu.edu/~davise/papers/WinogradSchemas/WS.html"


class Winograd(MultipleChoice):
    """The Winograd Schema Challenge (Levesque et al. 2012), accuracy (the paper's Table 13).

    Each answer takes the pronoun's place, and the text after it is scored (partial evaluation), as in the group's released
    tool. All of the paper's accuracies are multiples of 1/285, so it had the full collection; WSC273 is its first 273
    schemas. Demonstrations are other schemas: there is no training split.
    """

    title = "Winograd"
    published = "winograd"
    chance = 1 / 2

    def __init__(self, path: str, n_schemas: int | None = None, **options: Any) -> None:
        """Set the number of schemas, beside the options of every multiple-choice task.

        Args:
            path: Folder with the file.
            n_schemas: Number of the collection's first schemas; None: all; 273: the set known as WSC273.
            options: Those of `MultipleChoice`.
        """
        super().__init__(path, **options)
        self.n_schemas = n_schemas

    def samples(self) -> Sequence[Sample]:
        [path] = require_files(self.title, self.path, ["WSCollection.xml"], SOURCE)
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
