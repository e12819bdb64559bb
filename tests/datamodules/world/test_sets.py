"""The evaluation sets: read by the tasks that they are for, balanced, and of combinations that training does not have."""

from collections import Counter
from pathlib import Path
from random import Random

import pytest
import yaml
from jsonargparse import ArgumentParser

from datamodules.world import creatures, rendered_text, text_tasks
from datamodules.world.language import canonical_caption
from datamodules.world.scene import COLOURS, SHAPES, SIZES, Holdout, Scene, Thing
from datamodules.world.scene_tasks import ASPECTS, any_scene, class_of, questions
from datamodules.world.sets import SETS, SetsConfig, write_sets
from datamodules.world.write import WorldConfig
from kosmos_lit.evaluation.config import EvalConfig
from kosmos_lit.evaluation.requests import Generate, LogLikelihood
from kosmos_lit.evaluation.task import Sample, Task
from kosmos_lit.inference.results import Continuation, ScoredCandidate

RULES = Holdout(3, 0.28)
OVERLAY = Path(__file__).parents[3] / "configs" / "eval" / "world.yaml"
TASKS = list(yaml.safe_load(OVERLAY.read_text(encoding="utf-8"))["eval"]["tasks"])
PATH = "${data.init_args.world.path}"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sets")
    write_sets(SetsConfig(n=42, n_matrices=7), WorldConfig(path=str(folder), seed=3))
    return folder


@pytest.fixture(scope="module")
def tasks(world: Path) -> dict[str, Task]:
    """The tasks of configs/eval/world.yaml on a small world, made as the command line makes them."""
    text = OVERLAY.read_text(encoding="utf-8").replace(PATH, str(world))
    parser = ArgumentParser()
    parser.add_argument("--eval", type=EvalConfig)
    return parser.instantiate(parser.parse_object(yaml.safe_load(text))).eval.enabled_tasks  # type: ignore[no-any-return]


def test_sets_are_the_same_twice(world: Path, tmp_path: Path) -> None:
    write_sets(SetsConfig(n=42, n_matrices=7), WorldConfig(path=str(tmp_path), seed=3))
    this, again = ({p.relative_to(f): p.read_bytes() for p in f.rglob("*") if p.is_file()} for f in (world, tmp_path))
    assert this == again


def test_every_set_is_asked_about(tasks: dict[str, Task], world: Path) -> None:
    assert {task.path.relative_to(world / "eval").parts[0] for task in tasks.values()} == set(SETS)


@pytest.mark.parametrize("name", TASKS)
def test_the_real_task_reads_its_set_and_asks(tasks: dict[str, Task], name: str) -> None:
    task = tasks[name]
    samples, pool = task.samples(), task.pool() if task.n_shots else ()

    asked = [next(task.ask(sample, task.shots(sample, pool))) for sample in samples]

    assert len(samples) >= (7 if name.startswith("matrices") else 14)
    assert len({sample.key for sample in samples}) == len(samples)
    parts = [part for requests in asked for request in requests for part in request.parts]
    assert all(part.is_file() for part in parts if isinstance(part, Path))
    assert name == "captions" or task.chance is not None


RIGHT = [name for name in TASKS if name not in ("captions", "opinions_cot") and not name.startswith("matrices")]


def answered(task: Task, sample: Sample, request: LogLikelihood | Generate) -> Continuation | tuple[ScoredCandidate, ...]:
    """Return the answer of somebody who knows what is right."""
    if isinstance(request, Generate):
        target = sample.data.get("answers", [sample.data.get("answer", sample.data.get("name"))])[0]
        target = target or sample.data["classes"][sample.data["target"]]["name"]
        return Continuation(target, (), True)
    best = task.question(sample).target if hasattr(task, "question") else request.candidates.index(sample.data["label"])
    return tuple(ScoredCandidate(text, (-1.0 if i == best else -2.0,)) for i, text in enumerate(request.candidates))


@pytest.mark.parametrize("name", RIGHT)
def test_who_answers_rightly_gets_everything(tasks: dict[str, Task], name: str) -> None:
    task = tasks[name]
    outcomes = []
    for sample in task.samples():
        session = task.ask(sample, task.shots(sample, task.pool() if task.n_shots else ()))
        requests = next(session)
        try:
            session.send([answered(task, sample, request) for request in requests])
        except StopIteration as end:
            outcomes.append(end.value)
    assert task.metrics(outcomes)[task.main_metric].value == 1


