from random import Random

import pytest

from datamodules.world.scene import (
    PLACES,
    SIDE,
    Holdout,
    Scene,
    Thing,
    draw_scene,
    held_out_scenes,
    paint,
    relation,
    training_scene,
)

KINDS = ("object", "count", "pair", "group", "word")
RULES = Holdout(0, 0.28)


def scenes(kind, n=101):
    random = Random(7)
    return [draw_scene(random, kind) for _ in range(n)]


@pytest.mark.parametrize(
    ("kind", "fewest", "most"),
    [("object", 1, 1), ("count", 2, 4), ("pair", 2, 2), ("group", 3, 4), ("word", 0, 0)],
)
def test_a_kind_says_how_many_things_there_are(kind, fewest, most):
    assert {len(s.things) for s in scenes(kind)} == set(range(fewest, most + 1))


@pytest.mark.parametrize("kind", KINDS)
def test_no_two_things_stand_in_one_place(kind):
    assert all(len({t.place for t in s.things}) == len(s.things) for s in scenes(kind))


def test_counted_things_are_alike():
    assert all(len({(t.shape, t.colour, t.size) for t in s.things}) == 1 for s in scenes("count"))


@pytest.mark.parametrize("kind", ["pair", "group"])
def test_things_of_a_pair_or_group_differ_in_look(kind):
    assert all(len({(t.shape, t.colour) for t in s.things}) == len(s.things) for s in scenes(kind))


def test_a_pair_stands_in_one_row_or_in_one_column():
    for scene in scenes("pair"):
        (row, column), (other_row, other_column) = (divmod(t.place, 3) for t in scene.things)
        assert (row == other_row) != (column == other_column)


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [(0, 2, "to the left of"), (5, 3, "to the right of"), (1, 7, "above"), (8, 2, "below")],
)
def test_relations_are_what_one_sees(first, second, said):
    assert relation(Thing("ring", "red", "small", first), Thing("star", "blue", "small", second)) == said


@pytest.mark.parametrize("kind", KINDS)
def test_no_training_scene_has_a_held_out_combination(kind):
    random = Random(3)
    for _ in range(101):
        scene = training_scene(random, kind, RULES)
        assert not any(RULES.is_held_out(c) for c in scene.combinations())


def test_a_scene_is_not_allowed_for_any_of_its_parts():
    held_out = next(s for s in scenes("object", 997) if RULES.is_held_out(s.own_combination())).things[0]
    places = [p for p in range(9) if p != held_out.place]
    others = Thing("ring", "red", "small", places[0]), Thing("star", "blue", "small", places[1])
    assert not RULES.allows(Scene("group", (held_out, *others)))


@pytest.mark.parametrize("kind", ["object", "count", "pair"])
def test_held_out_scenes_are_held_out_and_each_is_another(kind):
    found = held_out_scenes(Random(5), RULES, kind, 97)
    assert all(RULES.is_held_out(s.own_combination()) for s in found)
    assert len({s.own_combination() for s in found}) == len(found) > 0


def test_held_out_scenes_follow_from_the_seed():
    first, second = (held_out_scenes(Random(5), RULES, "pair", 7) for _ in range(2))
    assert first == second


def test_the_share_held_out_is_about_what_was_asked():
    every = [("object", s, c, z, p) for s in "abcdef" for c in "ghijklm" for z in "no" for p in range(9)]
    n = sum(RULES.is_held_out(c) for c in every)
    assert abs(n - 0.28 * 756) < 5 * (756 * 0.28 * 0.72) ** 0.5  # five standard deviations of a fair draw


def test_two_drawings_of_a_scene_differ():
    scene = scenes("object")[0]
    assert paint(scene, Random(3)).tobytes() != paint(scene, Random(5)).tobytes()


def test_a_drawing_follows_from_scene_and_seed():
    scene = scenes("group")[0]
    assert paint(scene, Random(3)).tobytes() == paint(scene, Random(3)).tobytes()


@pytest.mark.parametrize("place", range(9), ids=PLACES)
def test_a_thing_is_drawn_where_its_place_says(place):
    image = paint(Scene("object", (Thing("circle", "black", "large", place),), "white"), Random(7)).convert("L")
    dark = [(x // (SIDE // 3), y // (SIDE // 3)) for x in range(SIDE) for y in range(SIDE) if image.getpixel((x, y)) < 64]
    assert max(set(dark), key=dark.count) == (place % 3, place // 3)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_drawn_in_more_than_one_colour(kind):
    assert all(low < high for low, high in paint(scenes(kind)[0], Random(3)).getextrema())
