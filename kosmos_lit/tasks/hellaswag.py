"""HellaSwag: which of four endings continues a description."""

from __future__ import annotations

from collections.abc import Sequence

from kosmos_lit.evaluation.dataset_files import read_json_lines, require_files
from kosmos_lit.evaluation.multiple_choice import MultipleChoice, Question
from kosmos_lit.evaluation.task import Sample

SOURCE = "github.com/rowanz/hellaswag, folder data"


class HellaSwag(MultipleChoice):
    """HellaSwag validation (Zellers et al. 2019), accuracy (the paper's Table 13).

    Each ending continues the unchanged context, as in the group's released tool. Demonstrations are from the training file.
    """

    title = "HellaSwag"
    published = "hellaswag"
    chance = 1 / 4

    def samples(self) -> Sequence[Sample]:
        return self._read("hellaswag_val.jsonl")

    def pool(self) -> Sequence[Sample]:
        return self._read("hellaswag_train.jsonl")

    def _read(self, name: str) -> list[Sample]:
        [path] = require_files(self.title, self.path, [name], SOURCE)
        rows = read_json_lines(path, ["ctx", "endings", "label"])
        return [Sample(key=f"{name}:{number}", data=row) for number, row in enumerate(rows, start=1)]

    def question(self, sample: Sample) -> Question:
        # Stripped: a candidate is joined to its context by one space.
        endings = tuple(ending.strip() for ending in sample.data["endings"])
        # The file has indices; `label` compares text.
        target = self.label(sample, "label", tuple(map(str, range(len(endings)))))
        return Question((sample.data["ctx"].strip(),), endings, endings, target)
