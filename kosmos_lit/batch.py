"""The contract between data and model: what `datamodules` hand over and what `kosmos_lit` reads.

B rows of T positions; a row holds whole or split documents one after another, then padding. N images in the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kosmos_lit.tokenizer import Ids

CORPORA = ("text", "caption", "interleaved", "instruct")
"""The kinds of corpora, in the order of `KosmosBatch.corpus`."""
DIGEST_MASK = (1 << 63) - 1
"""Digests of rows are added up modulo 2 ** 63."""


class _Movable:
    """Moves every tensor field; Lightning and the DataLoader call these."""

    def to(self, device: torch.device | str, non_blocking: bool | None = None) -> Self:
        """Move to a device; copies to CUDA do not wait unless told so, as the loader pins memory."""
        waits_not = torch.device(device).type == "cuda" if non_blocking is None else non_blocking
        return self._map(lambda t: t.to(device, non_blocking=waits_not))

    def pin_memory(self) -> Self:
        return self._map(Tensor.pin_memory)

    def _map(self, move: Any) -> Self:
        moved = {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]
        return replace(self, **{k: move(v) for k, v in moved.items() if isinstance(v, Tensor)})  # type: ignore[type-var]


@dataclass(kw_only=True, eq=False)  # not frozen: Lightning refuses to walk through frozen ones
class KosmosBatch(_Movable):
    """One micro-batch of the training stream on one rank."""

    tokens: Tensor
    """(B, T) int64: input ids; image slots repeat the id of <image>, padding is <pad>."""
    targets: Tensor
    """(B, T) int64: the id that each position has to predict, or IGNORE."""
    positions: Tensor
    """(B, T) int64: position within the document, from 0; restarts at each document."""
    lengths: tuple[int, ...]
    """Positions of each document in the flattened (B * T) stream, a row's padding as one more; sums to B * T."""
    loss_at: Tensor
    """(S,) int64: the flat positions whose target is not IGNORE, known on the host so that no device sync is needed."""
    images: Tensor
    """(N, 3, H, W) uint8: the images in the order of their slots."""
    slots: Tensor
    """(N, 2) int64: row and first slot of each image; its latents go to that many positions from there."""
    corpus: Tensor
    """(B,) int64: index into `CORPORA`, -1 for a row that only fills up a validation batch."""
    n_bytes: Tensor
    """(B,) int64: UTF-8 bytes of text that the row's targets stand for."""
    rows: tuple[int, ...]
    """The rows' numbers in the stream."""
    n_step_targets: int
    """Supervised tokens of the whole optimizer step, over all ranks and micro-batches: the loss's denominator."""
    n_real: int
    """Positions that are not padding."""
    n_bad_images: int = 0
    """Images that could not be decoded: their documents are in the batch without targets."""
    bad: tuple[tuple[str, str], ...] = ()
    """(source, reason) of each of these images, and of each document that a blocklist strikes out."""
    sources: tuple[str, ...] = ()
    """The rows' sources by name."""
    amounts: tuple[int, ...] = ()
    """What each row counts in the mixture's unit: positions, supervised tokens or documents."""
    padding: tuple[int, ...] = ()
    """(B,) positions of padding at the end of each row, its last length if there are any; (): none in any row."""
    digest: int = 0
    """Sum of the rows' digests modulo 2 ** 63: the same rows give the same sum, however they are shared out."""


@dataclass(kw_only=True, eq=False)  # not frozen: Lightning refuses to walk through frozen ones
class PromptBatch(_Movable):
    """Questions to a model: a prompt with images, and the answer that would be right."""

    prompts: Sequence[str]
    """B prompts; `<image>` stands for the next image, and images without a mark come first."""
    images: Tensor
    """(N, 3, H, W) uint8: the images of all prompts, in order."""
    n_images: Sequence[int]
    """B numbers of images; they sum to N."""
    targets: Sequence[str]
    """B continuations that count as right."""
    tasks: Sequence[str]
    """B names of the tasks that the questions belong to."""
    tokens: Sequence[NDArray[np.int64]] | None = None
    """B prompts as ids without <s>, an image being one <image>; None: `prompts` are encoded."""


def find_slots(tokens: Tensor, image: int) -> Tensor:
    """Return (N, 2) row and first slot of each image in (B, T) tokens; slots repeat `image`, the id of <image>."""
    is_image = tokens == image
    opens = is_image.clone()
    opens[:, 1:] &= ~is_image[:, :-1]
    return opens.nonzero() + torch.tensor([0, 1], device=tokens.device)


def _has_slots(tokens: Ids, slots: Ids, n_latents: int, image: int, image_end: int) -> bool:
    """Whether `check_slots` has nothing to say: <image>, the slots and </image> of all images looked at in one go."""
    rows, firsts = slots.T
    if len(slots) and (firsts.min() < 1 or firsts.max() + n_latents >= tokens.shape[1]):
        return False
    is_image = tokens == image
    places = firsts[:, None] + np.arange(-1, n_latents)
    closed = (tokens[rows, firsts + n_latents] == image_end).all()
    return bool(closed and is_image[rows[:, None], places].all() and is_image.sum() == places.size)


def check_slots(tokens: Tensor, slots: Tensor, n_images: int, n_latents: int, image: int, image_end: int) -> None:
    """Make sure, on the host, that every image has exactly its `n_latents` slots: each image by itself, not in sum.

    Args:
        tokens: (B, T) ids, on the CPU.
        slots: (N, 2) row and first slot.
        n_images: images at hand.
        n_latents: L, latents per image.
        image: id of <image>, which slots repeat.
        image_end: id of </image>.

    Raises: ValueError naming the row, the image and both counts.
    """
    if len(slots) != n_images:
        raise ValueError(f"{len(slots)} places for {n_images} images; collate must give each image one place")
    if _has_slots(tokens.numpy(), slots.numpy(), n_latents, image, image_end):
        return
    for number, (row, first) in enumerate(slots.tolist()):
        ids = tokens[row, first:]
        ends = (ids != image).nonzero()
        found = int(ends[0]) if len(ends) else len(ids)
        closed = found < len(ids) and int(ids[found]) == image_end
        opened = first > 0 and int(tokens[row, first - 1]) == image
        if found != n_latents or not closed or not opened:
            raise ValueError(
                f"row {row}: {found} slots at position {first} but image {number} has {n_latents} latents; "
                "<image>, one slot per latent and </image> must follow one another"
            )
    n_slots = int((tokens == image).sum()) - n_images
    if n_slots != n_images * n_latents:
        raise ValueError(f"{n_slots} slots in the batch but {n_images} images of {n_latents} latents")
