"""Negative log-likelihood of the supervised positions, and of nothing else."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def token_nll(hidden: Tensor, head: Tensor, targets: Tensor, chunk: int | None = None) -> Tensor:
    """Return (S,) float32 negative log-likelihoods in nats.

    Positions without a target never reach the vocabulary projection: pass only the supervised ones. With more than
    `chunk` of them, logits exist for one chunk at a time and are computed again in the backward pass.

    Args:
        hidden: (S, D) decoder output at the supervised positions.
        head: (V, D) output matrix.
        targets: (S,) ids.
        chunk: most positions whose (chunk, V) logits are held at once; None for all.
    """
    if chunk is None or len(hidden) <= chunk:
        return _nll(hidden, head, targets)
    pieces = zip(torch.split(hidden, chunk), torch.split(targets, chunk), strict=True)
    return torch.cat([checkpoint(_nll, h, head, t, use_reentrant=False) for h, t in pieces])


def _nll(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, head).float(), targets, reduction="none")
