"""Text about the world: captions, pages, and texts without images.

The canonical caption of a scene is the target of the evaluation, after the prompt "An image of".
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from datamodules.world.scene import BACKGROUNDS, COLOURS, PLACES, SHAPES, Holdout, Scene, Thing, relation, training_scene

PROMPT = "An image of"
NUMBERS = ("no", "one", "two", "three", "four", "five")
ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth")
PLURALS = {shape: "crosses" if shape == "cross" else f"{shape}s" for shape in SHAPES}
FACTS = {
    "circle": "has no corners and no straight sides",
    "square": "has four corners and four equal sides",
    "triangle": "has three corners and three sides",
    "star": "has five points",
    "cross": "has four arms",
    "ring": "is round and has a hole in the middle",
}
NAMES = (
    "Ada",
    "Ben",
    "Clara",
    "David",
    "Emma",
    "Felix",
    "Greta",
    "Hugo",
    "Ida",
    "Jonas",
    "Klara",
    "Leo",
    "Mia",
    "Noah",
    "Olga",
    "Paul",
    "Rosa",
    "Simon",
    "Tilda",
    "Victor",
    "the painter",
    "the teacher",
    "my neighbour",
    "an old sailor",
)
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
TOWNS = ("Lisbon", "Bergen", "Cork", "Ghent", "Turin", "Riga", "Porto", "Malmo", "Basel", "Tampere", "Gdansk", "Trieste")
ITEMS = ("wall", "door", "window", "table", "curtain", "letter", "flag", "carpet", "bottle", "ceiling", "poster", "stamp")
FRUITS = ("apples", "pears", "lemons", "cherries", "plums", "figs", "grapes", "melons", "oranges", "berries")
ANIMALS = ("horses", "cats", "sparrows", "foxes", "whales", "beetles", "hedgehogs", "rabbits", "otters", "swans")
VERBS = ("drew", "painted", "cut out", "dreamed of", "printed", "sketched", "described", "asked for", "forgot about")
FEELINGS = ("liked", "disliked", "admired", "missed", "bought", "noticed", "remembered", "understood")
WARM_COLOURS = ("red", "yellow", "orange")
INVERSE = {"to the left of": "to the right of", "above": "below"}


def with_article(words: str) -> str:
    """Return words after a or an."""
    return f"{'an' if words[0] in 'aeio' else 'a'} {words}"


def look(thing: Thing) -> str:
    """Return colour and shape."""
    return f"{thing.colour} {thing.shape}"


def canonical_caption(scene: Scene) -> str:
    """Return the one description of a scene that counts as correct."""
    match scene.kind:
        case "object":
            [t] = scene.things
            return f"{with_article(f'{t.size} {look(t)}')} {PLACES[t.place]}"
        case "count":
            t = scene.things[0]
            return f"{NUMBERS[len(scene.things)]} {t.colour} {PLURALS[t.shape]}"
        case "pair":
            first, second = scene.things
            return f"{with_article(look(first))} {relation(first, second)} {with_article(look(second))}"
        case "word":
            return f"the word {scene.word}"
    return _enumerate([with_article(look(t)) for t in scene.things])


def caption(scene: Scene, random: Random) -> str:
    """Draw a caption, in about half of the cases the canonical one."""
    plain = canonical_caption(scene)
    if random.random() < 0.5:
        return f"{PROMPT} {plain}"
    ground = f"on {with_article(scene.background)} background"
    ways = [
        f"{plain[0].upper()}{plain[1:]}.",
        f"There {'are' if scene.kind == 'count' else 'is'} {plain}.",
        f"We see {plain}, {ground}.",
        f"{plain}, drawing, simple shapes",
        f"A {scene.background} picture with {plain}",
    ]
    if scene.kind == "object":
        [t] = scene.things
        ways += [
            f"The {t.shape} {PLACES[t.place]} is {t.size} and {t.colour}.",
            f"{t.colour} {t.shape}, {t.size}, {PLACES[t.place].split('the ')[1]}",
            f"{PLACES[t.place][0].upper()}{PLACES[t.place][1:]} stands {with_article(f'{t.size} {look(t)}')}.",
        ]
    elif scene.kind == "count":
        t, n = scene.things[0], len(scene.things)
        ways += [
            f"{PLURALS[t.shape]}, {NUMBERS[n]} of them, all {t.colour}",
            f"One can count {NUMBERS[n]} {t.colour} {PLURALS[t.shape]}.",
        ]
    elif scene.kind == "pair":
        first, second = scene.things
        ways += [
            f"{with_article(look(second)).capitalize()} {INVERSE[relation(first, second)]} {with_article(look(first))}."
        ]
    elif scene.kind == "word":
        ways += [f"Somebody has written {scene.word}.", f'"{scene.word}", lettering']
    return random.choice(ways)


def page_texts(scenes: Sequence[Scene], random: Random) -> tuple[str, list[str], str]:
    """Draw a page's opening, a paragraph for each of its images in order, and a closing that refers back to some of them."""
    topic = random.choice(("My drawings", "Shapes of the week", "A small exhibition", "Notes from the studio"))
    opening = f"{topic}. {random.choice(('Here are', 'This page shows', 'Today we look at'))} {_amount(len(scenes))}."
    paragraphs = []
    for n, scene in enumerate(scenes):
        start = random.choice((f"The {ORDINALS[n]} picture shows", "Here we see", "This one has", PROMPT))
        paragraphs.append(f"{start} {canonical_caption(scene)}.")
    order = list(range(len(scenes)))
    random.shuffle(order)
    selected = order[: random.randint(1, min(3, len(order)))]
    recalled = [f"The {ORDINALS[n]} picture had {canonical_caption(scenes[n])}." for n in selected]
    return opening, paragraphs, " ".join(["Let us look back.", *recalled])


