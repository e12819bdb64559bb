"""Captions of photographs: COCO and Flickr30k on Karpathy's splits (KOSMOS-1, section 4.1, tables 2, 3 and 14).

An image and "An image of", beam of 5, CIDEr and SPICE. The paper leaves open, and we choose: the text between two
demonstrations (none, as in the released tools of Kosmos-2), a demonstration's caption (after a blank, as it stands in the
file), the end of a caption beside </s> (a newline), and its length (at most 64 tokens).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any, ClassVar

from kosmos_lit.evaluation.caption_metrics import (
    CaptionMetric,
    Tokens,
    Values,
    caption_scores,
    check_caption_metrics,
    plain_words,
)
from kosmos_lit.evaluation.dataset_files import parsing, read_json, require_files
from kosmos_lit.evaluation.prompts import few_shot_prompt
from kosmos_lit.evaluation.requests import Generate, Parts, generated_text
from kosmos_lit.evaluation.statistics import Metric, mean_metric
from kosmos_lit.evaluation.task import Outcome, RequestGenerator, Sample, Task
from kosmos_lit.inference.config import GenerationConfig

SPLITS = "https://cs.stanford.edu/people/karpathy/deepimagesent/"


class KarpathyCaptions(Task):
    """Captions in the JSON file of Karpathy's splits, and folders of images.

    The file: `{"images": [{"filepath": FOLDER, "filename": NAME, "split": "train" | "restval" | "val" | "test",
    "sentences": [{"raw": CAPTION}, ...]}, ...]}`; an image is `PATH/FOLDER/NAME`, or `PATH/flickr30k-images/NAME` in
    Flickr30k's file, which has no `filepath`. A sample's key is NAME.
    """

    main_metric = "cider"
    file: ClassVar[str]
    """The JSON file's name."""
    image_folder: ClassVar[str] = "."
    """Folder of images where the file has no `filepath`."""
    source: ClassVar[str]
    """Where the authors publish files and images."""

    def __init__(
        self,
        path: str,
        *,
        split: str = "test",
        prompt: str = "An image of",
        separator: str = "",
        settings: GenerationConfig = GenerationConfig(n_beams=5, max_new_tokens=64, stop=("\n",)),
        metrics: Sequence[CaptionMetric] = ("cider", "meteor", "spice"),
        tokens: Tokens = "ptb",
        **common: Any,
    ) -> None:
        """Set the options; the defaults are the paper's.

        Args:
            path: Folder with the JSON file and the folders of images.
            split: Evaluated split.
            prompt: Text after the image.
            separator: Text after a demonstration. Blanks beside images are trimmed, as in training.
            settings: Settings of generation.
            metrics: Metrics of pycocoevalcap (extra `eval`) beside the exact match. METEOR and SPICE need Java.
            tokens: `ptb`: words of pycocoevalcap's tokenizer, as in published metrics; it needs Java. `plain`: lower-case
                words without punctuation; the metrics' names end in it (`cider_plain`).
            **common: Options of every task.
        """
        super().__init__(path, **common)
        self.split, self.prompt, self.separator, self.settings = split, prompt, separator, settings
        self.metric_names, self.tokens = tuple(metrics), tokens
        # `add_corpus_scores` and `metrics` ask for the scores of the same captions: inputs and results of the last call.
        self._last: tuple[list[str], list[Any], dict[str, tuple[float, Values]]] | None = None
        self.main_metric = "cider" if tokens == "ptb" else "cider_plain"  # type: ignore[misc]

    def samples(self) -> Sequence[Sample]:
        """Return the images of the split, with their captions as references."""
        samples = self._read((self.split,))
        # Missing programs are an error now, not after hours of generation.
        check_caption_metrics(self.title, self.metric_names, self.tokens)
        return samples

    def pool(self) -> Sequence[Sample]:
        """Return the images of Karpathy's training split: `train` and `restval`."""
        return self._read(("train", "restval"))

    def _read(self, splits: Sequence[str]) -> list[Sample]:
        (file,) = require_files(self.title, self.path, [self.file], self.source)
        with parsing(file):
            samples = [
                Sample(
                    key=image["filename"],
                    images=(self._image_path(image),),
                    data={"captions": [sentence["raw"].strip() for sentence in image["sentences"]]},
                )
                for image in read_json(file)["images"]
                if image["split"] in splits
            ]
        # Images themselves are not checked: a missing one fails its sample, a missing folder all of them.
        folders = {f"{path.parent.relative_to(self.path)}/" for sample in samples for path in sample.images}
        require_files(self.title, self.path, [self.file, *sorted(folders)], self.source)
        return samples

    def _image_path(self, image: dict[str, Any]) -> Path:
        folder, name = image.get("filepath", self.image_folder), image["filename"]
        return self.path / str(folder) / str(name)

    def ask(self, sample: Sample, shots: Sequence[Sample]) -> RequestGenerator:
        """Ask for a caption."""
        demonstrations = [self._demonstration(sample, shot) for shot in shots]
        responses = yield [
            Generate(few_shot_prompt(demonstrations, (*sample.images, self.prompt), self.separator), self.settings)
        ]
        prediction, target = generated_text(responses[0]), sample.data["captions"]
        exact = any(plain_words(prediction) == plain_words(caption) for caption in target)
        return Outcome(prediction=prediction, target=target, scores={"exact_match": float(exact)})

    def _demonstration(self, sample: Sample, shot: Sample) -> Parts:
        """Return another image with one of its captions, the same for the same seed and sample."""
        # A string seeds by its SHA-512, alike in every process.
        caption = Random(f"{self.seed} {sample.key} {shot.key}").choice(shot.data["captions"])
        return (*shot.images, f"{self.prompt} {caption}")

    def add_corpus_scores(self, outcomes: Sequence[Outcome]) -> Sequence[Outcome]:
        """Return outcomes with each caption's score by each metric."""
        # Plain floats: scores go into lines of JSON.
        columns = {name: scores.tolist() for name, (_, scores) in self._caption_scores(outcomes).items()}
        rows = [{name: scores[i] for name, scores in columns.items()} for i in range(len(outcomes))]
        return [replace(outcome, scores={**outcome.scores, **row}) for outcome, row in zip(outcomes, rows, strict=True)]

    def metrics(self, outcomes: Sequence[Outcome]) -> dict[str, Metric]:
        """Return the metrics, each with the interval of its mean over images; CIDEr of 1 is 100 points of the tables."""
        # METEOR of all captions is not the mean of its scores: the value is the package's own.
        results = self._caption_scores(outcomes).items()
        metrics = {name: replace(mean_metric(scores), value=value) for name, (value, scores) in results}
        # The base class adds the exact match, which the package does not have.
        return metrics | {name: metric for name, metric in super().metrics(outcomes).items() if name not in metrics}

    def _caption_scores(self, outcomes: Sequence[Outcome]) -> dict[str, tuple[float, Values]]:
        """Return `caption_scores` by the metrics' names; those of the last captions are kept, as they take minutes."""
        predictions, references = [outcome.prediction for outcome in outcomes], [outcome.target for outcome in outcomes]
        if self._last is None or self._last[:2] != (predictions, references):
            suffix = "" if self.tokens == "ptb" else f"_{self.tokens}"
            scores = caption_scores(predictions, references, self.metric_names, self.tokens)
            self._last = predictions, references, {f"{name}{suffix}": both for name, both in scores.items()}
        return self._last[2]


class CocoCaption(KarpathyCaptions):
    """COCO captions: `dataset_coco.json`, `val2014/`, and `train2014/` for demonstrations."""

    title = "COCO captions"
    published = "coco_caption"
    file = "dataset_coco.json"
    source = f"splits {SPLITS}, images https://cocodataset.org/#download (2014)"


class Flickr30k(KarpathyCaptions):
    """Flickr30k: `dataset_flickr30k.json`, `flickr30k-images/`."""

    title = "Flickr30k captions"
    published = "flickr30k"
    file = "dataset_flickr30k.json"
    image_folder = "flickr30k-images"
    source = f"splits {SPLITS}, images on request from https://shannon.cs.illinois.edu/DenotationGraph/"
