"""Tasks that choose among candidates by their probability as continuations: what all of them share.

The paper names neither the prompts nor the scoring rule of its language tasks. The defaults of the
tasks in `kosmos_lit.tasks` are those of the tools that the same group has published for its earlier and later models
(microsoft/LMOps `structured_prompting`, microsoft/unilm `kosmos-2/evaluation/seed-bench`): plain continuations without
instructions, and the mean log-probability of a candidate's tokens. These tools end a demonstration with </s>; a prompt here
is one document, so demonstrations are lines of it.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from kosmos_lit.errors import UserError
from kosmos_lit.evaluation.answers import compared, credit, softmax
from kosmos_lit.evaluation.dataset_files import need, read_json_lines, read_labels
from kosmos_lit.evaluation.prompts import in_context
from kosmos_lit.evaluation.requests import LogLikelihood, Parts
from kosmos_lit.evaluation.task import Outcome, RequestGenerator, Sample, Task
from kosmos_lit.inference.results import ScoredCandidate

Scoring = Literal["mean", "sum", "bytes", "unconditional"]


@dataclass(frozen=True)
class Question:
    """A sample as text."""

    contexts: tuple[str, ...]
    """What candidates continue: one text for all of them, or one for each."""
    candidates: tuple[str, ...]
    """What is scored, read as text with a space between it and its context."""
    names: tuple[str, ...]
    """What each candidate is called in results."""
    target: int
    """The right one's number."""

    @property
    def solved(self) -> str:
        """The question with its right answer, as a demonstration."""
        return f"{self.contexts[self.target % len(self.contexts)]} {self.candidates[self.target]}"


class MultipleChoice(Task):
    """Chooses the candidate that is likeliest after the prompt."""

    headline: ClassVar[str] = "accuracy"

    def __init__(
        self,
        path: str,
        scoring: Scoring = "mean",
        separator: str = "\n",
        unconditional: str = "Answer:",
        **common: Any,
    ) -> None:
        """Take what every choice among candidates has.

        Args:
            path: Folder with the dataset's files as their authors distribute them.
            scoring: What of a candidate's log-probabilities decides: `mean` or `sum` over its tokens, sum over `bytes` of
                UTF-8, or sum less that after the `unconditional` prompt (Brown et al. 2020, section 2.4).
            separator: Text between demonstrations, and between the last one and the question; a newline is </line>.
            unconditional: What candidates follow in the second look of scoring `unconditional`.
            **common: What every task takes.
        """
        super().__init__(path, **common)
        self.scoring, self.separator, self.unconditional = scoring, separator, unconditional

    @abstractmethod
    def question(self, sample: Sample) -> Question:
        """Return a sample as text."""

    def label(self, sample: Sample, name: str, known: Sequence[str]) -> int:
        """Return which of the known labels a sample has.

        Raises: UserError naming the sample if it has none of them, as in a test split without labels.
        """
        found = str(sample.data[name])
        if found not in known:
            labels = ", ".join(known)
            where = f"{self.title}, {sample.key}"
            raise UserError(f"{where}: {name} is {found!r}, not one of {labels}; a split without labels cannot be evaluated")
        return known.index(found)

    def labelled(self, names: Sequence[str], fields: Sequence[str], published: str) -> list[dict[str, Any]]:
        """Return the lines of a file together with those of its file of labels, as `label`.

        Raises: UserError if a file is missing, or they do not belong together.
        """
        rows, labels = need(self.title, self.path, names, published)
        found = read_json_lines(rows, fields)
        return [row | {"label": label} for row, label in zip(found, read_labels(labels, len(found)), strict=True)]

    def requests(self, sample: Sample, shots: Sequence[Sample]) -> list[LogLikelihood]:
        """Return what is asked: one request where all candidates continue one context, else one for each."""
        question = self.question(sample)
        shown = [(self.question(shot).solved,) for shot in shots]

        def behind(context: str) -> Parts:
            return in_context(shown, (context,), self.separator)

        if len(question.contexts) == 1:
            asked = [LogLikelihood(behind(question.contexts[0]), question.candidates)]
            plain = [LogLikelihood((self.unconditional,), question.candidates)]
        else:
            pairs = list(zip(question.contexts, question.candidates, strict=True))
            asked = [LogLikelihood(behind(context), (candidate,)) for context, candidate in pairs]
            plain = [LogLikelihood((self.unconditional,), (candidate,)) for _, candidate in pairs]
        return [*asked, *plain] if self.scoring == "unconditional" else asked

    def ask(self, sample: Sample, shots: Sequence[Sample]) -> RequestGenerator:
        question = self.question(sample)
        answers = yield self.requests(sample, shots)
        found = [scored for answer in answers for scored in compared(answer)]
        values = rate(found, self.scoring)
        choice = int(np.argmax(values))
        return Outcome(
            prediction=question.names[choice],
            target=question.names[question.target],
            scores={"accuracy": credit(values, question.target)},
            data={
                "choice": choice, "label": question.target, "values": values,
                "shares": dict(zip(question.names, softmax(values), strict=True)),
            },
        )


def rate(scored: Sequence[ScoredCandidate], scoring: Scoring) -> list[float]:
    """Return what decides among candidates, in nats; those of `unconditional` are followed by their second look."""
    if scoring == "mean":
        return [one.mean for one in scored]
    if scoring == "bytes":
        return [one.total / len(one.text.encode()) for one in scored]
    if scoring == "unconditional":
        half = len(scored) // 2
        return [after.total - alone.total for after, alone in zip(scored[:half], scored[half:], strict=True)]
    return [one.total for one in scored]


def with_options(before: str, after: str, options: Sequence[str], target: int) -> Question:
    """Return a sentence with a gap as a question: which option makes the rest of the sentence likelier.

    "Partial evaluation" (Trinh and Le 2018, arXiv 1806.02847): each option stands in the gap as context, and what follows
    is scored. What sticks to the option ("'s", a comma) belongs to the context, unless nothing else follows.
    """
    stuck, rest = re.match(r"(\S*)(.*)", after, re.DOTALL).groups()  # type: ignore[union-attr]
    if not rest.strip():
        stuck, rest = "", after
    contexts = tuple(f"{before}{option}{stuck}" for option in options)
    return Question(contexts, (rest.strip(),) * len(options), tuple(options), target)

