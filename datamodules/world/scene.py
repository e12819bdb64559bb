"""The scenes of the world: what they contain, which are held out, and how they are painted."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from random import Random

from PIL import Image, ImageDraw, ImageFont

from datamodules.io.hashing import hash_key, share_of

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
COLOURS = {
    "red": (214, 40, 40),
    "green": (42, 157, 64),
    "blue": (38, 84, 214),
    "yellow": (236, 200, 20),
    "purple": (132, 44, 168),
    "orange": (240, 128, 20),
    "black": (24, 24, 24),
}
SIZES = {"small": 8.0, "large": 11.0}
"""Radius, in units of a drawing that is 72 units wide."""
PLACES = (
    "at the top left",
    "at the top",
    "at the top right",
    "on the left",
    "in the centre",
    "on the right",
    "at the bottom left",
    "at the bottom",
    "at the bottom right",
)
BACKGROUNDS = {"white": (252, 252, 252), "grey": (204, 204, 204), "beige": (240, 226, 200), "pale blue": (206, 224, 242)}
SIDE = 72
MARGIN, CELL = 2.5, (SIDE - 5.0) / 3
"""Places are the cells of a 3 x 3 grid inside the margin."""
WORDS = ("lamp", "bird", "seven", "north", "apple", "river", "stone", "cloud", "green", "paper", "horse", "music")

Combination = tuple[str | int, ...]


@dataclass(frozen=True)
class Thing:
    """One object of a scene."""

    shape: str
    colour: str
    size: str
    place: int
    """Index into PLACES."""


@dataclass(frozen=True)
class Scene:
    """One image."""

    kind: str
    """`object` (one thing), `count` (2 to 4 alike), `pair` (two that differ), `group` (3 or 4 that differ) or `word`."""
    things: tuple[Thing, ...] = ()
    background: str = "white"
    word: str = ""

    def combinations(self) -> Iterator[Combination]:
        """Yield every combination in this scene that may be held out, also those of a part of it."""
        for t in self.things:
            yield ("object", t.size, t.colour, t.shape, t.place)
        if self.kind == "count":
            yield ("count", len(self.things), self.things[0].colour, self.things[0].shape)
        if self.kind == "pair":
            first, second = self.things
            yield ("pair", first.colour, first.shape, relation(first, second), second.colour, second.shape)

    def own_combination(self) -> Combination:
        """Return the combination of the scene as a whole, which `combinations` yields last."""
        *_, own = self.combinations()
        return own


def relation(first: Thing, second: Thing) -> str:
    """Return the position of `first` relative to `second`, in the words of a caption."""
    row, column = divmod(first.place, 3)
    other_row, other_column = divmod(second.place, 3)
    if row == other_row:
        return "to the left of" if column < other_column else "to the right of"
    return "above" if row < other_row else "below"


class Holdout:
    """The combinations that are held out of training: a share of all, drawn by hash."""

    def __init__(self, seed: int, held_out: float) -> None:
        self.seed, self.share = seed, held_out

    def is_held_out(self, combination: Combination) -> bool:
        """Whether training must not contain a combination."""
        return share_of(hash_key("held out", self.seed, *combination)) < self.share

    def is_trainable(self, scene: Scene) -> bool:
        """Whether training may contain a scene: none of its combinations is held out."""
        return not any(self.is_held_out(c) for c in scene.combinations())


def draw_scene(random: Random, kind: str) -> Scene:
    """Draw a random scene of a kind, held out or not."""
    background = random.choice(list(BACKGROUNDS))
    if kind == "word":
        return Scene(kind, (), background, random.choice(WORDS))
    if kind == "count":
        return _count_scene(random, random.randint(2, 4), random.choice(SHAPES), random.choice(list(COLOURS)))
    n = {"object": 1, "pair": 2}.get(kind) or random.randint(3, 4)
    looks = random.sample([(s, c) for s in SHAPES for c in COLOURS], n)
    places = sorted(random.sample(range(9), n) if kind != "pair" else _neighbouring_places(random))
    things = (Thing(*look, random.choice(list(SIZES)), p) for look, p in zip(looks, places, strict=True))
    return Scene(kind, tuple(things), background)


def _count_scene(random: Random, n: int, shape: str, colour: str) -> Scene:
    """Draw a `count` scene: n things of one look at random places."""
    size, places = random.choice(list(SIZES)), sorted(random.sample(range(9), n))
    return Scene("count", tuple(Thing(shape, colour, size, p) for p in places), random.choice(list(BACKGROUNDS)))


def _neighbouring_places(random: Random) -> list[int]:
    """Draw two places in one row or in one column."""
    line, (a, b) = random.randrange(3), random.sample(range(3), 2)
    return [3 * line + a, 3 * line + b] if random.random() < 0.5 else [3 * a + line, 3 * b + line]


def training_scene(random: Random, kind: str, holdout: Holdout) -> Scene:
    """Draw a scene that may be trained on."""
    while not holdout.is_trainable(scene := draw_scene(random, kind)):
        pass
    return scene


def held_out_scenes(random: Random, holdout: Holdout, kind: str, limit: int) -> list[Scene]:
    """Return at most `limit` scenes of a kind, in random order, each of another held-out combination."""
    scenes_of: dict[Combination, Scene] = {}
    if kind == "object":
        things = [Thing(s, c, z, p) for s in SHAPES for c in COLOURS for z in SIZES for p in range(9)]
        for thing in things:
            scene = Scene(kind, (thing,), random.choice(list(BACKGROUNDS)))
            if holdout.is_held_out(scene.own_combination()):
                scenes_of[scene.own_combination()] = scene
    elif kind == "count":
        for n, shape, colour in product((2, 3, 4), SHAPES, COLOURS):
            scene = _count_scene(random, n, shape, colour)
            if holdout.is_held_out(scene.own_combination()):
                scenes_of[scene.own_combination()] = scene
    else:
        for _ in range(200 * limit):  # pairs are too many to enumerate
            scene = draw_scene(random, kind)
            if holdout.is_held_out(scene.own_combination()):
                scenes_of.setdefault(scene.own_combination(), scene)
            if len(scenes_of) == limit:
                break
    # Keys mix text and numbers, which do not compare with each other.
    scenes = [scenes_of[key] for key in sorted(scenes_of, key=repr)]
    random.shuffle(scenes)
    return scenes[:limit]


def paint(scene: Scene, random: Random, side: int = SIDE, oversampling: int = 3) -> Image.Image:
    """Return a drawing of a scene; place, size, colour, tilt and background vary a little from drawing to drawing."""
    scale = side * oversampling / SIDE
    image = Image.new("RGB", (side * oversampling,) * 2, vary_colour(BACKGROUNDS[scene.background], random, 6))
    canvas = ImageDraw.Draw(image)
    for thing in scene.things:
        x, y = (MARGIN + CELL * (i + 0.5) + random.uniform(-1.5, 1.5) for i in (thing.place % 3, thing.place // 3))
        radius = SIZES[thing.size] * random.uniform(0.94, 1.06)
        fill = vary_colour(COLOURS[thing.colour], random, 14)
        paint_shape(canvas, thing.shape, x * scale, y * scale, radius * scale, fill, random.uniform(-0.12, 0.12))
    if scene.kind == "word":
        font = ImageFont.load_default(size=round(22 * scale))
        at = (SIDE / 2 + random.uniform(-4, 4)) * scale, (SIDE / 2 + random.uniform(-14, 14)) * scale
        canvas.text(at, scene.word, fill=vary_colour(COLOURS["black"], random, 20), font=font, anchor="mm")
    return image.resize((side, side), Image.Resampling.BOX)


def paint_jpeg(scene: Scene, random: Random) -> bytes:
    """Return a drawing of a scene as a JPEG file."""
    return encode_jpeg(paint(scene, random))


def encode_jpeg(image: Image.Image) -> bytes:
    data = io.BytesIO()
    image.save(data, "JPEG", quality=92)
    return data.getvalue()


def encode_png(image: Image.Image) -> bytes:
    data = io.BytesIO()
    image.save(data, "PNG")
    return data.getvalue()


def paint_shape(
    canvas: ImageDraw.ImageDraw, shape: str, x: float, y: float, r: float, fill: tuple[int, int, int], tilt: float
) -> None:
    """Draw a shape of radius r with its centre at (x, y)."""

    def points(angles: list[float], radii: list[float]) -> list[tuple[float, float]]:
        return [(x + q * math.sin(a + tilt), y - q * math.cos(a + tilt)) for a, q in zip(angles, radii, strict=True)]

    if shape == "circle":
        canvas.ellipse((x - r, y - r, x + r, y + r), fill=fill)
    elif shape == "ring":
        canvas.ellipse((x - r, y - r, x + r, y + r), outline=fill, width=round(r * 0.42))
    elif shape == "cross":
        for a in (0.0, math.pi / 2):
            w = math.atan(0.3)
            canvas.polygon(points([a - w, a + w, a + math.pi - w, a + math.pi + w], [r * 1.04] * 4), fill=fill)
    else:
        n, start, inner = {"square": (4, math.pi / 4, 1.0), "triangle": (3, 0.0, 1.0), "star": (10, 0.0, 0.42)}[shape]
        angles = [start + 2 * math.pi * i / n for i in range(n)]
        radii = [r * 1.15 * (inner if i % 2 else 1.0) for i in range(n)]
        canvas.polygon(points(angles, radii), fill=fill)


def vary_colour(colour: tuple[int, int, int], random: Random, by: int) -> tuple[int, int, int]:
    """Return a colour with each channel changed by up to `by`."""
    r, g, b = (min(255, max(0, c + random.randint(-by, by))) for c in colour)
    return r, g, b
