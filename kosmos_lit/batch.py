"""The contract between data and model: the batches that `datamodules` yields and `kosmos_lit` reads.

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

CORPORA = ("text", "caption", "interleaved", "instruct")
"""The kinds of corpora, in the order of `KosmosBatch.corpus`."""
DIGEST_MASK = (1 << 63) - 1
"""Digests of rows are summed modulo 2 ** 63."""


class _Movable:
    """Methods that move every tensor field, for Lightning and the DataLoader."""

    def to(self, device: torch.device | str, non_blocking: bool | None = None) -> Self:
        """Return the batch on a device; copies to CUDA are asynchronous by default, as the loader pins memory."""
        is_asynchronous = torch.device(device).type == "cuda" if non_blocking is None else non_blocking
        return self._map(lambda t: t.to(device, non_blocking=is_asynchronous))

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
    """(B, T) int64: the id that each position is to predict, or IGNORE."""
    positions: Tensor
    """(B, T) int64: position within the document, from 0; restarts at each document."""
    lengths: tuple[int, ...]
    """Positions of each document in the flattened (B * T) stream, a row's padding as one more; sums to B * T."""
    loss_at: Tensor
    """(S,) int64: the flat positions whose target is not IGNORE; computed on the host, which saves a device sync."""
    images: Tensor
    """(N, 3, H, W) uint8: the images in the order of their slots."""
    slots: Tensor
    """(N, 2) int64: row and first slot of each image; its latents fill consecutive positions from there."""
    corpus: Tensor
    """(B,) int64: index into `CORPORA`; -1 for a row that only completes a validation batch."""
    n_bytes: Tensor
    """(B,) int64: UTF-8 bytes of the text of each row's targets."""
    rows: tuple[int, ...]
    """The rows' numbers in the stream."""
    n_step_targets: int
    """Supervised tokens of the whole optimizer step, over all ranks and micro-batches: the loss's denominator."""
    n_real: int
    """Positions that are not padding."""
    n_bad_images: int = 0
    """Images that could not be decoded; their documents have no targets."""
    bad: tuple[tuple[str, str], ...] = ()
    """(source, reason) of each of these images, and of each document on a blocklist."""
    sources: tuple[str, ...] = ()
    """The names of the rows' sources."""
    amounts: tuple[int, ...] = ()
    """Each row's amount in the mixture's unit: positions, supervised tokens or documents."""
    padding: tuple[int, ...] = ()
    """(B,) padding positions at the end of each row, which are its last length if there are any; (): no row has padding."""
    digest: int = 0
    """Sum of the rows' digests modulo 2 ** 63: the same for the same rows, whatever ranks and micro-batches hold them."""


@dataclass(kw_only=True, eq=False)  # not frozen: Lightning refuses to walk through frozen ones
class PromptBatch(_Movable):
    """Prompts with images, and the targets of their continuations."""

    prompts: Sequence[str]
    """B prompts; `<image>` stands for the next image, and images without a mark come first."""
    images: Tensor
    """(N, 3, H, W) uint8: the images of all prompts, in order."""
    n_images: Sequence[int]
    """B numbers of images; they sum to N."""
    targets: Sequence[str]
    """B texts, the expected continuations."""
    tasks: Sequence[str]
    """B names of the prompts' tasks."""
    tokens: Sequence[NDArray[np.int64]] | None = None
    """B prompts as ids without <s>, an image being one <image>; None: `prompts` are encoded."""


def find_slots(tokens: Tensor, image: int) -> Tensor:
    """Return (N, 2) row and first slot of each image in (B, T) tokens; slots repeat `image`, the id of <image>."""
    is_image = tokens == image
    opens = is_image.clone()
    opens[:, 1:] &= ~is_image[:, :-1]
    return opens.nonzero() + torch.tensor([0, 1], device=tokens.device)


def _has_slots(tokens: NDArray[np.int64], slots: NDArray[np.int64], n_latents: int, image: int, image_end: int) -> bool:
    """Whether every image has <image>, its slots and </image>; vectorised over images, without the place of a failure."""
    rows, firsts = slots.T
    if len(slots) and (firsts.min() < 1 or firsts.max() + n_latents >= tokens.shape[1]):
        return False
    is_image = tokens == image
    places = firsts[:, None] + np.arange(-1, n_latents)
    is_closed = (tokens[rows, firsts + n_latents] == image_end).all()
    return bool(is_closed and is_image[rows[:, None], places].all() and is_image.sum() == places.size)


def check_slots(tokens: Tensor, slots: Tensor, n_images: int, n_latents: int, image: int, image_end: int) -> None:
    """Check, on the host, that each image has exactly `n_latents` slots; equal sums are not enough.

    Args:
        tokens: (B, T) ids, on the CPU.
        slots: (N, 2) row and first slot.
        n_images: number of images.
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
        n = int(ends[0]) if len(ends) else len(ids)
        is_closed = n < len(ids) and int(ids[n]) == image_end
        is_opened = first > 0 and int(tokens[row, first - 1]) == image
        if n != n_latents or not is_closed or not is_opened:
            raise ValueError(
                f"row {row}: {n} slots at position {first} but image {number} has {n_latents} latents; "
                "<image>, one slot per latent and </image> must follow one another"
            )
    n_slots = int((tokens == image).sum()) - n_images
    if n_slots != n_images * n_latents:
        raise ValueError(f"{n_slots} slots in the batch but {n_images} images of {n_latents} latents")
