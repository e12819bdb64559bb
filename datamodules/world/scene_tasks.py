"""Families about the world's scenes: captions, questions, questions that demonstrations explain, and classification."""

from __future__ import annotations

from random import Random

from datamodules.world.example import Example, Turn, any_scene, shown
from datamodules.world.language import INVERSE, NUMBERS, PLURALS, PROMPT, canonical_caption, look
from datamodules.world.scene import COLOURS, PLACES, SHAPES, Holdout, Scene, relation

ASPECTS = ("colour", "shape", "place")
"""What the question `WHAT` may mean."""
WHAT = "what is it?"
PHOTO = "The photo of the"
OPPOSITE = INVERSE | {there: back for back, there in INVERSE.items()}
CLASSES = tuple(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES)


def asked(question: str) -> str:
    """Return a question as the paper's prompt puts it."""
    return f"Question: {question} Answer:"


def caption_example(random: Random, holdout: Holdout) -> Example:
    """The canonical description after the paper's prompt."""
    scene = any_scene(random, random.choice(("object", "object", "count", "pair")), holdout, held_out=False)
    return Example(turns=(((shown(scene, random), PROMPT), canonical_caption(scene)),))


def questions(scene: Scene, random: Random) -> dict[str, tuple[str, str]]:
    """Return every kind of question about a scene that has one right answer: kind -> (question, answer)."""
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
    found = {}
    true = relation(*scene.things) if one is first else OPPOSITE[relation(*scene.things)]
    told, answer = random.choice(((true, "yes"), (OPPOSITE[true], "no")))
    found["relation"] = (f"is the {look(one)} {told} the {look(other)}?", answer)
    if one.shape != other.shape:
        found["colour of one"] = (f"what colour is the {one.shape}?", one.colour)
    if one.colour != other.colour:
        found["shape of one"] = (f"what shape is the {one.colour} one?", one.shape)
    return found


def question_example(random: Random, holdout: Holdout) -> Example:
    """All questions about one image, in any order."""
    scene = any_scene(random, random.choice(("object", "count", "pair", "pair")), holdout, held_out=False)
    image = shown(scene, random)
    pairs = list(questions(scene, random).values())
    random.shuffle(pairs)
    first, *others = [(asked(question), answer) for question, answer in pairs]
    return Example(turns=(((image, first[0]), first[1]), *(((prompt,), answer) for prompt, answer in others)))


def aspect_of(scene: Scene, aspect: str) -> str:
    """Return what `WHAT` asks for, if it means this aspect."""
    [thing] = scene.things
    return {"colour": thing.colour, "shape": thing.shape, "place": PLACES[thing.place]}[aspect]


def few_shot_example(random: Random, holdout: Holdout) -> Example:
    """Images with one question, whose answers tell what it means."""
    aspect = random.choice(ASPECTS)
    turns: list[Turn] = []
    for _ in range(random.choice((1, 3, 5))):
        scene = any_scene(random, "object", holdout, held_out=False)
        turns.append(((shown(scene, random), asked(WHAT)), aspect_of(scene, aspect)))
    return Example(turns=tuple(turns))


def class_of(scene: Scene) -> str:
    """Return the class of a scene of one thing."""
    return look(scene.things[0])


def class_example(random: Random, holdout: Holdout) -> Example:
    """The name of the class after the paper's prompt."""
    scene = any_scene(random, "object", holdout, held_out=False)
    return Example(turns=(((shown(scene, random), PHOTO), class_of(scene)),))


