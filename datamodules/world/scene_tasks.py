"""Families about scenes: captions, questions, questions that only demonstrations explain, and classification."""

from __future__ import annotations

from random import Random

from datamodules.world.example import Example, Turn, any_scene
from datamodules.world.language import INVERSE, NUMBERS, PLURALS, PROMPT, canonical_caption, look
from datamodules.world.scene import COLOURS, PLACES, SHAPES, Holdout, Scene, paint_jpeg, relation

ASPECTS = ("colour", "shape", "place")
"""The possible meanings of the question `WHAT`."""
WHAT = "what is it?"
PHOTO = "The photo of the"
OPPOSITE = INVERSE | {second: first for first, second in INVERSE.items()}
CLASSES = tuple(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES)


def question_prompt(question: str) -> str:
    """Return a question in the form of the paper's prompt."""
    return f"Question: {question} Answer:"


def caption_example(random: Random, holdout: Holdout) -> Example:
    """Draw an image with its canonical caption after the paper's prompt."""
    scene = any_scene(random, random.choice(("object", "object", "count", "pair")), holdout, held_out=False)
    return Example(turns=(((paint_jpeg(scene, random), PROMPT), canonical_caption(scene)),))


def questions(scene: Scene, random: Random) -> dict[str, tuple[str, str]]:
    """Return the questions about a scene that have one right answer, with it: kind -> (question, answer)."""
    first = scene.things[0]
    if scene.kind == "object":
        return {
            "colour": ("what colour is it?", first.colour),
            "shape": ("what shape is it?", first.shape),
            "size": ("is it small or large?", first.size),
            "place": ("where is it?", PLACES[first.place]),
        }
    if scene.kind == "count":
        return {
            "count": (f"how many {PLURALS[first.shape]} are there?", NUMBERS[len(scene.things)]),
            "colour of all": ("what colour are they?", first.colour),
            "shape of all": ("what shape are they?", first.shape),
        }
    one, other = random.sample(scene.things, 2)
    pairs = {}
    true = relation(*scene.things) if one is first else OPPOSITE[relation(*scene.things)]
    claimed, answer = random.choice(((true, "yes"), (OPPOSITE[true], "no")))
    pairs["relation"] = (f"is the {look(one)} {claimed} the {look(other)}?", answer)
    if one.shape != other.shape:
        pairs["colour of one"] = (f"what colour is the {one.shape}?", one.colour)
    if one.colour != other.colour:
        pairs["shape of one"] = (f"what shape is the {one.colour} one?", one.shape)
    return pairs


def question_example(random: Random, holdout: Holdout) -> Example:
    """Draw an image with all questions about it, in random order."""
    scene = any_scene(random, random.choice(("object", "count", "pair", "pair")), holdout, held_out=False)
    image = paint_jpeg(scene, random)
    pairs = list(questions(scene, random).values())
    random.shuffle(pairs)
    first, *others = [(question_prompt(question), answer) for question, answer in pairs]
    return Example(turns=(((image, first[0]), first[1]), *(((prompt,), answer) for prompt, answer in others)))


def aspect_of(scene: Scene, aspect: str) -> str:
    """Return the answer to `WHAT` if it means this aspect."""
    [thing] = scene.things
    return {"colour": thing.colour, "shape": thing.shape, "place": PLACES[thing.place]}[aspect]


def few_shot_example(random: Random, holdout: Holdout) -> Example:
    """Draw images with the question `WHAT`; the first answers show which aspect it means."""
    aspect = random.choice(ASPECTS)
    turns: list[Turn] = []
    for _ in range(random.choice((1, 3, 5))):
        scene = any_scene(random, "object", holdout, held_out=False)
        turns.append(((paint_jpeg(scene, random), question_prompt(WHAT)), aspect_of(scene, aspect)))
    return Example(turns=tuple(turns))


def class_of(scene: Scene) -> str:
    """Return the class of a scene of one thing."""
    return look(scene.things[0])


def class_example(random: Random, holdout: Holdout) -> Example:
    """Draw an image with the name of its class after the paper's prompt."""
    scene = any_scene(random, "object", holdout, held_out=False)
    return Example(turns=(((paint_jpeg(scene, random), PHOTO), class_of(scene)),))
