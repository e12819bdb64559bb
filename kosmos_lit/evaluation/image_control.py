"""What samples show: their own images, or a control that takes sight away."""

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
    """Return the samples with the images of others, in the same order; no sample gets images equal to its own.

    Samples exchange with those that have as many images. Who has nobody to exchange with is None: too many of those with
    as many images show the same ones.
    """
    found: list[Sample | None] = [sample if not sample.images else None for sample in samples]
    by_count: dict[int, list[int]] = defaultdict(list)
    for i, sample in enumerate(samples):
        if sample.images:
            by_count[len(sample.images)].append(i)
    for count, places in sorted(by_count.items()):
        Random(f"pictures {seed} {count}").shuffle(places)
        first: dict[tuple[Path, ...], int] = {}
        for i in places:
            first.setdefault(samples[i].images, len(first))
        # Equal ones side by side, in a circle: further on than the most of a kind, every other one is of another kind.
        circle = sorted(places, key=lambda i: first[samples[i].images])
        step = max(Counter(first[samples[i].images] for i in circle).values())
        for at, i in enumerate(circle):
            images = samples[circle[(at + step) % len(circle)]].images
            if images != samples[i].images:
                found[i] = replace(samples[i], images=images)
    return found
