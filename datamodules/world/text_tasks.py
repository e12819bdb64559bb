"""Families without images, after COPA, PIQA and StoryCloze: cause and effect, ways to a goal, endings of stories."""

from __future__ import annotations

from random import Random

from datamodules.world.example import Example
from datamodules.world.language import DAYS, ITEMS, NAMES, TOWNS, with_article
from datamodules.world.scene import COLOURS, SHAPES, Combination, Holdout

PROPERTIES = {
    "circle": "no corners",
    "square": "four corners",
    "triangle": "three corners",
    "star": "five points",
    "cross": "four arms",
    "ring": "a hole",
}
PEOPLE = tuple(name for name in NAMES if " " not in name)


def draw_look(random: Random, holdout: Holdout, family: str, *, held_out: bool) -> tuple[str, str]:
    """Draw a colour and a shape that a family may use in training, or that it holds out."""
    while True:
        colour, shape = random.choice(list(COLOURS)), random.choice(SHAPES)
        if holdout.is_held_out(combination(family, colour, shape)) == held_out:
            return colour, shape


def combination(family: str, colour: str, shape: str) -> Combination:
    return ("told", family, colour, shape)


def copa(random: Random, colour: str, shape: str) -> dict[str, str]:
    """Draw a premise, the question, the target and a wrong choice."""
    other = random.choice([s for s in SHAPES if s != shape])
    drew = {s: f"Somebody drew {with_article(f'{colour} {s}')}." for s in (shape, other)}
    had = {s: f"The {colour} drawing had {PROPERTIES[s]}." for s in (shape, other)}
    if random.random() < 0.5:
        return {"premise": drew[shape], "question": "effect", "target": had[shape], "wrong": had[other]}
    return {"premise": had[shape], "question": "cause", "target": drew[shape], "wrong": drew[other]}


def piqa(random: Random, colour: str, shape: str) -> dict[str, str]:
    """Draw a goal, the target, and a wrong solution of another colour or another shape."""
    wrong_colour, wrong_shape = colour, shape
    if random.random() < 0.5:
        wrong_colour = random.choice([c for c in COLOURS if c != colour])
    else:
        wrong_shape = random.choice([s for s in SHAPES if s != shape])
    return {
        "goal": f"To make something {colour} with {PROPERTIES[shape]}, what do you draw?",
        "target": f"You draw {with_article(f'{colour} {shape}')}.",
        "wrong": f"You draw {with_article(f'{wrong_colour} {wrong_shape}')}.",
    }


def story(random: Random, colour: str, shape: str) -> tuple[list[str], str, str]:
    """Draw four sentences, the target ending, and a wrong one."""
    who, thing, town, day = random.choice(PEOPLE), random.choice(ITEMS), random.choice(TOWNS), random.choice(DAYS)
    other = random.choice([s for s in SHAPES if s != shape])
    sentences = [
        f"On {day} {who} went to {town}.",
        f"There {who} saw {with_article(f'{colour} {shape}')} on a {thing}.",
        f"{who} liked it very much.",
        f"At home {who} wanted to draw what was on the {thing}.",
    ]
    return sentences, f"{who} drew {with_article(f'{colour} {shape}')}.", f"{who} drew {with_article(f'{colour} {other}')}."


def text_example(random: Random, holdout: Holdout) -> Example:
    """Draw an example of one of the three, with its target."""
    family = random.choice(("copa", "piqa", "story"))
    look = draw_look(random, holdout, family, held_out=False)
    if family == "copa":
        item = copa(random, *look)
        link = {"cause": "because", "effect": "so"}[item["question"]]
        target = item["target"][0].lower() + item["target"][1:]
        return Example(turns=(((f"{item['premise'].removesuffix('.')} {link}",), target),))
    if family == "piqa":
        item = piqa(random, *look)
        return Example(turns=(((item["goal"],), item["target"]),))
    sentences, target, _ = story(random, *look)
    return Example(turns=(((" ".join(sentences),), target),))