def _amount(n: int) -> str:
    return "one picture" if n == 1 else f"{NUMBERS[n] if n < len(NUMBERS) else n} pictures"


def text(random: Random, holdout: Holdout) -> str:
    """Draw a text without images: facts, and stories about scenes that may be trained on."""
    who = random.choice(NAMES)
    sentences = [_sentence(random, holdout, who) for _ in range(random.randint(3, 9))]
    return "\n".join(" ".join(sentences[i : i + 4]) for i in range(0, len(sentences), 4))


def _sentence(random: Random, holdout: Holdout, who: str) -> str:
    shape, (colour, other) = random.choice(SHAPES), random.sample(list(COLOURS), 2)
    description = canonical_caption(training_scene(random, random.choice(("object", "count", "pair", "group")), holdout))
    pick = random.choice
    facts = [
        f"{with_article(shape).capitalize()} {FACTS[shape]}.",
        f"{colour.capitalize()} is {'a warm' if colour in WARM_COLOURS else 'no warm'} colour, and {other} is not {colour}.",
        f"{pick(FRUITS).capitalize()} may be {colour}, but {pick(ANIMALS)} are not.",
        f"And often images of {PLURALS[shape]} hang by the {pick(ITEMS)}, one upon another.",
        f"Nobody in {pick(TOWNS)} had ever counted the {PLURALS[shape]} on the {pick(ITEMS)}.",
    ]
    stories = [
        f"{who} {pick(VERBS)} {description}.",
        f"On {pick(DAYS)} {who} wanted a picture of {description} for the {pick(ITEMS)}.",
        f"On {with_article(pick(list(BACKGROUNDS)))} sheet one could see {description}.",
        f"Whoever looks for {description} must look twice, said {pick(NAMES)}.",
        f"In {pick(TOWNS)} there was a {pick(ITEMS)} with {description}, and {who} {pick(FEELINGS)} it.",
        f"{pick(NAMES)} came with {pick(FRUITS)}, {pick(NAMES)} with {pick(ANIMALS)}, and they {pick(VERBS)} {description}.",
    ]
    return pick(facts) if random.random() < 0.3 else pick(stories)


def _enumerate(words: Sequence[str]) -> str:
    return f"{', '.join(words[:-1])} and {words[-1]}"
