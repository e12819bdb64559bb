"""What the tests of `kosmos_lit` share: a model of a few thousand weights, and batches made of lists.

Sizes differ, so that swapped axes fail: D 20, H 5, K 4, F 23, C 12, L 3; images of 14 pixels and 4 patches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from kosmos_lit.batch import KosmosBatch
from kosmos_lit.config import ConnectorConfig, DecoderConfig, KosmosConfig, VisionConfig
from kosmos_lit.model import Kosmos
from kosmos_lit.tokenizer import BOS, EOS, IGNORE, PAD, SpecialTokens

M = TypeVar("M", bound=nn.Module)

SIDE, LATENTS, VOCAB = 14, 3, 73
TOWER = {
    "embed_dim": 12,
    "vision_cfg": {"image_size": SIDE, "patch_size": 7, "width": 12, "layers": 3, "head_width": 6},
    "text_cfg": {"context_length": 3, "vocab_size": 7, "width": 8, "heads": 1, "layers": 1},
}
N_PIECES = 61
SPECIAL = SpecialTokens.for_pieces(N_PIECES)
"""Of the tests' tokenizer: 61 pieces, 68 ids; the model has five rows more."""


def tiny_config(
    tower: str, *, vision: dict[str, Any] | None = None, connector: str = "resampler", **decoder: Any
) -> KosmosConfig:
    """Return a config without dropout; `decoder` overrides fields of the decoder."""
    sizes = {"vocab_size": VOCAB, "dim": 20, "n_layers": 2, "n_heads": 5, "ffn_dim": 23, "max_seq_len": 61}
    rates = {"dropout_rate": 0.0, "attention_dropout_rate": 0.0}
    tower_sizes = {"architecture": tower, "pretrained": None, "image_size": SIDE, "trainable": "all"}
    return KosmosConfig(
        vision=VisionConfig(**(tower_sizes | (vision or {}))),
        connector=ConnectorConfig(kind=connector, n_latents=LATENTS, n_heads=2, attention_dropout_rate=0.0),
        decoder=DecoderConfig(**(sizes | rates | decoder)),
    )


def tiny_model(tower: str, seed: int = 0, **fields: Any) -> Kosmos:
    """Return a model in evaluation mode, none of whose weights has a neutral value."""
    return shaken(Kosmos.create(tiny_config(tower, **fields), seed), seed).eval()


def shaken(module: M, seed: int = 0, by: float = 0.2) -> M:
    """Return `module` after adding noise, so that neither a bias of 0 nor a LayerNorm of 1 hides what is left out."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += by * torch.randn(parameter.shape, generator=draw)
    return module


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def random_images(n: int, seed: int = 0) -> Tensor:
    """(n, 3, 14, 14) uint8 noise."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, 3, SIDE, SIDE), generator=draw, dtype=torch.uint8)


def words(n: int, seed: int = 0) -> list[int]:
    """Return n ids of ordinary pieces."""
    return torch.randint(4, SPECIAL.mask, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


@dataclass(frozen=True)
class Doc:
    """A document: ids, in which `SPECIAL.image` stands for the next of its images."""

    ids: Sequence[int]
    images: Tensor | None = None

    @property
    def expanded(self) -> list[int]:
        image = [SPECIAL.image] * (LATENTS + 1) + [SPECIAL.image_end]
        return [e for i in self.ids for e in (image if i == SPECIAL.image else [i])]


def text_doc(n: int, seed: int = 0) -> Doc:
    """<s>, n words, </s>."""
    return Doc([BOS, *words(n, seed), EOS])


def image_doc(n: int, seed: int = 0, n_images: int = 1) -> Doc:
    """<s>, images with n words after each, </s>."""
    ids = [BOS]
    for i in range(n_images):
        ids += [SPECIAL.image, *words(n, seed + 100 * i)]
    return Doc([*ids, EOS], random_images(n_images, seed))


def batch_of(rows: Sequence[Sequence[Doc]], n_positions: int, corpus: Sequence[int] | None = None) -> KosmosBatch:
    """Pack documents one after another into rows of `n_positions`; next-token targets, none of them of an image."""
    tokens = torch.full((len(rows), n_positions), PAD)
    targets = torch.full_like(tokens, IGNORE)
    positions = torch.zeros_like(tokens)
    lengths: list[int] = []
    slots: list[tuple[int, int]] = []
    images: list[Tensor] = []
    for b, row in enumerate(rows):
        at = 0
        for doc in row:
            ids = doc.expanded
            end = at + len(ids)
            tokens[b, at:end] = torch.tensor(ids)
            following = torch.tensor([*ids[1:], IGNORE])
            following[(following == SPECIAL.image) | (following == SPECIAL.image_end)] = IGNORE
            targets[b, at:end] = following
            positions[b, at:end] = torch.arange(len(ids))
            closing = [at + i for i, id_ in enumerate(ids) if id_ == SPECIAL.image_end]
            slots += [(b, end_at - LATENTS) for end_at in closing]
            images += [] if doc.images is None else [doc.images]
            lengths.append(len(ids))
            at = end
        if at < n_positions:
            positions[b, at:] = torch.arange(n_positions - at)
            lengths.append(n_positions - at)
    loss_at = (targets.flatten() != IGNORE).nonzero().flatten()
    return KosmosBatch(
        tokens=tokens,
        targets=targets,
        positions=positions,
        lengths=tuple(lengths),
        loss_at=loss_at,
        images=torch.cat(images) if images else torch.zeros(0, 3, SIDE, SIDE, dtype=torch.uint8),
        slots=torch.tensor(slots, dtype=torch.int64).view(-1, 2),
        corpus=torch.tensor(corpus if corpus is not None else [0] * len(rows)),
        n_bytes=torch.zeros(len(rows), dtype=torch.int64),
        rows=tuple(range(len(rows))),
        n_step_targets=len(loss_at),
        n_real=int((tokens != PAD).sum()),
        padding=tuple((tokens == PAD).sum(1).tolist()),
    )
