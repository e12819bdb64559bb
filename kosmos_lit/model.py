"""KOSMOS-1: encode -> connect -> splice -> decode ("Language Is Not All You Need", arXiv 2302.14045, section 2)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kosmos_lit.batch import KosmosBatch
from kosmos_lit.config import KosmosConfig
from kosmos_lit.connector import build_connector
from kosmos_lit.decoder import Decoder
from kosmos_lit.ops.losses import token_nll
from kosmos_lit.ops.masks import DocumentMask
from kosmos_lit.vision import VisionTower


class Kosmos(nn.Module):
    """A multimodal language model that sees pictures as L embeddings among its tokens."""

    def __init__(self, config: KosmosConfig) -> None:
        super().__init__()
        self.config = config
        self.vision = VisionTower(config.vision)
        self.connector = build_connector(config, self.vision.width)
        self.decoder = Decoder(config.decoder)

    @classmethod
    def create(cls, config: KosmosConfig, seed: int = 0) -> Kosmos:
        """Return a new model whose random weights depend on `config` and `seed` alone."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = cls(config)
            model.init()
        return model

    def init(self) -> None:
        """Draw the initial weights, but for those of a pretrained tower."""
        self.vision.init()
        self.connector.init()
        self.decoder.init()

    def forward(self, batch: KosmosBatch) -> Tensor:
        """Return the decoder's hidden states (B, T, D)."""
        (B, T), tokens = batch.tokens.shape, batch.tokens
        lengths, positions = batch.lengths, batch.positions
        if self.config.decoder.document_attention == "row":
            lengths, positions = (T,) * B, torch.arange(T, device=tokens.device).expand(B, T)
        mask = DocumentMask(lengths, B, T, tokens.device)
        if len(batch.images):
            return self.decoder(tokens, positions, mask, self.see(batch.images), batch.slots)  # type: ignore[no-any-return]
        hidden: Tensor = self.decoder(tokens, positions, mask)
        if torch.distributed.is_initialized() and self.training:
            # Every rank takes part in every collective, also one whose rows have no picture.
            blank = batch.images.new_zeros(1, *batch.images.shape[1:])
            hidden = hidden + 0.0 * self.see(blank).sum()
        return hidden

    def see(self, images: Tensor) -> Tensor:
        """Map pictures (N, 3, H, W) uint8 to latents (N, L, D)."""
        return self.connector(self.vision(images))  # type: ignore[no-any-return]

    def nll(self, batch: KosmosBatch) -> Tensor:
        """Return (S,) negative log-likelihoods in nats of the batch's supervised tokens, in the order of `loss_at`."""
        hidden = self(batch).flatten(0, 1)[batch.loss_at]  # (S, D)
        targets = batch.targets.flatten()[batch.loss_at]
        return token_nll(hidden, self.decoder.embed_tokens.weight, targets, self.config.decoder.loss_chunk)
