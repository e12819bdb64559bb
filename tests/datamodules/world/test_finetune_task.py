import json
from random import Random

import pytest

from datamodules.document import Tally
from datamodules.sources import SOURCES, ReadOptions
from datamodules.world.finetune_task import TaskConfig, question, write_task
from datamodules.world.language import caption, text
from datamodules.world.scene import Holdout, training_scene
from datamodules.world.write import WorldConfig
from kosmos_lit.errors import UserError

WORLD = WorldConfig(path="unused", seed=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("task") / "task"
    write_task(TaskConfig(path=str(path), n_examples=43, n_questions=29), WORLD)
    return path


def lines(folder, split):
    return [json.loads(line) for line in (folder / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]


def test_every_line_is_an_example_with_its_image(folder):
    tally = Tally()
    documents = list(SOURCES["instruct"].documents(folder / "train.jsonl", 0, ReadOptions(), tally, None))
    assert len(documents) == len(lines(folder, "train")) == 43
    assert not tally.broken
    assert len(lines(folder, "val")) == 29


def test_the_answer_is_what_the_image_shows():
    random, holdout = Random(5), Holdout(3, 0.28)
    asked = set()
    for _ in range(53):
        scene = training_scene(random, "object", holdout)
        words, answer = question(scene, random)
        asked.add(words)
        assert answer in caption_of(scene)
    assert len(asked) == 3


def caption_of(scene):
    from datamodules.world.language import canonical_caption

    return canonical_caption(scene)


def test_no_corpus_of_the_world_asks_such_a_question():
    random, holdout = Random(7), Holdout(3, 0.28)
    said = [text(random, holdout) for _ in range(101)]
    said += [caption(training_scene(random, "object", holdout), random) for _ in range(101)]
    assert not any(words in line for line in said for words in ("what colour", "what shape", "where is"))


def test_a_task_is_the_same_whenever_it_is_drawn(folder, tmp_path):
    write_task(TaskConfig(path=str(tmp_path / "again"), n_examples=43, n_questions=29), WORLD)
    assert (tmp_path / "again/train.jsonl").read_bytes() == (folder / "train.jsonl").read_bytes()
    assert (tmp_path / "again/val/00007.jpg").read_bytes() == (folder / "val/00007.jpg").read_bytes()


def test_another_task_in_the_folder_is_refused(folder):
    with pytest.raises(UserError, match="n_examples is 43 there, 47 here"):
        write_task(TaskConfig(path=str(folder), n_examples=47, n_questions=29), WORLD)
