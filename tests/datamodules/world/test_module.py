from pathlib import Path

import pytest

from datamodules import WorldData
from datamodules.world.language import PROMPT, canonical_caption
from datamodules.world.scene import COLOURS, PLACES, SHAPES, SIZES, Holdout, Scene, Thing
from datamodules.world.write import WorldConfig

SEED = 3
WORLD = {"seed": SEED, "n_pairs": 61, "n_pages": 23, "n_texts": 97, "shards": 2, "workers": 1}
OPTIONS = {
    "vocab_size": 97,
    "val_share": 0.2,
    "seq_len": 127,
    "n_latents": 3,
    "image_size": 17,
    "num_workers": 0,
    "global_batch_rows": 6,
    "micro_batch_rows": 3,
}


def world_data(folder, **changes):
    return WorldData(WorldConfig(path=str(folder), **WORLD), **(OPTIONS | changes))


@pytest.fixture(scope="module")
def batches(tmp_path_factory):
    """All questions; no world has to be written to ask them."""
    return list(world_data(tmp_path_factory.mktemp("nothing") / "world").predict_dataloader())


@pytest.fixture(scope="module")
def questions(batches):
    """All questions, as (prompt, answer, task, image)."""
    return [q for b in batches for q in zip(b.prompts, b.targets, b.tasks, b.images, strict=True)]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    module = world_data(tmp_path_factory.mktemp("world") / "world")
    module.prepare_data()
    module.setup("validate")
    return module


def test_there_are_enough_distinct_questions_about_objects_and_counts(questions):
    assert len({answer for _, answer, task, _ in questions if task in ("object", "count")}) >= 200


def test_no_question_is_asked_twice(questions):
    assert len({answer for _, answer, _, _ in questions}) == len(questions)


def test_every_held_out_object_and_count_is_asked_about(questions):
    holdout = Holdout(SEED, 0.28)
    things = [Thing(s, c, z, p) for s in SHAPES for c in COLOURS for z in SIZES for p in range(len(PLACES))]
    scenes = [Scene("object", (t,)) for t in things]
    scenes += [Scene("count", (Thing(s, c, "small", 0),) * n) for s in SHAPES for c in COLOURS for n in (2, 3, 4)]
    held_out = {canonical_caption(s) for s in scenes if holdout.is_held_out(s.own_combination())}
    assert {answer for _, answer, task, _ in questions if task in ("object", "count")} == held_out


def test_questions_are_asked_with_the_prompt_of_the_captions(questions):
    assert {prompt for prompt, _, _, _ in questions} == {PROMPT}


def test_questions_images_are_of_the_models_size_and_differ(questions):
    assert {tuple(image.shape) for *_, image in questions} == {(3, 17, 17)}
    assert len({image.numpy().tobytes() for *_, image in questions}) == len(questions)


def test_a_batch_of_questions_has_an_image_each(batches):
    for batch in batches:
        assert len(batch.images) == sum(batch.n_images) == len(batch.prompts) == len(batch.targets)


def test_the_world_is_drawn_prepared_and_mixed(data):
    batch = next(iter(data.train_dataloader()))
    assert set(data.prepared) == {"text", "caption", "interleaved"}
    assert tuple(batch.tokens.shape) == (3, 127)
    assert len(batch.images) > 0


def test_preparing_again_changes_nothing(data):
    files = [p for p in Path(data.world.path).rglob("*") if p.is_file()]
    before = {p: p.stat().st_mtime_ns for p in files}
    world_data(data.world.path).prepare_data()
    assert {p: p.stat().st_mtime_ns for p in files} == before
