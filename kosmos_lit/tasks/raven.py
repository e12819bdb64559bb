"""Raven's matrices: which image continues a series (KOSMOS-1, section 4.2, table 6 and figure 4).

"Here are eight images:", the images one by one, "The following image is:", a candidate, "Is it correct?"; the candidate
with the highest probability of "Yes" is the answer.

Deviation: the layout inside the archive of IQ50 (https://aka.ms/kosmos-iq50) is not documented anywhere we know of; the task
reads a file `items.json` with the role of each image, which is quickly written for any layout.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from kosmos_lit.evaluation.dataset_files import parsing, read_json, require_files
from kosmos_lit.evaluation.multiple_choice import accuracy_with_ties, candidate_probabilities
from kosmos_lit.evaluation.prompts import fill_template
from kosmos_lit.evaluation.requests import LogLikelihood, Parts, scored_candidates
from kosmos_lit.evaluation.task import Outcome, RequestGenerator, Sample, Task

SOURCE = "https://aka.ms/kosmos-iq50 has the images; items.json is to be written, configs/eval/raven_iq50.yaml says how"
NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")


class Raven(Task):
    """Matrices: `items.json` and the images that it names.

    The file: `[{"id": "1", "given": [IMAGE, ...], "candidates": [IMAGE, ...], "answer": 2}, ...]`, images as paths
    under the folder in reading order, `answer` the index of the right candidate. Other fields are kept as data.
    """

    title = "Raven IQ50"
    published = "raven_iq50"
    main_metric = "accuracy"
    chance: float | None = 1 / 6

    def __init__(
        self,
        path: str,
        *,
        before: str = "Here are {n} images:",
        between: str = "The following image is:",
        after: str = "Is it correct?",
        yes: str = "Yes",
        no: str | None = None,
        **common: Any,
    ) -> None:
        """Set the options; the defaults are the paper's.

        Args:
            path: Folder with `items.json` and the images.
            before: Text before the context images; `{n}` is their number as a word.
            between: Text between them and the candidate.
            after: Text after the candidate.
            yes: The answer whose probability ranks the candidates.
            no: Rank by P(yes) / (P(yes) + P(no)) with this word; None: by P(yes) alone, as in the paper.
            **common: Options of every task.
        """
        super().__init__(path, **common)
        self.before, self.between, self.after = before, between, after
        self.answers = (yes,) if no is None else (yes, no)

    def samples(self) -> Sequence[Sample]:
        """Return the matrices; a sample's images are those of the context, then the candidates."""
        (file,) = require_files(self.title, self.path, ["items.json"], SOURCE)
        with parsing(file):
            return [
                Sample(
                    key=str(row["id"]),
                    images=tuple(self.path / name for name in [*row["given"], *row["candidates"]]),
                    data=row | {"n_context": len(row["given"]), "n_candidates": len(row["candidates"])},
                )
                for row in read_json(file)
            ]

    def ask(self, sample: Sample, shots: Sequence[Sample]) -> RequestGenerator:
        """Ask whether each candidate is correct."""
        n, target = sample.data["n_context"], int(sample.data["answer"])
        context, candidates = sample.images[:n], sample.images[n:]
        # Numbers without a word of their own stay digits.
        start: Parts = (fill_template(self.before, n=NUMBERS[n] if n < len(NUMBERS) else n), *context, self.between)
        # Slices, not indices: a sample without images still has one request for each candidate.
        each = [candidates[i : i + 1] for i in range(sample.data["n_candidates"])]
        responses = yield [LogLikelihood((*start, *candidate, self.after), self.answers) for candidate in each]
        scored = [scored_candidates(response) for response in responses]
        # With `no`, the share of yes among both answers; else the probability of yes itself.
        confidence = [candidate_probabilities(s)[0] if len(s) > 1 else math.exp(s[0].total) for s in scored]
        total = sum(confidence) or 1.0  # all may underflow to 0
        return Outcome(
            # The first of equals; the accuracy counts ties by share.
            prediction=str(confidence.index(max(confidence))),
            target=str(target),
            scores={"accuracy": accuracy_with_ties(confidence, target)},
            data={"confidence": confidence, "probabilities": {str(i): one / total for i, one in enumerate(confidence)}},
        )
