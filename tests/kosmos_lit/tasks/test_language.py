"""The language tasks: their files, their prompts, and the scores of a model's responses."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from kosmos_lit import tasks
from kosmos_lit.errors import UserError
from kosmos_lit.evaluation.config import EvalConfig
from kosmos_lit.evaluation.multiple_choice import MultipleChoice, Scoring, candidate_scores
from kosmos_lit.evaluation.requests import LogLikelihood
from kosmos_lit.evaluation.runner import Evaluation
from kosmos_lit.inference.engine import Engine
from kosmos_lit.inference.prompts import encode_prompt
from kosmos_lit.inference.results import ScoredCandidate
from kosmos_lit.model import Kosmos
from kosmos_lit.report.published import published
from kosmos_lit.tokenizer import Tokenizer
from tests.kosmos_lit.tasks.language_datasets import DATASETS, write_lines
from tests.kosmos_lit.tiny_kosmos import LATENTS, random_images, tiny_model


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The folder of each task's dataset."""
    folders = {}
    for name, write in DATASETS.items():
        folder = tmp_path_factory.mktemp(name)
        write(folder)
        folders[name] = str(folder)
    return folders


@pytest.fixture(scope="module")
def model(kosmos_tower: str) -> Kosmos:
    return tiny_model(kosmos_tower, max_seq_len=701)


def prompts_of(task: MultipleChoice, number: int = 0) -> list[tuple[str, tuple[str, ...]]]:
    """Return prompts and candidates of a sample."""
    sample = task.samples()[number]
    requests = task.requests(sample, task.shots(sample, task.pool() if task.n_shots else ()))
    return [("".join(map(str, request.parts)), request.candidates) for request in requests]


@pytest.mark.parametrize(
    ("name", "number", "prompts", "target"),
    [
        (
            "StoryCloze",
            1,
            [('A cat sat down. It said "my mat, big!" A dog sat too. Why 1?', ("The mat is red.", "The dog sat on it."))],
            1,
        ),
        (
            "HellaSwag",
            2,
            [("A cat is on mat 2. a dog", ("sat on it.", "said how.", "is red\u2028 and blue.", "fix the quartz."))],
            2,
        ),
        (
            "Winograd",
            0,
            [
                ("The cat would not sit on the mat because The cat", ("was red.",)),
                ("The cat would not sit on the mat because The mat", ("was red.",)),
            ],
            1,
        ),
        (
            "Winograd",
            2,
            [
                ("A blue circle hid a red square because circle's", ("side was big, so big.",)),
                ("A blue circle hid a red square because square's", ("side was big, so big.",)),
            ],
            0,
        ),
        (
            "Winograd",
            3,
            [
                ("Jackdaws met my big sphinx and sat on jackdaws", (".",)),
                ("Jackdaws met my big sphinx and sat on sphinx", (".",)),
            ],
            1,
        ),
        (
            "Winograd",
            4,
            [("My cat fears a dog because my cat's", ("big.",)), ("My cat fears a dog because a dog's", ("big.",))],
            1,
        ),
        (
            "Winogrande",
            1,
            [
                ("The cat did not fit on mat 1 because the cat's", ("side was too red.",)),
                ("The cat did not fit on mat 1 because the mat's", ("side was too red.",)),
            ],
            1,
        ),
        ("Piqa", 1, [("How to fix mat 1?", ("Sit on it.", "Use quartz, big quartz."))], 1),
        (
            "BoolQ",
            0,
            [
                (
                    "Passage: Mat -- A mat is a big red thing. After reading this passage, I have a question: is mat 0 red? "
                    "True or False?",
                    ("False", "True"),
                )
            ],
            1,
        ),
        (
            "CommitmentBank",
            0,
            [
                (
                    "A cat is on mat 0. Question: the mat is red. True, False, or Neither? Answer:",
                    ("True", "False", "Neither"),
                )
            ],
            1,
        ),
        ("Copa", 0, [("The cat sat on mat 0 because", ("it was big.", "I fix it."))], 0),
        ("Copa", 1, [("The cat sat on mat 1 so", ("it was big.", "I fix it."))], 1),
        ("RelativeSize", 0, [("Is sphinx larger than cat?", ("Yes", "No"))], 0),
        ("RelativeSize", 3, [("Is mat larger than dog?", ("Yes", "No"))], 1),
        ("MemoryColor", 0, [("The color of the inside of a pineapple is?", tasks.object_color.COLORS)], 10),
        ("MemoryColor", 1, [("The color of grass is?", tasks.object_color.COLORS)], 3),
        ("ColorTerms", 1, [("The color of elephant is?", tasks.object_color.COLORS)], 4),
    ],
)
def test_prompts_are_these(
    folders: dict[str, str], name: str, number: int, prompts: list[tuple[str, tuple[str, ...]]], target: int
) -> None:
    task: MultipleChoice = getattr(tasks, name)(folders[name])

    assert prompts_of(task, number) == prompts
    assert task.question(task.samples()[number]).target == target


