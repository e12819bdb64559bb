"""Progressive matrices in the manner of Raven's: panels that follow rules, the last of which is to be told from others.

Each attribute of a panel (shape, colour, size, and place or number) is the same everywhere, goes by the row, or goes by the
column. Three given panels are a 2 x 2 matrix without its last, eight a 3 x 3 one; four are the beginning of a row in which
two looks alternate. So the panels given determine the missing one in each attribute.

The six candidates are all combinations of two values of one attribute and three of another, the right one among them: each
value is as frequent as the others of its attribute, and no candidate can be told from the others alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from random import Random

from PIL import Image, ImageDraw

from datamodules.io.hashing import hash_key
from datamodules.world.example import Example, Part, Turn, jpeg
from datamodules.world.language import NUMBERS, PLURALS, article
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
    _paint_shape,
    _vary,
)  # fmt: skip

NUMERALS = {3: "three", 4: "four", 8: "eight"}
VALUES: dict[str, tuple[str | int, ...]] = {
    "shape": SHAPES, "colour": tuple(COLOURS), "size": tuple(SIZES), "place": tuple(range(9)), "number": (1, 2, 3),
}  # fmt: skip
LAYOUTS = {1: ((36.0, 36.0),), 2: ((19.0, 36.0), (53.0, 36.0)), 3: ((36.0, 19.0), (19.0, 52.0), (53.0, 52.0))}
"""Where things stand in a panel of so many, in units of a drawing that is 72 wide."""
DRAWINGS = 4
"""Different drawings of one panel."""
Ways = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Panel:
    """One image of a matrix."""

    shape: str
    colour: str
    size: str
    place: int
    """Index into PLACES; 4, the centre, where the number may vary."""
    number: int

    def allowed(self, holdout: Holdout) -> bool:
        """Tell whether a training example may show it."""
        if self.number > 1:
            return not holdout.is_held_out(("count", self.number, self.colour, self.shape))
        return not holdout.is_held_out(("object", self.size, self.colour, self.shape, self.place))


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """One item."""

    given: tuple[Panel, ...]
    ways: Ways
    """How each attribute that varies goes: `row`, `column` or `turn`."""
    candidates: tuple[Panel, ...]
    right: int
    """Index into `candidates`."""

    def combination(self) -> Combination:
        """What is held out: the ways of its attributes with the look of the answer."""
        answer = self.candidates[self.right]
        flat = [word for way in self.ways for word in way]
        return ("matrix", len(self.given), *flat, answer.shape, answer.colour)

    def allowed(self, holdout: Holdout) -> bool:
        """Tell whether a training example may show it."""
        return not holdout.is_held_out(self.combination()) and all(
            panel.allowed(holdout) for panel in {*self.given, *self.candidates}
        )


def draw_matrix(random: Random, n_given: int, n_varying: int) -> Matrix:
    """Draw a matrix in which so many attributes vary."""
    free = random.choice(("place", "number"))
    attributes = ["shape", "colour", "size", free]
    varying = random.sample(attributes, n_varying)
    side = {3: 2, 4: 2, 8: 3}[n_given]
    lines = {name: _line(random, name, side if name in varying else 1) for name in attributes}
    ways = {name: "turn" if n_given == 4 else random.choice(("row", "column")) for name in varying}
    cells = [divmod(i, side) for i in range(n_given + 1)]

    def panel(row: int, column: int) -> Panel:
        at = {"row": row, "column": column, "turn": column}
        values = {name: line[at[ways[name]] if name in ways else 0] for name, line in lines.items()}
        return Panel(**({"place": 4, "number": 1} | values))  # type: ignore[arg-type]

    panels = [panel(*cell) for cell in cells]
    one = random.choice(varying)
    other = random.choice([name for name in attributes if name not in (one, "size")])
    if len(VALUES[one]) > 2 and random.random() < 0.5 and one != "size":
        one, other = other, one
    candidates = _candidates(random, panels[-1], one, other, {name: lines[name] for name in varying})
    return Matrix(
        given=tuple(panels[:-1]), ways=tuple(sorted(ways.items())), candidates=candidates, right=candidates.index(panels[-1])
    )


def _line(random: Random, name: str, n: int) -> list[str | int]:
    values = VALUES[name]
    if n <= len(values):
        return random.sample(values, n)
    line = [*values, random.choice(values)]
    random.shuffle(line)
    return line


def _candidates(
    random: Random, right: Panel, one: str, other: str, lines: dict[str, list[str | int]]
) -> tuple[Panel, ...]:
    """Return two values of `one` times three of `other`; wrong ones are of other lines of the matrix, where there are."""

    def values(name: str, n: int) -> list[str | int]:
        true = getattr(right, name)
        near = list(dict.fromkeys(value for value in lines.get(name, ()) if value != true))
        far = [value for value in VALUES[name] if value != true and value not in near]
        random.shuffle(near)
        random.shuffle(far)
        return [true, *(near + far)[: n - 1]]

    looks = product(values(one, 2), values(other, 3))
    found = [replace(right, **{one: a, other: b}) for a, b in looks]  # type: ignore[arg-type]
    random.shuffle(found)
    return tuple(found)


def training_matrix(random: Random, holdout: Holdout, n_given: int, n_varying: int) -> Matrix:
    """Draw matrices until one may be trained on."""
    while not (matrix := draw_matrix(random, n_given, n_varying)).allowed(holdout):
        pass
    return matrix


def held_out_matrix(random: Random, holdout: Holdout, n_given: int, n_varying: int) -> Matrix:
    """Draw matrices until one is held out."""
    while not holdout.is_held_out((matrix := draw_matrix(random, n_given, n_varying)).combination()):
        pass
    return matrix


@lru_cache(maxsize=16384)
def paint_panel(panel: Panel, drawing: int) -> bytes:
    """Return one of a panel's drawings as a file."""
    random = Random(hash_key("panel", *map(str, vars(panel).values()), drawing))
    smooth = 3
    image = Image.new("RGB", (SIDE * smooth,) * 2, _vary(BACKGROUNDS["white"], random, 3))
    canvas = ImageDraw.Draw(image)
    centres = list(LAYOUTS[panel.number])
    if panel.number == 1:
        centres = [(MARGIN + CELL * (panel.place % 3 + 0.5), MARGIN + CELL * (panel.place // 3 + 0.5))]
    for centre in centres:
        x, y = (at + random.uniform(-1.0, 1.0) for at in centre)
        radius = SIZES[panel.size] * random.uniform(0.96, 1.04)
        fill = _vary(COLOURS[panel.colour], random, 10)
        _paint_shape(canvas, panel.shape, x * smooth, y * smooth, radius * smooth, fill, random.uniform(-0.08, 0.08))
    return jpeg(image.resize((SIDE, SIDE), Image.Resampling.BOX))


FOLLOWING = "The following image is:"


def context_prompt(given: Sequence[Part]) -> tuple[Part, ...]:
    """Return the first part of the paper's prompt."""
    return (f"Here are {NUMERALS[len(given)]} images:", *given)


def candidate_prompt(candidate: Part) -> tuple[Part, ...]:
    """Return what follows for each candidate."""
    return (FOLLOWING, candidate, "Is it correct?")


def describe_panel(panel: Panel) -> str:
    """Return a panel in words."""
    if panel.number == 1:
        return f"{article(f'{panel.size} {panel.colour} {panel.shape}')} {PLACES[panel.place]}"
    return f"{NUMBERS[panel.number]} {panel.size} {panel.colour} {PLURALS[panel.shape]}"


def matrix_example(random: Random, holdout: Holdout) -> Example:
    """One matrix: what follows is told, or candidates are judged, right or wrong by a coin's toss, or both in turn."""
    n_given = random.choice((3, 3, 3, 4, 8, 8, 8))
    matrix = training_matrix(random, holdout, n_given, random.choice((1, 1, 2) if n_given < 8 else (1, 2, 2, 3)))
    given = [paint_panel(panel, random.randrange(DRAWINGS)) for panel in matrix.given]
    right = matrix.candidates[matrix.right]
    wrong = [panel for i, panel in enumerate(matrix.candidates) if i != matrix.right]
    form = random.choice(("told", "judged", "judged", "judged", "both"))
    turns: list[Turn] = [] if form == "judged" else [((FOLLOWING,), describe_panel(right))]
    for _ in range({"told": 0, "judged": 6, "both": 5}[form]):
        panel, answer = (right, "Yes") if random.random() < 0.5 else (random.choice(wrong), "No")
        turns.append((candidate_prompt(paint_panel(panel, random.randrange(DRAWINGS))), answer))
    (first, answer), *others = turns
    return Example(turns=(((*context_prompt(given), *first), answer), *others))
