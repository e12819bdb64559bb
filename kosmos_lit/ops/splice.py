"""Write image latents into their slots of the token stream."""

from __future__ import annotations

import torch
from torch import Tensor


def splice(embeddings: Tensor, latents: Tensor, slots: Tensor) -> Tensor:
    """Return (B, T, D) embeddings with each picture's latents in place.

    Args:
        embeddings: (B, T, D) token embeddings.
        latents: (N, L, D), in the order of `slots`.
        slots: (N, 2) row and first position of each picture's L slots.
    """
    (B, T, D), L = embeddings.shape, latents.shape[1]
    first = slots[:, 0] * T + slots[:, 1]
    at = (first[:, None] + torch.arange(L, device=slots.device)).flatten()  # (N * L,)
    flat = embeddings.reshape(B * T, D).index_copy(0, at, latents.reshape(-1, D).to(embeddings.dtype))
    return flat.view(B, T, D)


def check_slots(tokens: Tensor, slots: Tensor, n_images: int, n_latents: int, image: int, image_end: int) -> None:
    """Make sure, on the host, that every picture has exactly its `n_latents` slots: each image by itself, not in sum.

    Args:
        tokens: (B, T) ids, on the CPU.
        slots: (N, 2) row and first slot.
        n_images: pictures at hand.
        n_latents: L, latents per picture.
        image: id of <image>, which slots repeat.
        image_end: id of </image>.

    Raises: ValueError naming the row, the picture and both counts.
    """
    if len(slots) != n_images:
        raise ValueError(f"{len(slots)} places for {n_images} pictures; collate must give each picture one place")
    for number, (row, first) in enumerate(slots.tolist()):
        ids = tokens[row, first:]
        ends = (ids != image).nonzero()
        found = int(ends[0]) if len(ends) else len(ids)
        closed = found < len(ids) and int(ids[found]) == image_end
        opened = first > 0 and int(tokens[row, first - 1]) == image
        if found != n_latents or not closed or not opened:
            raise ValueError(
                f"row {row}: {found} slots at position {first} but picture {number} has {n_latents} latents; "
                "<image>, one slot per latent and </image> must follow one another"
            )
    n_slots = int((tokens == image).sum()) - n_images
    if n_slots != n_images * n_latents:
        raise ValueError(f"{n_slots} slots in the batch but {n_images} pictures of {n_latents} latents")
