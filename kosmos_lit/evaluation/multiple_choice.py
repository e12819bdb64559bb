"""Base of the tasks that choose among candidates by their log-probability as continuations.

The paper names neither the prompts nor the scoring rule of its language tasks. The defaults of the tasks in
`kosmos_lit.tasks` are those of the tools that the same group has published for its earlier and later models (microsoft/LMOps
`structured_prompting`, microsoft/unilm `kosmos-2/evaluation/seed-bench`): plain continuations without instructions, and the
mean log-probability of a candidate's tokens. These tools end a demonstration with </s>; a prompt here is one document, so
demonstrations are lines of it.
"""

from __future__ import annotations

import math
import re
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from kosmos_lit.errors import UserError
from kosmos_lit.evaluation.dataset_files import read_json_lines, read_labels, require_files
from kosmos_lit.evaluation.prompts import few_shot_prompt
from kosmos_lit.evaluation.requests import LogLikelihood, Parts, scored_candidates
from kosmos_lit.evaluation.task import Outcome, RequestGenerator, Sample, Task
from kosmos_lit.inference.results import ScoredCandidate

Scoring = Literal["mean", "sum", "bytes", "unconditional"]


def softmax(values: Sequence[float]) -> list[float]:
    """Return e to the power of each value, divided by their sum."""
    highest = max(values)  # subtracted, so that no power overflows
    powers = [math.exp(value - highest) for value in values]
    return [power / sum(powers) for power in powers]


def candidate_probabilities(candidates: Sequence[ScoredCandidate]) -> list[float]:
    """Return the probability of each candidate given that it is one of them."""
    return softmax([candidate.total for candidate in candidates])


def accuracy_with_ties(values: Sequence[float], target: int) -> float:
    """Return 1 if the target alone has the highest value, 1/k if k candidates share it with the target among them, else 0.

    So a model that cannot tell candidates apart scores as guessing does.
    """
    best = [i for i, value in enumerate(values) if value == max(values)]
    return float(target in best) / len(best)


@dataclass(frozen=True)
class Question:
    """A sample as text."""

    contexts: tuple[str, ...]
    """Texts that candidates continue: one for all candidates, or one for each."""
    candidates: tuple[str, ...]
    """Texts to score, each with a space between it and its context."""
    names: tuple[str, ...]
    """Each candidate's name in results."""
    target: int
    """Index of the right candidate."""

    @property
    def solved(self) -> str:
        """The question with its right answer, as a demonstration."""
        # Modulo: the index is 0 if all candidates share one context.
        return f"{self.contexts[self.target % len(self.contexts)]} {self.candidates[self.target]}"


