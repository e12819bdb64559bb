"""Replace the embeddings of image slots by image latents."""

from __future__ import annotations

import torch
from torch import Tensor


def splice(embeddings: Tensor, latents: Tensor, slots: Tensor) -> Tensor:
    """Return (B, T, D) embeddings with each image's latents in its slots.

    Args:
        embeddings: (B, T, D) token embeddings.
        latents: (N, L, D), in the order of `slots`.
        slots: (N, 2) row and first position of each image's L slots.
    """
    (B, T, D), L = embeddings.shape, latents.shape[1]
    first = slots[:, 0] * T + slots[:, 1]  # positions in the flattened batch
    at = (first[:, None] + torch.arange(L, device=slots.device)).flatten()  # (N * L,)
    # Under autocast latents may have 16 bits while embeddings are float32.
    flat = embeddings.reshape(B * T, D).index_copy(0, at, latents.reshape(-1, D).to(embeddings.dtype))
    return flat.view(B, T, D)
