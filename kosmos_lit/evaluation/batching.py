"""Requests of like kind and length, read together."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kosmos_lit.evaluation.requests import Request, Score
from kosmos_lit.inference.prompts import Prompt
from kosmos_lit.inference.scoring import places, slot_of
from kosmos_lit.tokenizer import Ids

LEAST_SHARED = 16
"""Positions that prompts must have in common to be read as one."""

Shown = tuple[Path, bool]
"""An image's file, and whether a blank one is shown instead."""


@dataclass(frozen=True)
class Unit:
    """A request as the model takes it."""

    numbers: tuple[int, ...]
    """Of the requests among those that are asked at the same time: one, or some that differ only at their ends."""
    kind: str
    """Only requests of one kind can be read together."""
    prompt: Prompt
    images: tuple[Shown, ...]
    """Those of the prompt in order, then those that candidates refer to by their places here."""
    candidates: list[list[int]]
    """Of all requests in turn: ids of what is compared; none where something is to be written."""
    given: list[int]
    """How many of each candidate's first tokens are not scored, as they belong to its prompt."""
    n_places: int
    """Positions that it needs beside those of the prompt, all beams and candidates counted."""

    @classmethod
    def of(
        cls,
        number: int,
        request: Request,
        prompt: Prompt,
        images: tuple[Shown, ...],
        candidates: list[list[int]],
        n_new: int,
    ) -> Unit:
        """Return a request whose answer has at most `n_new` tokens."""
        if isinstance(request, Score):
            return cls((number,), "score", prompt, images, candidates, [0] * len(candidates), places(candidates))
        return cls((number,), repr(request.settings), prompt, images, [], [], n_new * request.settings.n_beams)

    @property
    def length(self) -> int:
        return len(self.prompt.tokens) + self.n_places


Batch = Sequence[Unit]


def together(units: Sequence[Unit], image: int, n_latents: int) -> list[Unit]:
    """Return comparisons of one sample as one, if their prompts have a beginning in common that is worth it.

    Args:
        units: comparisons.
        image: id of <image>.
        n_latents: slots an image.
    """
    if len(units) < 2:
        return list(units)
    images = {shown: i for i, shown in enumerate(dict.fromkeys(shown for unit in units for shown in unit.images))}
    rows = [_symbols(unit, images, n_latents) for unit in units]
    least = min(map(len, rows))
    same = np.all([row[:least] == rows[0][:least] for row in rows], axis=0)
    n = least if same.all() else int(np.argmin(same))
    while n and rows[0][n - 1] == image:  # an image is not cut between <image> and its slots
        n -= 1
    if n < LEAST_SHARED:
        return list(units)
    slots = units[0].prompt.slots[units[0].prompt.slots < n]
    own = units[0].images[: len(slots)]
    # Places of the images: those of the common prompt as it shows them, then each of all.
    further = [slot_of(len(own) + i) for i in range(len(images))]
    candidates, given = list[list[int]](), list[int]()
    for unit, row in zip(units, rows, strict=True):
        rest = [further[slot_of(s)] if s < 0 else s for s in row[n:].tolist()]
        candidates += [[*rest, *ids] for ids in unit.candidates]
        given += [len(rest)] * len(unit.candidates)
    prompt = Prompt(units[0].prompt.tokens[:n], slots)
    numbers = tuple(number for unit in units for number in unit.numbers)
    return [Unit(numbers, "score", prompt, (*own, *images), candidates, given, places(candidates))]


def _symbols(unit: Unit, images: Mapping[Shown, int], n_latents: int) -> Ids:
    """Return a prompt's ids, with which image it is in its slots."""
    row = unit.prompt.tokens.copy()
    for first, shown in zip(unit.prompt.slots, unit.images, strict=True):
        row[first : first + n_latents] = slot_of(images[shown])
    return row


def batches(units: Sequence[Unit], most: int) -> list[Batch]:
    """Return the requests in batches of one kind, alike in length, of at most `most` positions with their padding.

    The longest come first: what is too large for a device is so at once. A request longer than `most` is a batch alone.
    """
    by_kind: dict[str, list[Unit]] = defaultdict(list)
    for unit in units:
        by_kind[unit.kind].append(unit)
    found: list[Batch] = []
    for kind in by_kind.values():
        batch: list[Unit] = []
        n_prompt = n_places = 0
        for unit in sorted(kind, key=lambda unit: -unit.length):
            wide = max(n_prompt, len(unit.prompt.tokens)), max(n_places, unit.n_places)
            if batch and (len(batch) + 1) * sum(wide) > most:
                found.append(batch)
                batch, wide = [], (len(unit.prompt.tokens), unit.n_places)
            batch.append(unit)
            n_prompt, n_places = wide
        found.append(batch)
    return found
