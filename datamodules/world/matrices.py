"""Progressive matrices in the manner of Raven's: context panels that follow rules, and candidates for the next panel.

Each attribute of a panel (shape, colour, size, and place or number) is constant, varies by row, or varies by column. Three
context panels are a 2 x 2 matrix without its last, eight a 3 x 3 one; four are the beginning of a row in which two looks
alternate. So the context determines every attribute of the missing panel.

The six candidates, the target among them, are all combinations of two values of one attribute and three of another. Each
value is as frequent as the others of its attribute, so the candidates alone do not reveal the target.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from random import Random

from PIL import Image, ImageDraw

from datamodules.io.hashing import hash_key
from datamodules.world.example import Example, Part, Turn
from datamodules.world.language import NUMBERS, PLURALS, with_article
from datamodules.world.scene import (
    BACKGROUNDS,
    CELL,
    COLOURS,
    MARGIN,
    PLACES,
    SHAPES,
    SIDE,
    SIZES,
    Combination,
    Holdout,
    encode_jpeg,
    paint_shape,
    vary_colour,
)

NUMERALS = {3: "three", 4: "four", 8: "eight"}
VALUES: dict[str, tuple[str | int, ...]] = {
    "shape": SHAPES,
    "colour": tuple(COLOURS),
    "size": tuple(SIZES),
    "place": tuple(range(9)),
    "number": (1, 2, 3),
}
LAYOUTS = {1: ((36.0, 36.0),), 2: ((19.0, 36.0), (53.0, 36.0)), 3: ((36.0, 19.0), (19.0, 52.0), (53.0, 52.0))}
"""Centres of the things in a panel, by their number, in units of a drawing that is 72 wide."""
DRAWINGS = 4
"""Different drawings of each panel."""
AttributeRules = tuple[tuple[str, str], ...]
"""Each attribute that varies, and how: by `row`, by `column`, or in `turn`."""


@dataclass(frozen=True)
class Panel:
    """One image of a matrix."""

    shape: str
    colour: str
    size: str
    place: int
    """Index into PLACES; 4, the centre, if the number varies."""
    number: int

    def is_trainable(self, holdout: Holdout) -> bool:
        """Whether a training example may show it."""
        if self.number > 1:
            return not holdout.is_held_out(("count", self.number, self.colour, self.shape))
        return not holdout.is_held_out(("object", self.size, self.colour, self.shape, self.place))


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """One item."""

    context: tuple[Panel, ...]
    rules: AttributeRules
    candidates: tuple[Panel, ...]
    target: int
    """Index into `candidates`."""

    def combination(self) -> Combination:
        """Return what may be held out: the rules together with the look of the target."""
        target = self.candidates[self.target]
        flat = [word for rule in self.rules for word in rule]
        return ("matrix", len(self.context), *flat, target.shape, target.colour)

    def is_trainable(self, holdout: Holdout) -> bool:
        """Whether a training example may show it."""
        return not holdout.is_held_out(self.combination()) and all(
            panel.is_trainable(holdout) for panel in {*self.context, *self.candidates}
        )


def draw_matrix(random: Random, n_context: int, n_varying: int) -> Matrix:
    """Draw a matrix in which `n_varying` attributes vary."""
    free = random.choice(("place", "number"))
    attributes = ["shape", "colour", "size", free]
    varying = random.sample(attributes, n_varying)
    side = {3: 2, 4: 2, 8: 3}[n_context]
    lines = {name: _line(random, name, side if name in varying else 1) for name in attributes}
    rules = {name: "turn" if n_context == 4 else random.choice(("row", "column")) for name in varying}
    cells = [divmod(i, side) for i in range(n_context + 1)]

    def panel(row: int, column: int) -> Panel:
        at = {"row": row, "column": column, "turn": column}
        values = {name: line[at[rules[name]] if name in rules else 0] for name, line in lines.items()}
        return Panel(**({"place": 4, "number": 1} | values))  # type: ignore[arg-type]

    panels = [panel(*cell) for cell in cells]
    one = random.choice(varying)
    other = random.choice([name for name in attributes if name not in (one, "size")])
    if len(VALUES[one]) > 2 and random.random() < 0.5 and one != "size":
        one, other = other, one
    candidates = _candidates(random, panels[-1], one, other, {name: lines[name] for name in varying})
    return Matrix(
        context=tuple(panels[:-1]),
        rules=tuple(sorted(rules.items())),
        candidates=candidates,
        target=candidates.index(panels[-1]),
    )


def _line(random: Random, name: str, n: int) -> list[str | int]:
    values = VALUES[name]
    if n <= len(values):
        return random.sample(values, n)
    line = [*values, random.choice(values)]
    random.shuffle(line)
    return line


def _candidates(random: Random, target: Panel, one: str, other: str, lines: dict[str, list[str | int]]) -> tuple[Panel, ...]:
    """Return two values of `one` times three of `other`; wrong values come from the matrix as far as it has enough."""

    def values(name: str, n: int) -> list[str | int]:
        true = getattr(target, name)
        near = list(dict.fromkeys(value for value in lines.get(name, ()) if value != true))
        far = [value for value in VALUES[name] if value != true and value not in near]
        random.shuffle(near)
        random.shuffle(far)
        return [true, *(near + far)[: n - 1]]

    looks = product(values(one, 2), values(other, 3))
    candidates = [replace(target, **{one: a, other: b}) for a, b in looks]  # type: ignore[arg-type]
    random.shuffle(candidates)
    return tuple(candidates)


def training_matrix(random: Random, holdout: Holdout, n_context: int, n_varying: int) -> Matrix:
    """Draw a matrix that may be trained on."""
    while not (matrix := draw_matrix(random, n_context, n_varying)).is_trainable(holdout):
        pass
    return matrix


def held_out_matrix(random: Random, holdout: Holdout, n_context: int, n_varying: int) -> Matrix:
    """Draw a matrix that is held out."""
    while not holdout.is_held_out((matrix := draw_matrix(random, n_context, n_varying)).combination()):
        pass
    return matrix


@lru_cache(maxsize=16384)
def paint_panel(panel: Panel, drawing: int) -> bytes:
    """Return one of a panel's `DRAWINGS` drawings as a JPEG file."""
    random = Random(hash_key("panel", *map(str, vars(panel).values()), drawing))
    oversampling = 3
    image = Image.new("RGB", (SIDE * oversampling,) * 2, vary_colour(BACKGROUNDS["white"], random, 3))
    canvas = ImageDraw.Draw(image)
    centres = list(LAYOUTS[panel.number])
    if panel.number == 1:
        centres = [(MARGIN + CELL * (panel.place % 3 + 0.5), MARGIN + CELL * (panel.place // 3 + 0.5))]
    for centre in centres:
        x, y = (at + random.uniform(-1.0, 1.0) for at in centre)
        radius = SIZES[panel.size] * random.uniform(0.96, 1.04)
        fill = vary_colour(COLOURS[panel.colour], random, 10)
        paint_shape(
            canvas, panel.shape, x * oversampling, y * oversampling, radius * oversampling, fill, random.uniform(-0.08, 0.08)
        )
    return encode_jpeg(image.resize((SIDE, SIDE), Image.Resampling.BOX))


FOLLOWING = "The following image is:"


def context_prompt(context: Sequence[Part]) -> tuple[Part, ...]:
    """Return the first part of the paper's prompt, with the context panels."""
    return (f"Here are {NUMERALS[len(context)]} images:", *context)


def candidate_prompt(candidate: Part) -> tuple[Part, ...]:
    """Return the second part of the paper's prompt, for one candidate."""
    return (FOLLOWING, candidate, "Is it correct?")


def describe_panel(panel: Panel) -> str:
    """Return a panel's description."""
    if panel.number == 1:
        return f"{with_article(f'{panel.size} {panel.colour} {panel.shape}')} {PLACES[panel.place]}"
    return f"{NUMBERS[panel.number]} {panel.size} {panel.colour} {PLURALS[panel.shape]}"


def matrix_example(random: Random, holdout: Holdout) -> Example:
    """Draw a matrix whose missing panel is described, whose candidates are judged with equal chances, or both in turn."""
    n_context = random.choice((3, 3, 3, 4, 8, 8, 8))
    matrix = training_matrix(random, holdout, n_context, random.choice((1, 1, 2) if n_context < 8 else (1, 2, 2, 3)))
    context = [paint_panel(panel, random.randrange(DRAWINGS)) for panel in matrix.context]
    target = matrix.candidates[matrix.target]
    wrong = [panel for i, panel in enumerate(matrix.candidates) if i != matrix.target]
    form = random.choice(("described", "judged", "judged", "judged", "both"))
    turns: list[Turn] = [] if form == "judged" else [((FOLLOWING,), describe_panel(target))]
    for _ in range({"described": 0, "judged": 6, "both": 5}[form]):
        panel, answer = (target, "Yes") if random.random() < 0.5 else (random.choice(wrong), "No")
        turns.append((candidate_prompt(paint_panel(panel, random.randrange(DRAWINGS))), answer))
    (first, answer), *others = turns
    return Example(turns=(((*context_prompt(context), *first), answer), *others))
