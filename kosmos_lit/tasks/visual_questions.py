"""Questions about photographs: VQAv2 and VizWiz (KOSMOS-1, section 4.1, tables 4, 5 and 14).

An image and "Question: {question} Answer:", greedy, scored by VQA accuracy. The paper evaluates on test-dev of both, whose
answers are on the benchmarks' servers only: for a split without answers `metrics` has no accuracy, and `submission_files`
returns the servers' input. The paper leaves open, and we choose: the text between demonstrations (none, as in the released
tools of Kosmos-2), the end of an answer beside </s> (a newline), and the answer of a demonstration (the most frequent of its
ten).
"""

from __future__ import annotations

import json
from abc import abstractmethod
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kosmos_lit.evaluation.answer_metrics import vqa_accuracy
from kosmos_lit.evaluation.dataset_files import parsing, read_json, require_files
from kosmos_lit.evaluation.prompts import few_shot_prompt, fill_template
from kosmos_lit.evaluation.requests import Generate, Parts, generated_text
from kosmos_lit.evaluation.task import Outcome, RequestGenerator, Sample, Task
from kosmos_lit.inference.config import GenerationConfig


class VisualQuestions(Task):
    """Questions with ten answers each."""

    main_metric = "vqa_accuracy"
    train_split: str

    def __init__(
        self,
        path: str,
        *,
        split: str,
        template: str = "Question: {question} Answer:",
        separator: str = "",
        settings: GenerationConfig = GenerationConfig(max_new_tokens=32, stop=("\n",)),
        leave_one_out: bool = True,
        **common: Any,
    ) -> None:
        """Set the options; the defaults are the paper's.

        Args:
            path: Folder with questions, answers and images.
            split: Evaluated split, as in the files' names.
            template: Text after the image; `{question}`.
            separator: Text after a demonstration. Blanks beside images are trimmed, as in training.
            settings: Settings of generation.
            leave_one_out: Average over the ten sets of nine answers, as the official code does; else min(1, matches / 3).
            **common: Options of every task.
        """
        super().__init__(path, **common)
        self.split, self.template, self.separator = split, template, separator
        self.settings, self.leave_one_out = settings, leave_one_out

    def samples(self) -> Sequence[Sample]:
        """Return the questions of the split; without answers if these are not public."""
        return self._read(self.split, need_answers=False)

    def pool(self) -> Sequence[Sample]:
        """Return the questions of the training split."""
        return self._read(self.train_split, need_answers=True)

    @abstractmethod
    def _read(self, split: str, *, need_answers: bool) -> list[Sample]: ...

    @abstractmethod
    def _submission(self, key: str, prediction: str) -> dict[str, Any]: ...

    def ask(self, sample: Sample, shots: Sequence[Sample]) -> RequestGenerator:
        """Ask the question."""
        demonstrations: list[Parts] = [
            (*shot.images, f"{self._question(shot)} {most_frequent(shot.data['answers'])}") for shot in shots
        ]
        prompt = few_shot_prompt(demonstrations, (*sample.images, self._question(sample)), self.separator)
        responses = yield [Generate(prompt, self.settings)]
        prediction, target = generated_text(responses[0]), sample.data.get("answers")
        # Without answers there is no score, and so no metric: a 0 would look like a result.
        scores = (
            {} if target is None else {"vqa_accuracy": vqa_accuracy(prediction, target, leave_one_out=self.leave_one_out)}
        )
        return Outcome(
            prediction=prediction,
            target=target,
            scores=scores,
            data={"submission": self._submission(sample.key, prediction)},
        )

    def _question(self, sample: Sample) -> str:
        return fill_template(self.template, question=sample.data["question"])

    def submission_files(self, outcomes: Sequence[Outcome], failed_keys: Sequence[str]) -> dict[str, str]:
        """Return the answers as the input of the benchmark's server (https://eval.ai): one for every question."""
        # Failed samples have an empty answer.
        rows = [outcome.data["submission"] for outcome in outcomes] + [self._submission(key, "") for key in failed_keys]
        return {f"submission_{self.split}.json": json.dumps(rows)}


def most_frequent(answers: Sequence[str]) -> str:
    """Return the most frequent answer, the first one if several are."""
    # Counter keeps equal counts in the order of their first answer.
    return Counter(answers).most_common(1)[0][0]


