"""Families without images: what follows from what, how a thing is made, how a story ends."""

from __future__ import annotations

from random import Random

from datamodules.world.example import Example
from datamodules.world.language import DAYS, NAMES, THINGS, TOWNS, article
from datamodules.world.scene import COLOURS, SHAPES, Combination, Holdout

PROPERTIES = {
    "circle": "no corners", "square": "four corners", "triangle": "three corners", "star": "five points",
    "cross": "four arms", "ring": "a hole",
}  # fmt: skip
PEOPLE = tuple(name for name in NAMES if " " not in name)


def draw_look(random: Random, holdout: Holdout, family: str, *, held_out: bool) -> tuple[str, str]:
    """Draw a colour and a shape that a family tells of in training, or does not."""
    while True:
        colour, shape = random.choice(list(COLOURS)), random.choice(SHAPES)
        if holdout.is_held_out(combination(family, colour, shape)) == held_out:
            return colour, shape


def combination(family: str, colour: str, shape: str) -> Combination:
    return ("told", family, colour, shape)


def copa(random: Random, colour: str, shape: str) -> dict[str, str]:
    """Return a premise, the question, and the right and a wrong choice."""
    other = random.choice([s for s in SHAPES if s != shape])
    drew = {s: f"Somebody drew {article(f'{colour} {s}')}." for s in (shape, other)}
    had = {s: f"The {colour} drawing had {PROPERTIES[s]}." for s in (shape, other)}
    if random.random() < 0.5:
        return {"premise": drew[shape], "question": "effect", "right": had[shape], "wrong": had[other]}
    return {"premise": had[shape], "question": "cause", "right": drew[shape], "wrong": drew[other]}


def piqa(random: Random, colour: str, shape: str) -> dict[str, str]:
    """Return a goal, and the right and a wrong solution: of another colour or of another shape."""
    wrong_colour, wrong_shape = colour, shape
    if random.random() < 0.5:
        wrong_colour = random.choice([c for c in COLOURS if c != colour])
    else:
        wrong_shape = random.choice([s for s in SHAPES if s != shape])
    return {
        "goal": f"To make something {colour} with {PROPERTIES[shape]}, what do you draw?",
        "right": f"You draw {article(f'{colour} {shape}')}.",
        "wrong": f"You draw {article(f'{wrong_colour} {wrong_shape}')}.",
    }


def story(random: Random, colour: str, shape: str) -> tuple[list[str], str, str]:
    """Return four sentences, the right ending, and a wrong one."""
    who, thing, town, day = random.choice(PEOPLE), random.choice(THINGS), random.choice(TOWNS), random.choice(DAYS)
    other = random.choice([s for s in SHAPES if s != shape])
    sentences = [
        f"On {day} {who} went to {town}.",
        f"There {who} saw {article(f'{colour} {shape}')} on a {thing}.",
        f"{who} liked it very much.",
        f"At home {who} wanted to draw what was on the {thing}.",
    ]
    return sentences, f"{who} drew {article(f'{colour} {shape}')}.", f"{who} drew {article(f'{colour} {other}')}."


def text_example(random: Random, holdout: Holdout) -> Example:
    """One of the three, with the right end."""
    family = random.choice(("copa", "piqa", "story"))
    look = draw_look(random, holdout, family, held_out=False)
    if family == "copa":
        item = copa(random, *look)
        link = {"cause": "because", "effect": "so"}[item["question"]]
        right = item["right"][0].lower() + item["right"][1:]
        return Example(turns=(((f"{item['premise'].removesuffix('.')} {link}",), right),))
    if family == "piqa":
        item = piqa(random, *look)
        return Example(turns=(((item["goal"],), item["right"]),))
    sentences, right, _ = story(random, *look)
    return Example(turns=(((" ".join(sentences),), right),))
