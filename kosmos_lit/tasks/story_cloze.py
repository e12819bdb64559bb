"""StoryCloze: which of two sentences ends a story of four."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kosmos_lit.evaluation.dataset_files import read_csv, require_files
from kosmos_lit.evaluation.multiple_choice import MultipleChoice, Question
from kosmos_lit.evaluation.task import Sample

SOURCE = "the Story Cloze Test of ROCStories, by request at cs.rochester.edu/nlp/rocstories"
SENTENCES = [f"InputSentence{i}" for i in (1, 2, 3, 4)]
ENDINGS = ["RandomFifthSentenceQuiz1", "RandomFifthSentenceQuiz2"]
LABEL = "AnswerRightEnding"


class StoryCloze(MultipleChoice):
    """StoryCloze, Spring 2016 (Mostafazadeh et al. 2016), accuracy (the paper's Table 13).

    The four sentences are the context, the endings the candidates, without further text, as in the group's released tool.
    Demonstrations are from the validation file: there is no training split. The test file of Winter 2018 has no labels; set
    `file` to its validation file.
    """

    title = "StoryCloze"
    published = "story_cloze"
    chance = 1 / 2

    def __init__(
        self,
        path: str,
        file: str = "cloze_test_test__spring2016*.csv",
        shots_file: str = "cloze_test_val__spring2016*.csv",
        **options: Any,
    ) -> None:
        """Set the files, beside the options of every multiple-choice task.

        Args:
            path: Folder with the files.
            file: Evaluated file; `*` matches anything, and columns of a `.tsv` are separated by tabs.
            shots_file: File that demonstrations are drawn from.
            options: Those of `MultipleChoice`.
        """
        super().__init__(path, **options)
        self.file, self.shots_file = file, shots_file

    def samples(self) -> Sequence[Sample]:
        return self._read(self.file)

    def pool(self) -> Sequence[Sample]:
        return self._read(self.shots_file)

    def _read(self, name: str) -> list[Sample]:
        [path] = require_files(self.title, self.path, [name], SOURCE)
        rows = read_csv(path, [*SENTENCES, *ENDINGS, LABEL])
        # The file's own name: `name` may be a pattern.
        return [Sample(key=f"{path.name}:{number}", data=row) for number, row in enumerate(rows, start=1)]

    def question(self, sample: Sample) -> Question:
        story = " ".join(sample.data[name].strip() for name in SENTENCES)
        endings = tuple(sample.data[name].strip() for name in ENDINGS)
        return Question((story,), endings, endings, self.label(sample, LABEL, ("1", "2")))
