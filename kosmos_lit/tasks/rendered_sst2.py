"""Rendered SST-2: reading opinions that are images of text (KOSMOS-1, sections 4.3 and 4.5, tables 7 and 9).

At once: the image, "Question: what is the sentiment of the opinion? Answer:", and whichever of "positive" and "negative"
is likelier. With a chain of thought: the image and "Introduce this picture in detail:" give a rationale; then the image
again (figure 5), the rationale and the question.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from kosmos_lit.evaluation.dataset_files import require_files
from kosmos_lit.evaluation.multiple_choice import accuracy_with_ties, candidate_probabilities
from kosmos_lit.evaluation.prompts import few_shot_prompt, fill_template
from kosmos_lit.evaluation.requests import Generate, LogLikelihood, Parts, generated_text, scored_candidates
from kosmos_lit.evaluation.task import Outcome, RequestGenerator, Sample, Task
from kosmos_lit.inference.config import GenerationConfig
from kosmos_lit.inference.results import ScoredCandidate


class ImageClassification(Task):
    """Images whose class is one of a few words: `SPLIT/CLASS/*.png`."""

    main_metric = "accuracy"
    source: ClassVar[str]

    def __init__(
        self,
        path: str,
        *,
        classes: Sequence[str],
        split: str,
        template: str,
        separator: str = "",
        **common: Any,
    ) -> None:
        """Take the options.

        Args:
            path: Folder with the splits.
            classes: Names of the classes' folders, which are also the answers.
            split: Which split is evaluated.
            template: What follows the image, and the answer follows.
            separator: What ends a demonstration. Blanks beside images go, as they do in training.
            **common: What every task takes.
        """
        self.chance = 1 / len(classes)
        super().__init__(path, **common)
        self.classes, self.split, self.template, self.separator = tuple(classes), split, template, separator

    def samples(self) -> Sequence[Sample]:
        """Return the images of the split, class by class; a key is `CLASS/NAME`."""
        return self._read(self.split)

    def pool(self) -> Sequence[Sample]:
        """Return the images of `train/`."""
        return self._read("train")

    def _read(self, split: str) -> list[Sample]:
        folders = require_files(self.title, self.path, [f"{split}/{name}/" for name in self.classes], self.source)
        return [
            Sample(key=f"{label}/{image.name}", images=(image,), data={"label": label})
            for label, folder in zip(self.classes, folders, strict=True)
            for image in sorted(folder.iterdir())
            if image.is_file() and not image.name.startswith(".")
        ]

    def class_request(self, sample: Sample, shots: Sequence[Sample], question: str) -> LogLikelihood:
        """Return the request that compares the classes after a question; demonstrations have the plain one."""
        shown: list[Parts] = [(*shot.images, f"{self.template} {shot.data['label']}") for shot in shots]
        return LogLikelihood(few_shot_prompt(shown, (*sample.images, question), self.separator), self.classes)

    def outcome(self, sample: Sample, scored: Sequence[ScoredCandidate], **data: Any) -> Outcome:
        """Return what the classes' probabilities are worth."""
        found, label = candidate_probabilities(scored), sample.data["label"]
        return Outcome(
            prediction=self.classes[found.index(max(found))],
            target=label,
            scores={"accuracy": accuracy_with_ties(found, self.classes.index(label))},
            data={"probabilities": dict(zip(self.classes, found, strict=True)), **data},
        )


class RenderedSst2(ImageClassification):
    """Rendered SST-2: `test/positive/*.png`, `test/negative/*.png`, and the same under `train/` for demonstrations."""

    title = "Rendered SST-2"
    published = "rendered_sst2"
    source = "https://github.com/openai/CLIP/blob/main/data/rendered-sst2.md"

    def __init__(
        self,
        path: str,
        *,
        classes: Sequence[str] = ("positive", "negative"),
        split: str = "test",
        template: str = "Question: what is the sentiment of the opinion? Answer:",
        **options: Any,
    ) -> None:
        """Take the options of the paper; `ImageChoice` says what they are."""
        super().__init__(path, classes=classes, split=split, template=template, **options)

    def ask(self, sample: Sample, shots: Sequence[Sample]) -> RequestGenerator:
        """Ask for the sentiment."""
        answers = yield [self.class_request(sample, shots, self.template)]
        return self.outcome(sample, scored_candidates(answers[0]))


class RenderedSst2ChainOfThought(RenderedSst2):
    """Rendered SST-2 with a rationale that the model writes first."""

    title = "Rendered SST-2, chain of thought"
    published = "rendered_sst2_cot"

    def __init__(
        self,
        path: str,
        *,
        introduction: str = "Introduce this picture in detail:",
        second: str = "{rationale} {question}",
        settings: GenerationConfig = GenerationConfig(max_new_tokens=128),
        **options: Any,
    ) -> None:
        """Take the options of the paper.

        Args:
            path: Folder with the splits.
            introduction: What follows the image in the first stage.
            second: What follows it in the second; `{rationale}` is what was written, `{question}` the template.
            settings: How the rationale is written; the paper says nothing of it.
            **options: What `RenderedSst2` takes.
        """
        super().__init__(path, **options)
        self.introduction, self.second, self.settings = introduction, second, settings

    def ask(self, sample: Sample, shots: Sequence[Sample]) -> RequestGenerator:
        """Ask for a rationale, then for the sentiment; demonstrations stand before the second stage, without rationales."""
        answers = yield [Generate((*sample.images, self.introduction), self.settings)]
        rationale = generated_text(answers[0])
        question = fill_template(self.second, rationale=rationale, question=self.template).strip()
        answers = yield [self.class_request(sample, shots, question)]
        return self.outcome(sample, scored_candidates(answers[0]), rationale=rationale)
