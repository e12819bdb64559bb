"""Birds: which of two similar kinds an image shows, with or without descriptions (KOSMOS-1, section 4.7, tables 11 and 12).

With: "Description of X: ... Description of Y: ...", the image, "Question:what is the name of woodpecker in the picture?
Answer:". Without: the image and a question that names both. The answer is generated, and right if it names the right kind
and not the other one.

Deviation: the paper's images are not published as a dataset; the task reads a file `birds.json` and folders of images
from any source (the first pair is of CUB-200-2011, 20 images each; table 11 has the descriptions).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kosmos_lit.evaluation.dataset_files import parsing, read_json, require_files
from kosmos_lit.evaluation.prompts import fill_template
from kosmos_lit.evaluation.requests import Generate, Parts, generated_text
from kosmos_lit.evaluation.task import Outcome, RequestGenerator, Sample, Task
from kosmos_lit.inference.config import GenerationConfig

SOURCE = "not published as a whole; https://www.vision.caltech.edu/datasets/cub_200_2011/ has the first pair's images"


class Birds(Task):
    """Pairs of classes: `birds.json` and the folders of images that it names.

    The file: `[{"category": "woodpecker", "classes": [{"name": "three toed", "description": "It has ...", "images":
    "three_toed/"}, {"name": "downy", ...}]}, ...]`. A sample's key is the image's path.
    """

    main_metric = "accuracy"
    chance: float | None = 1 / 2

    def __init__(
        self,
        path: str,
        *,
        with_descriptions: bool = True,
        description: str = "Description of {name} {category}: {description}",
        question: str = "Question:what is the name of {category} in the picture? Answer:",
        plain_question: str = "Question:what is the name of the {category} in the picture, {first} or {second}? Answer:",
        settings: GenerationConfig = GenerationConfig(max_new_tokens=32, stop=("\n",)),
        **common: Any,
    ) -> None:
        """Set the options; the defaults are the paper's.

        Args:
            path: Folder with `birds.json`.
            with_descriptions: Describe both classes before the image.
            description: Template of a description; `{name}`, `{category}`, `{description}`.
            question: Text after the image, with descriptions; `{category}`.
            plain_question: Text after the image, without; `{category}`, and both names: `{first}`, `{second}`.
            settings: Settings of generation.
            **common: Options of every task.
        """
        self.title = "Birds with verbal descriptions" if with_descriptions else "Birds, the image alone"
        self.published = "birds_with_descriptions" if with_descriptions else "birds"
        super().__init__(path, **common)
        self.with_descriptions, self.description, self.question = with_descriptions, description, question
        self.plain_question, self.settings = plain_question, settings

    def samples(self) -> Sequence[Sample]:
        """Return the images, pair by pair and class by class."""
        (file,) = require_files(self.title, self.path, ["birds.json"], SOURCE)
        with parsing(file):
            pairs = [(pair, [kind["images"] for kind in pair["classes"]]) for pair in read_json(file)]
        # The slash at the end asks for a folder; the file may name it with or without one.
        require_files(self.title, self.path, [f"{name.rstrip('/')}/" for _, folders in pairs for name in folders], SOURCE)
        with parsing(file):
            return [
                Sample(
                    key=image.relative_to(self.path).as_posix(),
                    images=(image,),
                    data={"category": pair["category"], "classes": pair["classes"], "target": i},
                )
                for pair, folders in pairs
                for i, name in enumerate(folders)
                # Sorted: iterdir yields names in the file system's order.
                for image in sorted((self.path / name).iterdir())
                if image.is_file() and not image.name.startswith(".")  # .DS_Store and the like
            ]

    def prompt(self, sample: Sample) -> Parts:
        """Return the prompt of a sample."""
        category, classes = sample.data["category"], sample.data["classes"]
        if self.with_descriptions:
            descriptions = [fill_template(self.description, **{"category": category} | kind) for kind in classes]
            return (" ".join(descriptions), *sample.images, fill_template(self.question, category=category))
        first, second = (kind["name"] for kind in classes)
        return (*sample.images, fill_template(self.plain_question, category=category, first=first, second=second))

    def ask(self, sample: Sample, shots: Sequence[Sample]) -> RequestGenerator:
        """Ask for the name."""
        responses = yield [Generate(self.prompt(sample), self.settings)]
        prediction, names = generated_text(responses[0]), [kind["name"] for kind in sample.data["classes"]]
        # An answer that names both kinds, or neither, is wrong.
        named_kinds = [i for i, name in enumerate(names) if _words(name) in _words(prediction)]
        target = sample.data["target"]
        return Outcome(prediction=prediction, target=names[target], scores={"accuracy": float(named_kinds == [target])})


def _words(text: str) -> str:
    """Return a text's words in lower case between single blanks, without punctuation, so that `in` matches whole words."""
    return f" {' '.join(''.join(c if c.isalnum() else ' ' for c in text.casefold()).split())} "
