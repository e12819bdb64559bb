"""Examples of the world's task families: turns of a prompt with images, and its answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from datamodules.world.scene import Holdout, Scene, draw_scene, training_scene

Part = str | bytes
"""Text, or the bytes of an image file."""
Turn = tuple[tuple[Part, ...], str]
"""A prompt, and its supervised answer."""


@dataclass(frozen=True, kw_only=True)
class Example:
    """One document: consecutive turns."""

    turns: tuple[Turn, ...]


Draw = Callable[[Random, Holdout], Example]
"""Draws a training example of a family, without anything that is held out."""


def held_out_scene(random: Random, kind: str, holdout: Holdout) -> Scene:
    """Draw a scene whose own combination is held out."""
    while not holdout.is_held_out((scene := draw_scene(random, kind)).own_combination()):
        pass
    return scene


def any_scene(random: Random, kind: str, holdout: Holdout, *, held_out: bool) -> Scene:
    """Draw a scene for training, or a held-out one."""
    return (held_out_scene if held_out else training_scene)(random, kind, holdout)