class MultipleChoice(Task):
    """Predicts the candidate that is likeliest after the prompt."""

    main_metric: ClassVar[str] = "accuracy"

    def __init__(
        self,
        path: str,
        scoring: Scoring = "mean",
        separator: str = "\n",
        unconditional: str = "Answer:",
        **common: Any,
    ) -> None:
        """Set the options that every multiple-choice task has.

        Args:
            path: Folder with the dataset's files as their authors distribute them.
            scoring: Score of a candidate: `mean` or `sum` of its tokens' log-probabilities, the sum divided by its `bytes`
                of UTF-8, or the sum minus that after the `unconditional` prompt (Brown et al. 2020, section 2.4).
            separator: Text between demonstrations, and between the last one and the question; a newline is </line>.
            unconditional: Prompt of the candidates' second scores with scoring `unconditional`.
            **common: Options of every task.
        """
        super().__init__(path, **common)
        self.scoring, self.separator, self.unconditional = scoring, separator, unconditional

    @abstractmethod
    def question(self, sample: Sample) -> Question:
        """Return a sample as text."""

    def label(self, sample: Sample, name: str, labels: Sequence[str]) -> int:
        """Return the index of a sample's label among `labels`.

        Raises: UserError naming the sample if its label is another one, as in a test split without labels.
        """
        # Labels are numbers in some files, booleans in BoolQ, words in others.
        label = str(sample.data[name])
        if label not in labels:
            raise UserError(
                f"{self.title}, {sample.key}: {name} is {label!r}, not one of {', '.join(labels)}; a split without labels "
                "cannot be evaluated"
            )
        return labels.index(label)

    def read_labelled(self, names: Sequence[str], fields: Sequence[str], source: str) -> list[dict[str, Any]]:
        """Return the rows of a JSON-lines file, each with `label` from its file of labels; `names` are both files' names.

        Raises: UserError if a file is missing, or their lengths differ.
        """
        rows_path, labels_path = require_files(self.title, self.path, names, source)
        rows = read_json_lines(rows_path, fields)
        return [row | {"label": label} for row, label in zip(rows, read_labels(labels_path, len(rows)), strict=True)]

    def requests(self, sample: Sample, shots: Sequence[Sample]) -> list[LogLikelihood]:
        """Return one request if all candidates continue one context, else one for each; `unconditional` adds as many."""
        question = self.question(sample)
        demonstrations: list[Parts] = [(self.question(shot).solved,) for shot in shots]
        # One context takes one prefill for all candidates.
        if len(question.contexts) == 1:
            pairs = [(question.contexts[0], question.candidates)]
        else:
            pairs = [(c, (candidate,)) for c, candidate in zip(question.contexts, question.candidates, strict=True)]
        conditional = [
            LogLikelihood(few_shot_prompt(demonstrations, (context,), self.separator), candidates)
            for context, candidates in pairs
        ]
        # Grouped like `pairs`: candidate_scores halves the list of all candidates.
        unconditional = [LogLikelihood((self.unconditional,), candidates) for _, candidates in pairs]
        return [*conditional, *unconditional] if self.scoring == "unconditional" else conditional

    def ask(self, sample: Sample, shots: Sequence[Sample]) -> RequestGenerator:
        question = self.question(sample)
        responses = yield self.requests(sample, shots)
        candidates = [candidate for response in responses for candidate in scored_candidates(response)]
        values = candidate_scores(candidates, self.scoring)
        choice = int(np.argmax(values))  # the first of several; the score counts ties by share
        return Outcome(
            prediction=question.names[choice],
            target=question.names[question.target],
            scores={"accuracy": accuracy_with_ties(values, question.target)},
            data={
                "choice": choice,
                "label": question.target,
                "values": values,
                "probabilities": dict(zip(question.names, softmax(values), strict=True)),
            },
        )


def candidate_scores(candidates: Sequence[ScoredCandidate], scoring: Scoring) -> list[float]:
    """Return each candidate's score in nats; for `unconditional` the second half of the list has the prior scores."""
    if scoring == "mean":
        return [one.mean for one in candidates]
    if scoring == "bytes":
        return [one.total / len(one.text.encode()) for one in candidates]
    if scoring == "unconditional":
        half = len(candidates) // 2
        return [after.total - prior.total for after, prior in zip(candidates[:half], candidates[half:], strict=True)]
    return [one.total for one in candidates]


def gap_question(before: str, after: str, options: Sequence[str], target: int) -> Question:
    """Return a sentence with a gap as a question: which option makes the rest of the sentence likeliest.

    "Partial evaluation" (Trinh and Le 2018, arXiv 1806.02847): each option fills the gap in its own context, and the text
    after it is scored. Characters attached to the option ("'s", a comma) belong to the context, unless nothing else follows.
    """
    # DOTALL: a sentence may have line breaks.
    attached, rest = re.match(r"(\S*)(.*)", after, re.DOTALL).groups()  # type: ignore[union-attr]
    # Nothing else could be scored, so what is attached becomes the candidate.
    if not rest.strip():
        attached, rest = "", after
    contexts = tuple(f"{before}{option}{attached}" for option in options)
    # The candidates are equal; their contexts differ.
    return Question(contexts, (rest.strip(),) * len(options), tuple(options), target)
