"""BoolQ, CB and COPA as SuperGLUE distributes them: a folder each, with train.jsonl and val.jsonl."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from kosmos_lit.evaluation.dataset_files import read_json_lines, require_files
from kosmos_lit.evaluation.multiple_choice import MultipleChoice, Question
from kosmos_lit.evaluation.prompts import fill_template
from kosmos_lit.evaluation.statistics import Metric, macro_f1_metric
from kosmos_lit.evaluation.task import Outcome, Sample

SOURCE = "super.gluebenchmark.com/tasks"


class SuperGlue(MultipleChoice):
    """A task of SuperGLUE (Wang et al. 2019): its validation set, with demonstrations from its training set."""

    fields: ClassVar[Sequence[str]]
    """Keys that each line has, beside its label."""

    def samples(self) -> Sequence[Sample]:
        return self._read("val.jsonl")

    def pool(self) -> Sequence[Sample]:
        return self._read("train.jsonl")

    def _read(self, name: str) -> list[Sample]:
        [path] = require_files(self.title, self.path, [name], SOURCE)
        rows = read_json_lines(path, [*self.fields, "label"])
        return [Sample(key=f"{name}:{number}", data=row) for number, row in enumerate(rows, start=1)]


class BoolQ(SuperGlue):
    """BoolQ validation (Clark et al. 2019), accuracy (the paper's Table 13).

    Prompt and answers are the first ones in the group's released tool.
    """

    title = "BoolQ"
    published = "boolq"
    chance = 1 / 2
    fields = ("passage", "question")

    def __init__(
        self,
        path: str,
        prompt: str = "Passage: {passage} After reading this passage, I have a question: {question}? True or False?",
        answers: tuple[str, str] = ("False", "True"),
        **options: Any,
    ) -> None:
        """Set the prompt, beside the options of every multiple-choice task.

        Args:
            path: Folder with the files.
            prompt: Text before an answer; {passage} and {question}, the question without its question mark.
            answers: Words for no and yes.
            options: Those of `MultipleChoice`.
        """
        super().__init__(path, **options)
        self.prompt, self.answers = prompt, tuple(answers)

    def question(self, sample: Sample) -> Question:
        passage, question = sample.data["passage"].strip(), sample.data["question"].strip().removesuffix("?")
        # str() of JSON's booleans.
        target = self.label(sample, "label", ("False", "True"))
        return Question(
            (fill_template(self.prompt, passage=passage, question=question),), self.answers, self.answers, target
        )


class CommitmentBank(SuperGlue):
    """CommitmentBank validation (de Marneffe et al. 2019): accuracy (the paper's Table 13), and macro F1 as SuperGLUE has.

    Prompt and answers are the first ones in the group's released tool. Of the 56 samples most are contradictions, so that
    always predicting that class beats chance.
    """

    title = "CB"
    published = "cb"
    chance = 1 / 3
    fields = ("premise", "hypothesis")

    def __init__(
        self,
        path: str,
        prompt: str = "{premise} Question: {hypothesis}. True, False, or Neither? Answer:",
        answers: tuple[str, str, str] = ("True", "False", "Neither"),
        **options: Any,
    ) -> None:
        """Set the prompt, beside the options of every multiple-choice task.

        Args:
            path: Folder with the files.
            prompt: Text before an answer; {premise} and {hypothesis}, the latter without its full stop.
            answers: Words for entailment, contradiction and neutral.
            options: Those of `MultipleChoice`.
        """
        super().__init__(path, **options)
        self.prompt, self.answers = prompt, tuple(answers)

    def question(self, sample: Sample) -> Question:
        premise, hypothesis = (sample.data[name].strip() for name in self.fields)
        target = self.label(sample, "label", ("entailment", "contradiction", "neutral"))
        context = fill_template(self.prompt, premise=premise, hypothesis=hypothesis.removesuffix("."))
        return Question((context,), self.answers, self.answers, target)

    def metrics(self, outcomes: Sequence[Outcome]) -> dict[str, Metric]:
        choices = np.array([outcome.data["choice"] for outcome in outcomes], dtype=np.int64)
        labels = np.array([outcome.data["label"] for outcome in outcomes], dtype=np.int64)
        return super().metrics(outcomes) | {"macro_f1": macro_f1_metric(choices, labels)}


class Copa(SuperGlue):
    """COPA validation (Roemmele et al. 2011), accuracy (the paper's Table 13).

    The premise without its full stop, a connective, and each choice with a lower-case first letter, as in the group's
    released tool; "I" keeps its capital.
    """

    title = "COPA"
    published = "copa"
    chance = 1 / 2
    fields = ("premise", "choice1", "choice2", "question")

    def __init__(self, path: str, cause: str = "because", effect: str = "so", **options: Any) -> None:
        """Set the connectives, beside the options of every multiple-choice task.

        Args:
            path: Folder with the files.
            cause: Text between a premise and its cause.
            effect: Text between a premise and its effect.
            options: Those of `MultipleChoice`.
        """
        super().__init__(path, **options)
        self.connectives = {"cause": cause, "effect": effect}

    def question(self, sample: Sample) -> Question:
        # Through `label`, which refuses any other kind with the sample's key.
        kind = tuple(self.connectives)[self.label(sample, "question", tuple(self.connectives))]
        # The connective goes on with the premise's sentence, so its full stop goes.
        context = f"{sample.data['premise'].strip().removesuffix('.')} {self.connectives[kind]}"
        choices = (sample.data["choice1"].strip(), sample.data["choice2"].strip())
        return Question((context,), tuple(map(_lowered, choices)), choices, self.label(sample, "label", ("0", "1")))


def _lowered(text: str) -> str:
    # Split at apostrophes too: "I'm" keeps its capital.
    return text if text.split("'")[0].split()[0] == "I" else text[:1].lower() + text[1:]
