from random import Random

import pytest

from datamodules.world.language import PROMPT, article, canonical_caption, caption, page_texts, text
from datamodules.world.scene import COLOURS, PLACES, SHAPES, SIZES, Holdout, Scene, Thing, draw_scene

RED_RING = Thing("ring", "red", "small", 0)
ORANGE_STAR = Thing("star", "orange", "large", 2)
BLUE_CROSS = Thing("cross", "blue", "small", 8)


@pytest.mark.parametrize(
    ("scene", "said"),
    [
        (Scene("object", (RED_RING,)), "a small red ring at the top left"),
        (Scene("count", (BLUE_CROSS, BLUE_CROSS, BLUE_CROSS)), "three blue crosses"),
        (Scene("pair", (RED_RING, ORANGE_STAR)), "a red ring to the left of an orange star"),
        (Scene("pair", (ORANGE_STAR, BLUE_CROSS)), "an orange star above a blue cross"),
        (Scene("group", (RED_RING, ORANGE_STAR, BLUE_CROSS)), "a red ring, an orange star and a blue cross"),
        (Scene("word", word="lamp"), "the word lamp"),
    ],
)
def test_each_kind_of_scene_has_its_description(scene, said):
    assert canonical_caption(scene) == said


def test_no_two_objects_have_one_description():
    things = [Thing(s, c, z, p) for s in SHAPES for c in COLOURS for z in SIZES for p in range(len(PLACES))]
    assert len({canonical_caption(Scene("object", (t,))) for t in things}) == len(things)


@pytest.mark.parametrize("kind", ["object", "count", "pair", "group", "word"])
def test_about_every_second_caption_is_the_canonical_one(kind):
    random = Random(3)
    scenes = [draw_scene(random, kind) for _ in range(397)]
    n = sum(caption(s, random) == f"{PROMPT} {canonical_caption(s)}" for s in scenes)
    assert abs(n - 397 / 2) < 5 * (397 / 4) ** 0.5  # five standard deviations of a fair draw


def test_every_image_of_a_page_has_its_paragraph_and_is_described():
    random = Random(5)
    scenes = [draw_scene(random, "object") for _ in range(5)]
    _, paragraphs, _ = page_texts(scenes, random)
    assert len(paragraphs) == 5
    assert all(canonical_caption(s) in p for s, p in zip(scenes, paragraphs, strict=True))


def test_a_pages_closing_recalls_its_images_rightly():
    random = Random(7)
    scenes = [draw_scene(random, "pair") for _ in range(3)]
    _, _, closing = page_texts(scenes, random)
    recalled = closing.removeprefix("Let us look back. ").removesuffix(".").split(". ")
    possible = {
        f"The {n} picture had {canonical_caption(s)}" for n, s in zip(("first", "second", "third"), scenes, strict=True)
    }
    assert recalled
    assert set(recalled) <= possible


def test_a_text_follows_from_the_seed():
    assert text(Random(3), Holdout(0, 0.28)) == text(Random(3), Holdout(0, 0.28))
    assert text(Random(3), Holdout(0, 0.28)) != text(Random(5), Holdout(0, 0.28))


@pytest.mark.parametrize(("words", "said"), [("orange ring", "an orange ring"), ("small star", "a small star")])
def test_articles_are_right(words, said):
    assert article(words) == said