# ---- balance


@pytest.mark.parametrize("name", ["opinions", "copa", "piqa", "stories"])
def test_the_two_answers_are_equally_often_right(tasks: dict[str, Task], name: str) -> None:
    task = tasks[name]
    found = Counter(str(s.data.get("label", s.data.get("AnswerRightEnding"))) for s in task.samples())
    assert sorted(found.values()) == [21, 21]


def test_sizes_are_asked_in_both_orders(tasks: dict[str, Task]) -> None:
    labels = Counter(sample.data["label"] for sample in tasks["sizes"].samples())
    assert labels["0"] == labels["1"] > 0


def test_a_constant_answer_to_each_kind_of_question_gets_no_more_than_the_chance_level(tasks: dict[str, Task]) -> None:
    random, target = Random(5), Counter[tuple[str, str]]()
    for i in range(3000):
        scene = any_scene(random, ("object", "count", "pair")[i % 3], RULES, held_out=True)
        kind, (_, answer) = random.choice(list(questions(scene, random).items()))
        target[kind, answer] += 1
    kinds = {kind for kind, _ in target}
    best = sum(max(n for (k, _), n in target.items() if k == kind) for kind in kinds) / 3000
    assert tasks["questions"].chance is not None
    assert best - 0.05 < tasks["questions"].chance
    assert best < tasks["questions"].chance + 0.05


# ---- held out


def unseen_objects() -> set[str]:
    scenes = [Scene("object", (Thing(s, c, z, p),)) for s in SHAPES for c in COLOURS for z in SIZES for p in range(9)]
    return {canonical_caption(scene) for scene in scenes if RULES.is_held_out(scene.own_combination())}


def test_captions_of_things_are_of_combinations_that_training_does_not_have(tasks: dict[str, Task]) -> None:
    captions = [sample.data["captions"][0] for sample in tasks["captions"].samples()]
    of_things = [c for c in captions if c.startswith(("a small", "a large"))]
    assert len(of_things) == 14
    assert set(of_things) <= unseen_objects()


def test_demonstrations_are_of_combinations_that_training_may_have(world: Path) -> None:
    written = {path.name for path in (world / "eval").glob("what_*")}
    assert written == {f"what_{aspect}" for aspect in ASPECTS}
    random = Random(7)
    assert all(RULES.allows(any_scene(random, "object", RULES, held_out=False)) for _ in range(101))


def test_lines_that_pages_are_asked_about_are_held_out(tasks: dict[str, Task]) -> None:
    from kosmos_lit.tasks.websrc import page_text

    for sample in tasks["sites_text"].samples():
        words = page_text(Path(sample.data["page"]), None).split()
        at = words.index(sample.data["answer"])
        assert words[at - 1] in sample.data["question"]
        assert RULES.is_held_out(("site", at // 2, words[at - 1], words[at]))


def test_names_whose_colour_is_asked_are_never_asked_about_in_training(tasks: dict[str, Task]) -> None:
    things = {sample.data["item"] for sample in tasks["colours"].samples()}
    things |= {sample.data[side] for sample in tasks["sizes"].samples() for side in ("first", "second")}
    assert len(things) > 20
    assert not any(creatures.is_asked_in_training(name, RULES) for name in things)


def test_opinions_of_the_set_are_held_out() -> None:
    random = Random(11)
    drawn = [rendered_text.draw_opinion(random, RULES, held_out=True) for _ in range(53)]
    assert all(RULES.is_held_out(opinion.combination()) for opinion in drawn)


@pytest.mark.parametrize("family", ["copa", "piqa", "story"])
def test_what_is_told_in_the_sets_is_held_out(family: str) -> None:
    random = Random(13)
    for _ in range(31):
        assert RULES.is_held_out(text_tasks.combination(family, *text_tasks.draw_look(random, RULES, family, held_out=True)))


def test_classes_have_as_many_images_each(world: Path) -> None:
    counts = Counter(path.parent.name for path in (world / "eval" / "classes" / "val").rglob("*.JPEG"))
    assert len(counts) == 42
    assert set(counts.values()) == {1}
    assert class_of(any_scene(Random(1), "object", RULES, held_out=True)) in (
        (world / "eval" / "classes" / "names.txt").read_text(encoding="utf-8").splitlines()
    )
