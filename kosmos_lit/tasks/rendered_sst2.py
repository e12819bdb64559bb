"""Rendered SST-2: the sentiment of opinions that are images of text (KOSMOS-1, sections 4.3 and 4.5, tables 7 and 9).

Directly: the image, "Question: what is the sentiment of the opinion? Answer:", and the likelier of "positive" and
"negative". With a chain of thought: the image and "Introduce this picture in detail:" give a rationale; then the image again
(figure 5), the rationale and the question.
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
    """Images with a class among a few words: `SPLIT/CLASS/*.png`."""

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
        """Set the options.

        Args:
            path: Folder with the splits.
            classes: Names of the classes' folders, which are also the answers.
            split: Evaluated split.
            template: Text between the image and the answer.
            separator: Text after a demonstration. Blanks beside images are trimmed, as in training.
            **common: Options of every task.
        """
        # Before the base class's constructor, where the option `chance` takes its place.
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
            # Sorted: iterdir yields names in the file system's order.
            for image in sorted(folder.iterdir())
            if image.is_file() and not image.name.startswith(".")  # .DS_Store and the like
        ]

    def class_request(self, sample: Sample, shots: Sequence[Sample], question: str) -> LogLikelihood:
        """Return the request that scores the classes after a question; demonstrations have the plain template."""
        demonstrations: list[Parts] = [(*shot.images, f"{self.template} {shot.data['label']}") for shot in shots]
        return LogLikelihood(few_shot_prompt(demonstrations, (*sample.images, question), self.separator), self.classes)

    def outcome(self, sample: Sample, candidates: Sequence[ScoredCandidate], **data: Any) -> Outcome:
        """Return the outcome of the classes' log-probabilities."""
        probabilities, label = candidate_probabilities(candidates), sample.data["label"]
        return Outcome(
            # The first of equals; the accuracy counts ties by share.
            prediction=self.classes[probabilities.index(max(probabilities))],
            target=label,
            scores={"accuracy": accuracy_with_ties(probabilities, self.classes.index(label))},
            data={"probabilities": dict(zip(self.classes, probabilities, strict=True)), **data},
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
        """Set the options of `ImageClassification`; the defaults are the paper's."""
        super().__init__(path, classes=classes, split=split, template=template, **options)

    def ask(self, sample: Sample, shots: Sequence[Sample]) -> RequestGenerator:
        """Ask for the sentiment."""
        responses = yield [self.class_request(sample, shots, self.template)]
        return self.outcome(sample, scored_candidates(responses[0]))


class RenderedSst2ChainOfThought(RenderedSst2):
    """Rendered SST-2 with a rationale that the model generates first."""

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
        """Set the options; the defaults are the paper's.

        Args:
            path: Folder with the splits.
            introduction: Text after the image in the first stage.
            second: Text after the image in the second stage; `{rationale}` is the generated text, `{question}` the template.
            settings: Settings of the rationale's generation, which the paper leaves open.
            **options: Those of `RenderedSst2`.
        """
        super().__init__(path, **options)
        self.introduction, self.second, self.settings = introduction, second, settings

    def ask(self, sample: Sample, shots: Sequence[Sample]) -> RequestGenerator:
        """Ask for a rationale, then for the sentiment; demonstrations stand before the second stage, without rationales."""
        responses = yield [Generate((*sample.images, self.introduction), self.settings)]
        rationale = generated_text(responses[0])
        # strip: an empty rationale leaves a blank before the question.
        question = fill_template(self.second, rationale=rationale, question=self.template).strip()
        responses = yield [self.class_request(sample, shots, question)]
        return self.outcome(sample, scored_candidates(responses[0]), rationale=rationale)
