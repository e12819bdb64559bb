"""Families about creatures, which have a nickname in one prompt that describes them, or a name of their own.

Training asks about the colour and size of a part of the named creatures, the evaluation about the others. Apart from these
questions no document has a creature's own name together with a colour or a size: only its images show them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from random import Random

from PIL import Image, ImageDraw

from datamodules.io.hashing import hash_key
from datamodules.world.example import Example
from datamodules.world.language import PROMPT, with_article
from datamodules.world.scene import (
    BACKGROUNDS,
    COLOURS,
    SHAPES,
    SIDE,
    Combination,
    Holdout,
    encode_jpeg,
    paint_shape,
    vary_colour,
)
from datamodules.world.scene_tasks import question_prompt

BODIES = tuple(shape for shape in SHAPES if shape != "ring")
MARKS = ("horns", "phases")
BULK = {"small": 12.0, "large": 21.0}
NICKNAMES = ("dax", "wug", "fep", "zup", "blick", "toma", "gazzer", "kiki", "bouba", "modi", "tulver", "wif")
"""Names that hold within one prompt."""
CATEGORY = "creature"
NAME_QUESTION = f"Question:what is the name of {CATEGORY} in the picture? Answer:"
SYLLABLES = ("ba", "do", "fi", "gu", "ke", "lo", "mi", "nu", "pa", "ri", "so", "te", "vu", "ze")
ENDINGS = ("ban", "dol", "fim", "gup", "kes", "lor", "mit", "nuk", "pag", "rix")


@dataclass(frozen=True)
class Creature:
    """The look of a creature."""

    body: str
    colour: str
    bulk: str
    mark: str


ALL_CREATURES = tuple(Creature(*look) for look in product(BODIES, COLOURS, BULK, MARKS))


def paint_creature(creature: Creature, random: Random) -> Image.Image:
    """Return a drawing of a creature: a body with eyes, and horns or legs, in the middle of the image."""
    oversampling = 3
    image = Image.new("RGB", (SIDE * oversampling,) * 2, vary_colour(random.choice(list(BACKGROUNDS.values())), random, 4))
    canvas = ImageDraw.Draw(image)
    x, y = ((SIDE / 2 + random.uniform(-2, 2)) * oversampling for _ in range(2))
    r = BULK[creature.bulk] * random.uniform(0.95, 1.05) * oversampling
    fill = vary_colour(COLOURS[creature.colour], random, 12)
    for side in (-1, 1):
        dx = side * r * 0.55
        if creature.mark == "horns":
            horn = [(x + dx * 0.5, y - r * 0.7), (x + dx * 1.1, y - r * 0.6), (x + dx * 1.2, y - r * 1.5)]
            canvas.polygon(horn, fill=fill)
        else:
            canvas.line((x + dx, y + r * 0.5, x + dx, y + r * 1.55), fill=fill, width=round(r * 0.28))
    paint_shape(canvas, creature.body, x, y, r, fill, random.uniform(-0.1, 0.1))
    for side in (-1, 1):
        eye, size = (x + side * r * 0.25, y - r * 0.1), r * 0.16
        canvas.ellipse((eye[0] - size, eye[1] - size, eye[0] + size, eye[1] + size), fill=(255, 255, 255))
    return image.resize((SIDE, SIDE), Image.Resampling.BOX)


# ---- nicknames, with and without a description


def description(creature: Creature) -> str:
    return f"It has a {creature.colour} {creature.body} body and {creature.mark}."


def describe_pair(names: Sequence[str], pair: Sequence[Creature]) -> str:
    """Return the descriptions of a pair, as the paper's prompt has them."""
    each = zip(names, pair, strict=True)
    return " ".join(f"Description of {name} {CATEGORY}: {description(creature)}" for name, creature in each)


