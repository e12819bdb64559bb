"""ImageNet: the name of the object in a photograph (KOSMOS-1, section 4.6, table 10).

The image and "The photo of the", beam of 2, free or constrained to the 1,000 names; a prediction is right if it is the name
of the image's class. The paper does not say which names, and we choose those of CLIP's zero-shot evaluation, which open_clip
has: they are short, and were made to tell the classes apart.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from kosmos_lit.errors import UserError
from kosmos_lit.evaluation.dataset_files import parsing, require_files
from kosmos_lit.evaluation.prompts import few_shot_prompt
from kosmos_lit.evaluation.requests import Generate, Parts, generated_text
from kosmos_lit.evaluation.task import Outcome, RequestGenerator, Sample, Task
from kosmos_lit.inference.config import GenerationConfig
from kosmos_lit.vision import imagenet_names

SOURCE = "https://image-net.org/download.php (ILSVRC2012; LOC_val_solution.csv is with the same images on Kaggle)"


class ImageNet(Task):
    """ImageNet's validation set: `val/SYNSET/*.JPEG`, or `val/*.JPEG` and `LOC_val_solution.csv`.

    Classes are numbered in the order of their synsets (`n01440764` is 0), as `names` has them. The CSV has `ImageId` (a file
    name without `.JPEG`) and `PredictionString`, which begins with the synset.
    """

    title = "ImageNet"
    published = "imagenet"
    main_metric = "accuracy"

    def __init__(
        self,
        path: str,
        *,
        split: str = "val",
        constrained: bool = False,
        names: str | Literal["clip", "folders"] = "clip",
        prompt: str = "The photo of the",
        settings: GenerationConfig = GenerationConfig(n_beams=2, max_new_tokens=32),
        separator: str = "",
        **common: Any,
    ) -> None:
        """Set the options; the defaults are the paper's.

        Args:
            path: Folder with `val/`.
            split: Name of the evaluated folder.
            constrained: Generate names of classes only.
            names: `clip`: open_clip's 1,000 names; `folders`: the names of the classes' folders; else a file with a name a
                line in the order of synsets, or with a synset and names a line, of which the first counts
                (`LOC_synset_mapping.txt`).
            prompt: Text after the image.
            settings: Settings of generation.
            separator: Text after a demonstration. Blanks beside images are trimmed, as in training.
            **common: Options of every task.
        """
        self.title = "ImageNet, held to the names" if constrained else "ImageNet, free answers"
        self.published = "imagenet_constrained" if constrained else "imagenet"
        super().__init__(path, **common)
        self.split, self.constrained, self.names, self.prompt = split, constrained, names, prompt
        self.settings, self.separator = settings, separator
        self._choices: tuple[str, ...] = ()

    def samples(self) -> Sequence[Sample]:
        """Return the images of the split, class by class or in the CSV's order; a key is the file's path under it."""
        return self._read(self.split)

    def pool(self) -> Sequence[Sample]:
        """Return the images of `train/SYNSET/`."""
        return self._read("train")

    def _read(self, split: str) -> list[Sample]:
        (folder,) = require_files(self.title, self.path, [f"{split}/"], SOURCE)
        # Without folders of classes, Kaggle's CSV says which class an image is of.
        in_folders = any(entry.is_dir() for entry in folder.iterdir())
        synset_of = _in_folders(folder) if in_folders else self._listed(split)
        # Sorted: files without synsets name the classes in this order.
        name_of = self._name_of(sorted(set(synset_of.values())))
        self._choices = tuple(dict.fromkeys(name_of.values()))  # two classes may share a name
        # Not in __init__: the number of classes is that of the files.
        if self.chance is None:
            self.chance = 1 / len(name_of)
        return [
            Sample(key=image, images=(folder / image,), data={"synset": synset, "name": name_of[synset]})
            for image, synset in synset_of.items()
        ]

    def _listed(self, split: str) -> dict[str, str]:
        (file,) = require_files(self.title, self.path, [f"LOC_{split}_solution.csv"], SOURCE)
        with parsing(file), file.open(encoding="utf-8-sig", newline="") as lines:
            return {f"{row['ImageId']}.JPEG": row["PredictionString"].split()[0] for row in csv.DictReader(lines)}

    def _name_of(self, synsets: Sequence[str]) -> dict[str, str]:
        if self.names == "folders":
            return {synset: synset for synset in synsets}
        lines = imagenet_names() if self.names == "clip" else _lines(Path(self.names))
        mapped = [line.split(maxsplit=1) for line in lines]
        # A name may be two words too: the file has synsets only if every line begins with one.
        if all(len(words) == 2 and words[0].startswith("n") and words[0][1:].isdigit() for words in mapped):
            name_of = {synset: names.split(",")[0].strip() for synset, names in mapped}
            if missing := [synset for synset in synsets if synset not in name_of]:
                raise UserError(f"{self.title}: no name in {self.names} for {len(missing)} classes, such as {missing[0]}")
            return name_of
        if len(lines) != len(synsets):
            raise UserError(
                f"{self.title}: {len(lines)} names ({self.names}) for {len(synsets)} classes under {self.path}; "
                "give a file with a name for each class in the order of synsets, or with synsets before the names"
            )
        return dict(zip(synsets, lines, strict=True))

    def ask(self, sample: Sample, shots: Sequence[Sample]) -> RequestGenerator:
        """Ask for the name."""
        # `samples` has set the choices: they are the names of the classes in the files.
        settings = replace(self.settings, choices=self._choices) if self.constrained else self.settings
        demonstrations: list[Parts] = [(*shot.images, f"{self.prompt} {shot.data['name']}") for shot in shots]
        prompt = few_shot_prompt(demonstrations, (*sample.images, self.prompt), self.separator)
        responses = yield [Generate(prompt, settings)]
        prediction, target = generated_text(responses[0]), sample.data["name"]
        return Outcome(
            prediction=prediction, target=target, scores={"accuracy": float(_plain(prediction) == _plain(target))}
        )


def _plain(name: str) -> str:
    """Return a name in lower case, with single blanks and without a full stop at its end."""
    return " ".join(name.casefold().split()).removesuffix(".")


def _in_folders(folder: Path) -> dict[str, str]:
    classes = sorted(entry for entry in folder.iterdir() if entry.is_dir())
    return {f"{c.name}/{image.name}": c.name for c in classes for image in sorted(c.iterdir()) if image.is_file()}


def _lines(path: Path) -> list[str]:
    if not path.is_file():
        raise UserError(f"ImageNet: no file {path} with the names of the classes; `names` may also be clip or folders")
    return [" ".join(line.split()) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
