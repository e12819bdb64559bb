"""Requests of like kind and length, read together."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kosmos_lit.evaluation.requests import LogLikelihood, Request
from kosmos_lit.inference.prompts import Prompt
from kosmos_lit.inference.scoring import cache_capacity, slot_token
from kosmos_lit.tokenizer import Ids

LEAST_SHARED = 16
"""Positions that prompts must have in common to be read as one."""

Shown = tuple[Path, bool]
"""An image's file, and whether a blank one is shown instead."""


@dataclass(frozen=True)
class BatchItem:
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
    ) -> BatchItem:
        """Return a request whose answer has at most `n_new` tokens."""
        if isinstance(request, LogLikelihood):
            return cls((number,), "score", prompt, images, candidates, [0] * len(candidates), cache_capacity(candidates))
        return cls((number,), repr(request.settings), prompt, images, [], [], n_new * request.settings.n_beams)

    @property
    def length(self) -> int:
        return len(self.prompt.tokens) + self.n_places


Batch = Sequence[BatchItem]


def merge_prefixes(items: Sequence[BatchItem], image: int, n_latents: int) -> list[BatchItem]:
    """Return comparisons of one sample as one, if their prompts have a beginning in common that is worth it.

    Args:
        items: comparisons.
        image: id of <image>.
        n_latents: slots an image.
    """
    if len(items) < 2:
        return list(items)
    images = {shown: i for i, shown in enumerate(dict.fromkeys(shown for item in items for shown in item.images))}
    rows = [_symbols(item, images, n_latents) for item in items]
    least = min(map(len, rows))
    same = np.all([row[:least] == rows[0][:least] for row in rows], axis=0)
    n = least if same.all() else int(np.argmin(same))
    while n and rows[0][n - 1] == image:  # an image is not cut between <image> and its slots
        n -= 1
    if n < LEAST_SHARED:
        return list(items)
    slots = items[0].prompt.slots[items[0].prompt.slots < n]
    own = items[0].images[: len(slots)]
    # Places of the images: those of the common prompt as it shows them, then each of all.
    further = [slot_token(len(own) + i) for i in range(len(images))]
    candidates, given = list[list[int]](), list[int]()
    for item, row in zip(items, rows, strict=True):
        rest = [further[slot_token(s)] if s < 0 else s for s in row[n:].tolist()]
        candidates += [[*rest, *ids] for ids in item.candidates]
        given += [len(rest)] * len(item.candidates)
    prompt = Prompt(items[0].prompt.tokens[:n], slots)
    numbers = tuple(number for item in items for number in item.numbers)
    return [BatchItem(numbers, "score", prompt, (*own, *images), candidates, given, cache_capacity(candidates))]


def _symbols(item: BatchItem, images: Mapping[Shown, int], n_latents: int) -> Ids:
    """Return a prompt's ids, with which image it is in its slots."""
    row = item.prompt.tokens.copy()
    for first, shown in zip(item.prompt.slots, item.images, strict=True):
        row[first : first + n_latents] = slot_token(images[shown])
    return row


def make_batches(items: Sequence[BatchItem], most: int) -> list[Batch]:
    """Return the requests in batches of one kind, alike in length, of at most `most` positions with their padding.

    The longest come first: what is too large for a device is so at once. A request longer than `most` is a batch alone.
    """
    by_kind: dict[str, list[BatchItem]] = defaultdict(list)
    for item in items:
        by_kind[item.kind].append(item)
    found: list[Batch] = []
    for kind in by_kind.values():
        batch: list[BatchItem] = []
        n_prompt = n_places = 0
        for item in sorted(kind, key=lambda item: -item.length):
            wide = max(n_prompt, len(item.prompt.tokens)), max(n_places, item.n_places)
            if batch and (len(batch) + 1) * sum(wide) > most:
                found.append(batch)
                batch, wide = [], (len(item.prompt.tokens), item.n_places)
            batch.append(item)
            n_prompt, n_places = wide
        found.append(batch)
    return found
