"""Winogrande: which of two names fills a gap."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kosmos_lit.errors import UserError
from kosmos_lit.evaluation.multiple_choice import MultipleChoice, Question, gap_question
from kosmos_lit.evaluation.task import Sample

SOURCE = "winogrande_1.1.zip at winogrande.allenai.org"


class Winogrande(MultipleChoice):
    """Winogrande development set (Sakaguchi et al. 2020), accuracy (the paper's Table 13).

    Each name fills the gap, and the text after it is scored (partial evaluation), as in the group's released tool.
    """

    title = "Winogrande"
    published = "winogrande"
    chance = 1 / 2

    def __init__(self, path: str, shots_split: str = "train_xl", **options: Any) -> None:
        """Set the split of demonstrations, beside the options of every multiple-choice task.

        Args:
            path: Folder with the files.
            shots_split: Split that demonstrations are drawn from: train_xs, train_s, train_m, train_l or train_xl.
            options: Those of `MultipleChoice`.
        """
        super().__init__(path, **options)
        self.shots_split = shots_split

    def samples(self) -> Sequence[Sample]:
        return self._read("dev")

    def pool(self) -> Sequence[Sample]:
        return self._read(self.shots_split)

    def _read(self, split: str) -> list[Sample]:
        names = [f"{split}.jsonl", f"{split}-labels.lst"]
        rows = self.read_labelled(names, ["sentence", "option1", "option2"], SOURCE)
        return [Sample(key=f"{names[0]}:{number}", data=row) for number, row in enumerate(rows, start=1)]

    def question(self, sample: Sample) -> Question:
        sentence = sample.data["sentence"]
        # "_" marks the gap in the authors' files.
        before, gap, after = sentence.partition("_")
        if not gap:
            raise UserError(f"{self.title}, {sample.key}: no _ in {sentence!r}; take the file as its authors publish it")
        options = [sample.data["option1"], sample.data["option2"]]
        return gap_question(before, after, options, self.label(sample, "label", ("1", "2")))