def pair_by_pair(task: MultipleChoice, number: int, model: Kosmos, tokenizer: Tokenizer) -> list[float]:
    """Return the mean log-probability of every candidate of a sample, each scored alone after its prompt."""
    means = []
    for prompt, candidates in prompts_of(task, number):
        for candidate in candidates:
            read = encode_prompt(prompt, 0, tokenizer, LATENTS)
            [[alone]] = Engine(model, tokenizer).score_batch([read], [[candidate]], random_images(0))
            means.append(alone.mean)
    return means


@pytest.mark.parametrize("name", DATASETS)
def test_files_become_the_accuracy_of_each_candidate_on_its_own(
    folders: dict[str, str], model: Kosmos, kosmos_tokenizer: Tokenizer, tmp_path: Path, name: str
) -> None:
    task: MultipleChoice = getattr(tasks, name)(folders[name], n_shots=1)
    evaluation = Evaluation(Engine(model, kosmos_tokenizer), EvalConfig(tasks={"it": task}), tmp_path / "results")

    entry = evaluation.run("it")

    text = (tmp_path / "results" / "it" / "samples.jsonl").read_text(encoding="utf-8")
    lines = [json.loads(line) for line in text.strip().split("\n")]
    means = pair_by_pair(task, 1, model, kosmos_tokenizer)
    question = task.question(task.samples()[1])
    assert lines[1]["data"]["values"] == pytest.approx(means, abs=1e-5)
    assert lines[1]["prediction"] == question.names[int(np.argmax(means))]
    assert lines[1]["scores"]["accuracy"] == (int(np.argmax(means)) == question.target)
    assert entry["metrics"]["accuracy"]["value"] == pytest.approx(np.mean([line["scores"]["accuracy"] for line in lines]))
    assert (entry["n_samples"], entry["n_failed"]) == (len(task.samples()), 0)
    assert (entry["title"], entry["published"], entry["chance"]) == (task.title, task.published, task.chance)


def test_cb_has_macro_f1_too(folders: dict[str, str], model: Kosmos, kosmos_tokenizer: Tokenizer, tmp_path: Path) -> None:
    task = tasks.CommitmentBank(folders["CommitmentBank"])

    entry = Evaluation(Engine(model, kosmos_tokenizer), EvalConfig(tasks={"cb": task}), tmp_path / "results").run("cb")

    assert entry["metrics"].keys() == {"accuracy", "macro_f1"}


@pytest.mark.parametrize("n_shots", [1, 4])
@pytest.mark.parametrize("name", DATASETS)
def test_demonstrations_are_solved_questions_before_the_samples_own(
    folders: dict[str, str], name: str, n_shots: int
) -> None:
    task: MultipleChoice = getattr(tasks, name)(folders[name], n_shots=n_shots, separator=" # ")
    sample = task.samples()[0]
    shots = task.shots(sample, task.pool())

    prompts = [prompt.split(" # ") for prompt, _ in prompts_of(task)]

    plain = [prompt for prompt, _ in prompts_of(getattr(tasks, name)(folders[name]))]
    assert prompts == [[*(task.question(shot).solved for shot in shots), prompt] for prompt in plain]
    assert len({shot.key for shot in shots} - {sample.key}) == n_shots


@pytest.mark.parametrize("name", ["Winograd", "MemoryColor", "ColorTerms", "RelativeSize"])
def test_a_question_without_training_split_is_never_its_own_demonstration(folders: dict[str, str], name: str) -> None:
    task: MultipleChoice = getattr(tasks, name)(folders[name], n_shots=2)
    pool = task.pool()

    for sample in task.samples():
        keys = {key.partition(",")[0] for key in (shot.key for shot in task.shots(sample, pool))}

        assert sample.key.partition(",")[0] not in keys


def test_demonstrations_follow_from_the_seed(folders: dict[str, str]) -> None:
    seeded = [tasks.HellaSwag(folders["HellaSwag"], n_shots=3, seed=seed) for seed in (0, 0, 1)]

    one, same, other = [[prompts_of(task, number) for number in range(3)] for task in seeded]

    assert one == same
    assert one != other


def candidate(text: str, *log_probs: float) -> ScoredCandidate:
    return ScoredCandidate(text, log_probs)


