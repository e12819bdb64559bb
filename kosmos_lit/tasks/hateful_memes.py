"""HatefulMemes: whether an image with text contains hate speech (KOSMOS-1, section 4.3, table 7).

The image and "Question: does this picture contain real hate speech? Answer:"; the area under the ROC curve of
P(yes) / (P(yes) + P(no)). The meme's text is not in the prompt: the model has to read it in the image.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

from kosmos_lit.evaluation.dataset_files import parsing, read_json_lines, require_files
from kosmos_lit.evaluation.multiple_choice import accuracy_with_ties, candidate_probabilities
from kosmos_lit.evaluation.prompts import few_shot_prompt
from kosmos_lit.evaluation.requests import LogLikelihood, Parts, scored_candidates
from kosmos_lit.evaluation.statistics import Metric, auc_metric
from kosmos_lit.evaluation.task import Outcome, RequestGenerator, Sample, Task


class HatefulMemes(Task):
    """HatefulMemes: `dev_seen.jsonl` or `dev.jsonl` (the first phase's name of the same split), and `img/`.

    A line: `{"id": 8291, "img": "img/08291.png", "label": 1, "text": ...}`.
    """

    title = "HatefulMemes"
    published = "hateful_memes"
    main_metric = "roc_auc"
    chance = 0.5

    def __init__(
        self,
        path: str,
        *,
        split: str = "dev",
        template: str = "Question: does this picture contain real hate speech? Answer:",
        answers: Sequence[str] = ("no", "yes"),
        score: Literal["share", "yes"] = "share",
        separator: str = "",
        **common: Any,
    ) -> None:
        """Set the options; the defaults are the paper's.

        Args:
            path: Folder with the lists and `img/`.
            split: Name of the list, without `.jsonl`; `dev` is also found as `dev_seen`.
            template: Text after the image.
            answers: Words for labels 0 and 1.
            score: Score that ranks the images: P(yes) as a `share` of both answers, or P(`yes`) alone.
            separator: Text after a demonstration. Blanks beside images are trimmed, as in training.
            **common: Options of every task.
        """
        super().__init__(path, **common)
        self.split, self.template, self.answers = split, template, tuple(answers)
        self.score, self.separator = score, separator

    def samples(self) -> Sequence[Sample]:
        """Return the memes of the split."""
        return self._read(["dev_seen.jsonl", "dev.jsonl"] if self.split == "dev" else [f"{self.split}.jsonl"])

    def pool(self) -> Sequence[Sample]:
        """Return the memes of `train.jsonl`."""
        return self._read(["train.jsonl"])

    def _read(self, names: Sequence[str]) -> list[Sample]:
        file, _ = require_files(
            # The split's names are alternatives: one file of either name is enough.
            self.title,
            self.path,
            [names, "img/"],
            "https://hatefulmemeschallenge.com (request access there)",
        )
        with parsing(file):
            return [
                Sample(key=str(row["id"]), images=(self.path / row["img"],), data={"label": int(row["label"])})
                for row in read_json_lines(file, ["id", "img", "label"])
            ]

    def ask(self, sample: Sample, shots: Sequence[Sample]) -> RequestGenerator:
        """Ask whether there is hate speech."""
        answers = [self.answers[shot.data["label"]] for shot in shots]
        demonstrations: list[Parts] = [
            (*shot.images, f"{self.template} {answer}") for shot, answer in zip(shots, answers, strict=True)
        ]
        prompt = few_shot_prompt(demonstrations, (*sample.images, self.template), self.separator)
        responses = yield [LogLikelihood(prompt, self.answers)]
        candidates = scored_candidates(responses[0])
        probabilities, label = candidate_probabilities(candidates), sample.data["label"]
        return Outcome(
            # The first of equals; the accuracy counts ties by share.
            prediction=self.answers[probabilities.index(max(probabilities))],
            target=self.answers[label],
            scores={"accuracy": accuracy_with_ties(probabilities, label)},
            data={
                # math.exp turns the log-probability into P(yes); the area depends on the order of scores alone.
                "score": probabilities[1] if self.score == "share" else math.exp(candidates[1].total),
                "label": label,
                "probabilities": dict(zip(self.answers, probabilities, strict=True)),
            },
        )

    def metrics(self, outcomes: Sequence[Outcome]) -> dict[str, Metric]:
        """Return the area under the ROC curve, and the accuracy of the likelier answer."""
        data = [outcome.data for outcome in outcomes]
        # Of the ranking score, which need not be the probability that decides the prediction.
        area = auc_metric([row["score"] for row in data], [row["label"] for row in data])
        return {"roc_auc": area} | super().metrics(outcomes)