class Vqav2(VisualQuestions):
    """VQAv2: `v2_OpenEnded_mscoco_SPLIT_questions.json`, `v2_mscoco_SPLIT_annotations.json`, folders of COCO images.

    Questions: `{"questions": [{"image_id": 1, "question": ..., "question_id": 2}, ...]}`; answers: `{"annotations":
    [{"question_id": 2, "answers": [{"answer": ...}, ... ten of them]}, ...]}`. An image is `PATH/IMAGES/` and
    `image_name` with its id, IMAGES being `val2014`, `train2014`, or `test2015` for both test splits.
    """

    title = "VQAv2"
    published = "vqav2"
    train_split = "train2014"

    def __init__(
        self,
        path: str,
        *,
        split: str = "val2014",
        image_name: str = "COCO_{image_folder}_{image_id:012d}.jpg",
        **options: Any,
    ) -> None:
        """Set the options.

        Args:
            path: Folder with questions, answers and images.
            split: `val2014`, `test-dev2015`, `test2015` or `train2014`.
            image_name: File name of an image; `{image_folder}` is its folder's name.
            **options: Those of `VisualQuestions`.
        """
        super().__init__(path, split=split, **options)
        self.image_name = image_name

    def _read(self, split: str, *, need_answers: bool) -> list[Sample]:
        image_folder = split.replace("-dev", "")  # test-dev2015 has a part of the images of test2015
        questions_name, answers_name = f"v2_OpenEnded_mscoco_{split}_questions.json", f"v2_mscoco_{split}_annotations.json"
        # Answers of the test splits are on the server alone.
        has_answers = need_answers or not split.startswith("test")
        names = [questions_name, f"{image_folder}/", *([answers_name] if has_answers else [])]
        questions, folder, *rest = require_files(self.title, self.path, names, "https://visualqa.org/download.html")
        answers = self._answers(rest[0]) if has_answers else {}
        with parsing(questions):
            return [
                Sample(
                    key=str(row["question_id"]),
                    images=(folder / fill_template(self.image_name, image_folder=image_folder, image_id=row["image_id"]),),
                    data={"question": row["question"]} | ({"answers": answers[row["question_id"]]} if has_answers else {}),
                )
                for row in read_json(questions)["questions"]
            ]

    def _answers(self, path: Path) -> dict[int, list[str]]:
        with parsing(path):
            rows = read_json(path)["annotations"]
            return {row["question_id"]: [answer["answer"] for answer in row["answers"]] for row in rows}

    def _submission(self, key: str, prediction: str) -> dict[str, Any]:
        return {"question_id": int(key), "answer": prediction}


class VizWiz(VisualQuestions):
    """VizWiz: `SPLIT.json` or `Annotations/SPLIT.json`, and `SPLIT/` with the images.

    The file: `[{"image": NAME, "question": ..., "answers": [{"answer": ...}, ...]}, ...]`, `answers` missing for `test`.
    """

    title = "VizWiz"
    published = "vizwiz"
    train_split = "train"

    def __init__(self, path: str, *, split: str = "val", **options: Any) -> None:
        """Set the options.

        Args:
            path: Folder with questions and images.
            split: `val`, `train` or `test`.
            **options: Those of `VisualQuestions`.
        """
        super().__init__(path, split=split, **options)

    def _read(self, split: str, *, need_answers: bool) -> list[Sample]:
        names = [[f"{split}.json", f"Annotations/{split}.json"], f"{split}/"]
        file, folder = require_files(self.title, self.path, names, "https://vizwiz.org/tasks-and-datasets/vqa/")
        with parsing(file):
            return [self._sample(folder, row, need_answers) for row in read_json(file)]

    def _sample(self, folder: Path, row: dict[str, Any], need_answers: bool) -> Sample:
        # Needed for demonstrations: a sample without them is an error there, but not in the test split.
        answers = {"answers": [each["answer"] for each in row["answers"]]} if need_answers or "answers" in row else {}
        return Sample(key=row["image"], images=(folder / row["image"],), data={"question": row["question"]} | answers)

    def _submission(self, key: str, prediction: str) -> dict[str, Any]:
        return {"image": key, "answer": prediction}