@pytest.mark.parametrize(
    ("scoring", "values"),
    [("sum", [-3.0, -3.5]), ("mean", [-1.0, -3.5]), ("bytes", [-3.0 / 7, -3.5 / 2]), ("unconditional", [-1.0, 0.5])],
)
def test_scoring_rules_are_these(scoring: Scoring, values: list[float]) -> None:
    conditional = [candidate("größe", -1.0, -1.0, -1.0), candidate("it", -3.5)]  # 7 and 2 bytes
    alone = [candidate("größe", -2.0), candidate("it", -4.0)] if scoring == "unconditional" else []

    assert candidate_scores([*conditional, *alone], scoring) == pytest.approx(values)


def test_unconditional_scoring_scores_the_candidates_twice(folders: dict[str, str]) -> None:
    shared = tasks.Copa(folders["Copa"], scoring="unconditional", unconditional="So:")
    own = tasks.Winogrande(folders["Winogrande"], scoring="unconditional")

    assert prompts_of(shared) == [
        ("The cat sat on mat 0 because", ("it was big.", "I fix it.")),
        ("So:", ("it was big.", "I fix it.")),
    ]
    assert [prompt for prompt, _ in prompts_of(own)][2:] == ["Answer:", "Answer:"]


def test_templates_and_words_are_options(folders: dict[str, str]) -> None:
    color = tasks.MemoryColor(folders["MemoryColor"], prompt="{item} is", colors=("red", "yellow"), title="Colours drawn")
    options = {"prompt": "{first} or {second}:", "answers": ("a", "b"), "orders": "larger_first"}
    size = tasks.RelativeSize(folders["RelativeSize"], **options)

    assert prompts_of(color) == [("pineapple is", ("red", "yellow"))]
    assert (color.chance, color.title, color.published) == (1 / 2, "Colours drawn", None)
    assert prompts_of(size, 1) == [("dog or mat:", ("a", "b"))]
    assert (len(size.samples()), size.chance) == (3, None)


def test_winograd_can_be_the_first_273_schemas(folders: dict[str, str]) -> None:
    assert len(tasks.Winograd(folders["Winograd"], n_schemas=3).samples()) == 3


def test_every_task_has_an_overlay_and_published_metrics() -> None:
    folder = Path(__file__).parents[3] / "configs" / "eval"
    joint = yaml.safe_load((folder / "language.yaml").read_text())["eval"]["tasks"]

    single = {name: yaml.safe_load((folder / f"{name}.yaml").read_text())["eval"]["tasks"][name] for name in joint}

    assert single == joint
    assert {entry["class_path"] for entry in joint.values()} == {f"kosmos_lit.tasks.{name}" for name in DATASETS}
    for name, entry in joint.items():
        task = getattr(tasks, entry["class_path"].rpartition(".")[2])(**entry["init_args"])
        assert task.published == name
        assert published(task.published) is not None


@pytest.mark.parametrize("name", DATASETS)
def test_a_missing_dataset_says_which_files_and_where_from(tmp_path: Path, name: str) -> None:
    task = getattr(tasks, name)(str(tmp_path))
    source = {"StoryCloze": "cs.rochester.edu", "Winogrande": "winogrande.allenai.org", "Copa": "super.gluebenchmark.com"}

    with pytest.raises(UserError, match=rf"^{task.title}: no .*{source.get(name, '')}"):
        task.samples()


def test_a_split_without_labels_is_an_error(tmp_path: Path) -> None:
    write_lines(tmp_path / "val.jsonl", [{"premise": "a", "choice1": "b", "choice2": "c", "question": "cause", "label": -1}])
    task = tasks.Copa(str(tmp_path))

    with pytest.raises(UserError, match=r"COPA, val.jsonl:1: label is '-1', not one of 0, 1; a split without labels"):
        task.question(task.samples()[0])


def test_labels_of_another_release_are_an_error(tmp_path: Path) -> None:
    DATASETS["Piqa"](tmp_path)
    write_lines(tmp_path / "valid-labels.lst", ["0", "1"])

    with pytest.raises(UserError, match="2 labels for 3 samples"):
        tasks.Piqa(str(tmp_path)).samples()


def test_a_line_that_lacks_a_field_is_named(tmp_path: Path) -> None:
    write_lines(tmp_path / "hellaswag_val.jsonl", [{"ctx": "a", "endings": ["b"], "label": 0}, {"ctx": "a", "label": 0}])

    with pytest.raises(UserError, match="no endings in sample 2"):
        tasks.HellaSwag(str(tmp_path)).samples()


def test_requests_are_log_likelihoods_of_text_alone(folders: dict[str, str]) -> None:
    for name in DATASETS:
        task: MultipleChoice = getattr(tasks, name)(folders[name])
        requests = task.requests(task.samples()[0], [])

        assert all(
            isinstance(one, LogLikelihood) and len(one.parts) == 1 and isinstance(one.parts[0], str) for one in requests
        )
