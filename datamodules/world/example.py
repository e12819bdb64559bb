"""Examples of the world's families: turns of a prompt with images and the answer to it."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from PIL import Image

from datamodules.world.scene import Holdout, Scene, draw_scene, paint, training_scene

Part = str | bytes
"""Text, or the bytes of an image's file."""
Turn = tuple[tuple[Part, ...], str]
"""A prompt, and the answer that is learnt."""


@dataclass(frozen=True, kw_only=True)
class Example:
    """One document: turns that follow one another."""

    turns: tuple[Turn, ...]


Draw = Callable[[Random, Holdout], Example]
"""Draws a training example of a family: nothing in it shows or tells what the rules hold out."""


def jpeg(image: Image.Image) -> bytes:
    """Return an image as a file."""
    data = io.BytesIO()
    image.save(data, "JPEG", quality=92)
    return data.getvalue()


def shown(scene: Scene, random: Random) -> bytes:
    """Return a drawing of a scene as a file."""
    return jpeg(paint(scene, random))


def held_out_scene(random: Random, kind: str, holdout: Holdout) -> Scene:
    """Draw scenes until the combination that one stands for is held out."""
    while not holdout.is_held_out((scene := draw_scene(random, kind)).own_combination()):
        pass
    return scene


def any_scene(random: Random, kind: str, holdout: Holdout, *, held_out: bool) -> Scene:
    """Draw a scene for training, or one that training has not seen."""
    return (held_out_scene if held_out else training_scene)(random, kind, holdout)
