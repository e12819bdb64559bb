"""Which images a sample shows: its own, or those of a control without the sample's visual information."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Literal

from kosmos_lit.evaluation.task import Sample

ImageControl = Literal["true", "shuffled", "blank", "none"]
GREY = 127
"""Every value of a blank image."""


def shuffle_images(samples: Sequence[Sample], seed: int) -> list[Sample | None]:
    """Return the samples in order, each with another sample's images; no sample gets images equal to its own.

    Samples exchange images with those that have as many. Samples without a partner map to None: too many of those with as
    many images show the same ones.
    """
    shuffled: list[Sample | None] = [sample if not sample.images else None for sample in samples]
    by_count: dict[int, list[int]] = defaultdict(list)
    for i, sample in enumerate(samples):
        if sample.images:
            by_count[len(sample.images)].append(i)
    for count, places in sorted(by_count.items()):
        # The wording of the seed decides which images a sample gets: results of earlier runs depend on it.
        Random(f"pictures {seed} {count}").shuffle(places)
        first: dict[tuple[Path, ...], int] = {}
        for i in places:
            # Numbers groups of equal images in the order of the shuffle.
            first.setdefault(samples[i].images, len(first))
        # Equal images are neighbours on a circle: a step as long as the largest group ends in another group, as long as that
        # group is at most half of all.
        circle = sorted(places, key=lambda i: first[samples[i].images])
        step = max(Counter(first[samples[i].images] for i in circle).values())
        for at, i in enumerate(circle):
            images = samples[circle[(at + step) % len(circle)]].images
            # Equal only within a group of more than half of all.
            if images != samples[i].images:
                shuffled[i] = replace(samples[i], images=images)
    return shuffled
