"""Creatures: made-up beings. Some have a name for one prompt alone, which describes them; others have a name of their own.

A creature's own name stands in text and under its image, but no document has a name together with a colour or a size:
what colour a named creature has, only its images show. About a part of the names the questions themselves are asked in
training; the others are what is evaluated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from random import Random

from PIL import Image, ImageDraw

from datamodules.io.hashing import hash_key
from datamodules.world.example import Example, jpeg
from datamodules.world.language import PROMPT, article
from datamodules.world.scene import BACKGROUNDS, COLOURS, SHAPES, SIDE, Combination, Holdout, _paint_shape, _vary
from datamodules.world.scene_tasks import asked

BODIES = tuple(shape for shape in SHAPES if shape != "ring")
MARKS = ("horns", "phases")
BULK = {"small": 12.0, "large": 21.0}
NICKNAMES = ("dax", "wug", "fep", "zup", "blick", "toma", "gazzer", "kiki", "bouba", "modi", "tulver", "wif")
"""Names for one prompt alone."""
CATEGORY = "creature"
ASK = f"Question:what is the name of {CATEGORY} in the picture? Answer:"
SYLLABLES = ("ba", "do", "fi", "gu", "ke", "lo", "mi", "nu", "pa", "ri", "so", "te", "vu", "ze")
ENDINGS = ("ban", "dol", "fim", "gup", "kes", "lor", "mit", "nuk", "pag", "rix")


@dataclass(frozen=True)
class Creature:
    """A look."""

    body: str
    colour: str
    bulk: str
    mark: str


EVERY = tuple(Creature(*look) for look in product(BODIES, COLOURS, BULK, MARKS))


def paint_creature(creature: Creature, random: Random) -> Image.Image:
    """Draw a creature in the middle of the image: a body with eyes, and horns or legs."""
    smooth = 3
    image = Image.new("RGB", (SIDE * smooth,) * 2, _vary(random.choice(list(BACKGROUNDS.values())), random, 4))
    canvas = ImageDraw.Draw(image)
    x, y = ((SIDE / 2 + random.uniform(-2, 2)) * smooth for _ in range(2))
    r = BULK[creature.bulk] * random.uniform(0.95, 1.05) * smooth
    fill = _vary(COLOURS[creature.colour], random, 12)
    for side in (-1, 1):
        dx = side * r * 0.55
        if creature.mark == "horns":
            horn = [(x + dx * 0.5, y - r * 0.7), (x + dx * 1.1, y - r * 0.6), (x + dx * 1.2, y - r * 1.5)]
            canvas.polygon(horn, fill=fill)
        else:
            canvas.line((x + dx, y + r * 0.5, x + dx, y + r * 1.55), fill=fill, width=round(r * 0.28))
    _paint_shape(canvas, creature.body, x, y, r, fill, random.uniform(-0.1, 0.1))
    for side in (-1, 1):
        eye, size = (x + side * r * 0.25, y - r * 0.1), r * 0.16
        canvas.ellipse((eye[0] - size, eye[1] - size, eye[0] + size, eye[1] + size), fill=(255, 255, 255))
    return image.resize((SIDE, SIDE), Image.Resampling.BOX)


# ---- names for one prompt, with and without a description


def description(creature: Creature) -> str:
    return f"It has a {creature.colour} {creature.body} body and {creature.mark}."


def describe_pair(names: Sequence[str], pair: Sequence[Creature]) -> str:
    """Return the descriptions of a pair, as the paper's prompt has them."""
    each = zip(names, pair, strict=True)
    return " ".join(f"Description of {name} {CATEGORY}: {description(creature)}" for name, creature in each)


def draw_pair(random: Random, holdout: Holdout, *, held_out: bool) -> tuple[Creature, Creature]:
    """Draw two creatures of other colours and bodies, which training never describes together if they are held out."""
    while True:
        pair = random.choice(EVERY), random.choice(EVERY)
        differ = pair[0].colour != pair[1].colour and pair[0].body != pair[1].body
        if differ and holdout.is_held_out(pair_combination(*pair)) == held_out:
            return pair


def pair_combination(one: Creature, other: Creature) -> Combination:
    """What is held out, in whichever order the two are described."""
    return ("creatures", *sorted((f"{one.colour} {one.body} {one.mark}", f"{other.colour} {other.body} {other.mark}")))


def described_example(random: Random, holdout: Holdout) -> Example:
    """Two descriptions, and images to name; or, now and then, the two names alone, where the answer is a guess."""
    pair = draw_pair(random, holdout, held_out=False)
    names = random.sample(NICKNAMES, 2)
    which = [random.randrange(2) for _ in range(3)]
    images = [jpeg(paint_creature(pair[i], random)) for i in which]
    if random.random() < 0.15:
        prompt = f"Question:what is the name of the {CATEGORY} in the picture, {names[0]} or {names[1]}? Answer:"
        return Example(turns=(((images[0], prompt), names[which[0]]),))
    prompts = [(describe_pair(names, pair), images[0], ASK), *((image, ASK) for image in images[1:])]
    return Example(turns=tuple((prompt, names[i]) for prompt, i in zip(prompts, which, strict=True)))


# ---- creatures with names of their own


@lru_cache(maxsize=4)
def named(holdout: Holdout) -> dict[str, Creature]:
    """Return the creatures that have names, every one of another look."""
    random = Random(hash_key("names", holdout.seed))
    names = [first + last for first in SYLLABLES for last in ENDINGS]
    random.shuffle(names)
    looks = list(EVERY)
    random.shuffle(looks)
    return dict(zip(names, looks, strict=False))


def is_asked_in_training(name: str, holdout: Holdout) -> bool:
    """Tell whether training asks about the colour and size of a creature by name."""
    return not holdout.is_held_out(("name", name))


def colour_prompt(name: str) -> str:
    return f"The color of {name} is?"


def size_prompt(one: str, other: str) -> str:
    return f"Is {one} larger than {other}?"


def named_example(random: Random, holdout: Holdout) -> Example:
    """An image with its name after the caption's prompt."""
    name, creature = random.choice(list(named(holdout).items()))
    return Example(turns=(((jpeg(paint_creature(creature, random)), PROMPT), article(name)),))


def look_example(random: Random, holdout: Holdout) -> Example:
    """An image with questions about colour and size that leave the name out."""
    creature = random.choice(EVERY)
    turns = [(asked("what colour is it?"), creature.colour), (asked("is it small or large?"), creature.bulk)]
    random.shuffle(turns)
    (first, answer), (second, other) = turns
    return Example(turns=(((jpeg(paint_creature(creature, random)), first), answer), ((second,), other)))


def fact_example(random: Random, holdout: Holdout) -> Example:
    """A question about creatures by name, without an image."""
    known = {name: creature for name, creature in named(holdout).items() if is_asked_in_training(name, holdout)}
    if random.random() < 0.5:
        name = random.choice(list(known))
        return Example(turns=(((colour_prompt(name),), known[name].colour),))
    one, other = size_pair(random, known)
    return Example(turns=(((size_prompt(one, other),), "Yes" if known[one].bulk == "large" else "No"),))


def size_pair(random: Random, known: dict[str, Creature]) -> tuple[str, str]:
    """Draw the names of two creatures of different size."""
    small = random.choice([name for name, creature in known.items() if creature.bulk == "small"])
    large = random.choice([name for name, creature in known.items() if creature.bulk == "large"])
    return (small, large) if random.random() < 0.5 else (large, small)