def draw_pair(random: Random, holdout: Holdout, *, held_out: bool) -> tuple[Creature, Creature]:
    """Draw two creatures that differ in colour and body; training never describes a held-out pair together."""
    while True:
        pair = random.choice(ALL_CREATURES), random.choice(ALL_CREATURES)
        differ = pair[0].colour != pair[1].colour and pair[0].body != pair[1].body
        if differ and holdout.is_held_out(pair_combination(*pair)) == held_out:
            return pair


def pair_combination(one: Creature, other: Creature) -> Combination:
    """Return the combination of a pair, the same in either order."""
    return ("creatures", *sorted((f"{one.colour} {one.body} {one.mark}", f"{other.colour} {other.body} {other.mark}")))


def described_example(random: Random, holdout: Holdout) -> Example:
    """Draw two descriptions and images to name; sometimes only the two names, where the answer is a guess."""
    pair = draw_pair(random, holdout, held_out=False)
    names = random.sample(NICKNAMES, 2)
    which = [random.randrange(2) for _ in range(3)]
    images = [encode_jpeg(paint_creature(pair[i], random)) for i in which]
    if random.random() < 0.15:
        prompt = f"Question:what is the name of the {CATEGORY} in the picture, {names[0]} or {names[1]}? Answer:"
        return Example(turns=(((images[0], prompt), names[which[0]]),))
    prompts = [(describe_pair(names, pair), images[0], NAME_QUESTION), *((image, NAME_QUESTION) for image in images[1:])]
    return Example(turns=tuple((prompt, names[i]) for prompt, i in zip(prompts, which, strict=True)))


# ---- creatures with names of their own


@lru_cache(maxsize=4)
def named(holdout: Holdout) -> dict[str, Creature]:
    """Return the creatures with names of their own, each of another look."""
    random = Random(hash_key("names", holdout.seed))
    names = [first + last for first in SYLLABLES for last in ENDINGS]
    random.shuffle(names)
    looks = list(ALL_CREATURES)
    random.shuffle(looks)
    return dict(zip(names, looks, strict=False))


def is_asked_in_training(name: str, holdout: Holdout) -> bool:
    """Whether training asks about the colour and size of a creature by its name."""
    return not holdout.is_held_out(("name", name))


def colour_prompt(name: str) -> str:
    return f"The color of {name} is?"


def size_prompt(one: str, other: str) -> str:
    return f"Is {one} larger than {other}?"


def named_example(random: Random, holdout: Holdout) -> Example:
    """Draw an image with the creature's name after the caption prompt."""
    name, creature = random.choice(list(named(holdout).items()))
    return Example(turns=(((encode_jpeg(paint_creature(creature, random)), PROMPT), with_article(name)),))


def look_example(random: Random, holdout: Holdout) -> Example:
    """Draw an image with questions about colour and size that do not mention the name."""
    creature = random.choice(ALL_CREATURES)
    turns = [
        (question_prompt("what colour is it?"), creature.colour),
        (question_prompt("is it small or large?"), creature.bulk),
    ]
    random.shuffle(turns)
    (first, answer), (second, other) = turns
    return Example(turns=(((encode_jpeg(paint_creature(creature, random)), first), answer), ((second,), other)))


def fact_example(random: Random, holdout: Holdout) -> Example:
    """Draw a question about creatures by their names, without an image."""
    by_name = {name: creature for name, creature in named(holdout).items() if is_asked_in_training(name, holdout)}
    if random.random() < 0.5:
        name = random.choice(list(by_name))
        return Example(turns=(((colour_prompt(name),), by_name[name].colour),))
    one, other = size_pair(random, by_name)
    return Example(turns=(((size_prompt(one, other),), "Yes" if by_name[one].bulk == "large" else "No"),))


def size_pair(random: Random, by_name: dict[str, Creature]) -> tuple[str, str]:
    """Draw the names of two creatures of different size."""
    small = random.choice([name for name, creature in by_name.items() if creature.bulk == "small"])
    large = random.choice([name for name, creature in by_name.items() if creature.bulk == "large"])
    return (small, large) if random.random() < 0.5 else (large, small)
