"""Batches of requests of one kind and similar length; requests of one sample that begin alike share their beginning."""

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

MIN_SHARED_PREFIX = 16
"""Positions that prompts must have in common to be merged."""

ImageRef = tuple[Path, bool]
"""An image's file, and whether grey takes its place."""


@dataclass(frozen=True)
class BatchItem:
    """A request as tokens, or several that differ only at their ends."""

    indices: tuple[int, ...]
    """Indices of its requests among those of the same time."""
    kind: str
    """Only requests of one kind can share a batch."""
    prompt: Prompt
    images: tuple[ImageRef, ...]
    """Images of the prompt in order, then those that candidates refer to by their index in this tuple."""
    candidates: list[list[int]]
    """Token ids of the candidates of all requests in turn; none to generate."""
    n_unscored: list[int]
    """For each candidate, how many of its first tokens belong to its prompt and are not scored."""
    n_new: int
    """Positions beside those of the prompt, all beams and candidates counted."""

    @classmethod
    def of(
        cls,
        index: int,
        request: Request,
        prompt: Prompt,
        images: tuple[ImageRef, ...],
        candidates: list[list[int]],
        max_new_tokens: int,
    ) -> BatchItem:
        """Return the item of one request, whose response has at most `max_new_tokens` tokens."""
        if isinstance(request, LogLikelihood):
            # Before prompts are merged, every token of a candidate is scored.
            return cls((index,), "score", prompt, images, candidates, [0] * len(candidates), cache_capacity(candidates))
        # A batch is one call of the engine, which has one setting for all.
        return cls((index,), repr(request.settings), prompt, images, [], [], max_new_tokens * request.settings.n_beams)

    @property
    def length(self) -> int:
        return len(self.prompt.tokens) + self.n_new


Batch = Sequence[BatchItem]


def merge_prefixes(items: Sequence[BatchItem], image: int, n_latents: int) -> list[BatchItem]:
    """Return the log-likelihood items of one sample as one item, if their prompts begin alike for long enough.

    The common beginning becomes the prompt; the rest of each prompt becomes the unscored beginning of its candidates.

    Args:
        items: log-likelihood items.
        image: id of <image>.
        n_latents: slots an image.
    """
    if len(items) < 2:
        return list(items)
    # Numbered over all prompts: equal images get equal numbers, and differing ones end the common beginning.
    images = {ref: i for i, ref in enumerate(dict.fromkeys(ref for item in items for ref in item.images))}
    rows = [_with_image_numbers(item, images, n_latents) for item in items]
    shortest = min(map(len, rows))
    # (shortest,): True where all prompts have the same id.
    is_same = np.all([row[:shortest] == rows[0][:shortest] for row in rows], axis=0)
    # argmin of booleans is the first False, but 0 if there is none.
    n = shortest if is_same.all() else int(np.argmin(is_same))
    while n and rows[0][n - 1] == image:  # <image> stays together with its slots
        n -= 1
    if n < MIN_SHARED_PREFIX:
        return list(items)
    # The first slots of the images within the common beginning, which holds whole images only.
    slots = items[0].prompt.slots[items[0].prompt.slots < n]
    prompt_images = items[0].images[: len(slots)]
    # The prompt's images come first, once for each place that shows them; candidates refer to the list of all behind these.
    candidate_slots = [slot_token(len(prompt_images) + i) for i in range(len(images))]
    candidates, n_unscored = list[list[int]](), list[int]()
    for item, row in zip(items, rows, strict=True):
        # Slots were numbered over all prompts; now they refer to the images of the merged item.
        rest = [candidate_slots[slot_token(s)] if s < 0 else s for s in row[n:].tolist()]
        candidates += [[*rest, *ids] for ids in item.candidates]
        n_unscored += [len(rest)] * len(item.candidates)
    prompt = Prompt(items[0].prompt.tokens[:n], slots)
    indices = tuple(index for item in items for index in item.indices)
    return [
        BatchItem(indices, "score", prompt, (*prompt_images, *images), candidates, n_unscored, cache_capacity(candidates))
    ]


def _with_image_numbers(item: BatchItem, images: Mapping[ImageRef, int], n_latents: int) -> Ids:
    """Return a prompt's ids with the negative number of each image in its slots, so that different images differ."""
    # A copy: an item that is not merged keeps its own ids.
    row = item.prompt.tokens.copy()
    for first, ref in zip(item.prompt.slots, item.images, strict=True):
        row[first : first + n_latents] = slot_token(images[ref])
    return row


def make_batches(items: Sequence[BatchItem], max_positions: int) -> list[Batch]:
    """Return the items in batches of one kind and similar length, at most `max_positions` each with padding.

    The longest come first, so that a batch that is too large for the device fails at once. An item longer than
    `max_positions` is a batch alone.
    """
    by_kind: dict[str, list[BatchItem]] = defaultdict(list)
    for item in items:
        by_kind[item.kind].append(item)
    batches: list[Batch] = []
    for same_kind in by_kind.values():
        batch: list[BatchItem] = []
        n_prompt = n_new = 0
        for item in sorted(same_kind, key=lambda item: -item.length):
            # Prompts and new positions are padded separately: the widest of each decides.
            wide = max(n_prompt, len(item.prompt.tokens)), max(n_new, item.n_new)
            # `batch and`: an item that is too long on its own still gets a batch.
            if batch and (len(batch) + 1) * sum(wide) > max_positions:
                batches.append(batch)
                batch, wide = [], (len(item.prompt.tokens), item.n_new)
            batch.append(item)
            n_prompt, n_new = wide
        batches.append(batch)  # never empty: each kind has an item
    return batches
