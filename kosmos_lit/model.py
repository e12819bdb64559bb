"""KOSMOS-1: encode -> connect -> splice -> decode ("Language Is Not All You Need", arXiv 2302.14045, section 2)."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from kosmos_lit.batch import KosmosBatch
from kosmos_lit.config import KosmosConfig, LoraConfig
from kosmos_lit.connector import build_connector
from kosmos_lit.decoder import Decoder
from kosmos_lit.layers.block import Block
from kosmos_lit.layers.init import drawn_on_cpu
from kosmos_lit.layers.lora import inject_lora
from kosmos_lit.ops.graphs import Compiler, Graphs
from kosmos_lit.ops.losses import token_nll, weighted_nll
from kosmos_lit.ops.masks import DocumentMask
from kosmos_lit.vision import VisionTower


class Kosmos(nn.Module):
    """A multimodal language model that sees images as L embeddings among its tokens."""

    def __init__(self, config: KosmosConfig) -> None:
        super().__init__()
        self.config = config
        self._compiler: Compiler | None = None
        self.vision = VisionTower(config.vision)
        self.connector = build_connector(config, self.vision.width)
        self.decoder = Decoder(config.decoder)
        if config.lora is not None:
            inject_lora(self, config.lora)

    @classmethod
    def create(cls, config: KosmosConfig, seed: int = 0) -> Kosmos:
        """Return a new model on the CPU whose random weights depend on `config` and `seed` alone."""
        with drawn_on_cpu(seed):
            model = cls(replace(config, lora=None))
            # Adapters come last: `init` tells matrices by their names, which peft changes.
            model.init()
            if config.lora is not None:
                model.add_lora(config.lora)
        return model

    @classmethod
    def on_meta(cls, config: KosmosConfig) -> Kosmos:
        """Return the model on the meta device, where tensors have shapes but no elements."""
        # Without `pretrained`, which open_clip would read or download.
        with torch.device("meta"):
            return cls(replace(config, vision=replace(config.vision, pretrained=None)))

    def add_lora(self, lora: LoraConfig) -> None:
        """Put new adapters beside the weights, and freeze the weights.

        Raises: UserError if a target is the end of no matrix's name.
        """
        self.config = replace(self.config, lora=lora)
        inject_lora(self, lora)

    def init(self) -> None:
        """Draw the initial weights; a pretrained tower keeps its own."""
        self.vision.init()
        self.connector.init()
        self.decoder.init()

    def compile_blocks(self, compiler: Compiler | None = None) -> None:
        """Run decoder layers, the tower's blocks and the loss through torch.compile in training.

        Compilation happens at the first use, and no parameter changes its name: this can be called at any time.

        Args:
            compiler: what to take in place of torch.compile.
        """
        # Else torch.compile cuts graphs where DDP's buckets of gradients end, in the middle of a block. Parts of layers have
        # a backward pass each as it is, so that sums over ranks begin early all the same.
        torch._dynamo.config.optimize_ddp = False
        self._compiler = compiler or Graphs()
        for module in self.modules():
            if isinstance(module, Block):
                module.compile_parts(self._compiler)
        self.vision.compile_blocks(self._compiler)

    def forward(self, batch: KosmosBatch) -> Tensor:
        """Return the decoder's hidden states (B, T, D)."""
        (B, T), tokens = batch.tokens.shape, batch.tokens
        positions, mask = batch.positions, DocumentMask(batch.lengths, B, T, tokens.device, batch.padding)
        if self.config.decoder.document_attention == "row":
            positions = torch.arange(T, device=tokens.device).expand(B, T)
            # Each row is one document: positions run on past </s>, and tokens see what comes before it.
            mask = DocumentMask((T,) * B, B, T, tokens.device)
        images, latents = batch.images, None
        if not len(images) and torch.distributed.is_initialized() and self.training:
            # A blank image without slots: every rank takes part in every collective, also one whose rows have no image,
            # and all ranks in one order, in the backward pass too.
            images = images.new_zeros(1, *images.shape[1:])
        if len(images):
            latents = self.encode_images(images)[: len(batch.slots)]  # (N, L, D), without the blank image
        return self.decoder(tokens, positions, mask, latents, batch.slots)  # type: ignore[no-any-return]

    def encode_images(self, images: Tensor) -> Tensor:
        """Map images (N, 3, H, W) uint8 to latents (N, L, D)."""
        features = self.vision(images)
        # Files may hold tower and decoder in different precisions; each runs in its own.
        return self.connector(features.to(next(self.connector.parameters()).dtype))  # type: ignore[no-any-return]

    def nll(self, batch: KosmosBatch) -> Tensor:
        """Return (S,) negative log-likelihoods in nats of the batch's supervised tokens, in the order of `loss_at`.

        The plain twin of `loss`: with gradients, it holds the logits of all these tokens.
        """
        hidden, targets = self._supervised(batch)
        return token_nll(hidden, self.decoder.embed_tokens.weight, targets, self.config.decoder.loss_chunk)

    def loss(self, batch: KosmosBatch, weights: Tensor | float) -> tuple[Tensor, Tensor]:
        """Return the sum of `weights` times `nll`, and `nll` without gradient; `weights` is one number, or (S,) float32."""
        hidden, targets = self._supervised(batch)
        head, chunk = self.decoder.embed_tokens.weight, self.config.decoder.loss_chunk
        return weighted_nll(hidden, head, targets, weights, chunk, compiler=self._compiler)

    def _supervised(self, batch: KosmosBatch) -> tuple[Tensor, Tensor]:
        """Return hidden states (S, D) and targets (S,) of the supervised positions, the only ones that need logits."""
        # Not self(batch): hooks run once, around the method that the caller calls.
        hidden = self.forward(batch).flatten(0, 1).index_select(0, batch.loss_at)
        return hidden, batch.targets.flatten().index_select(0, batch.loss_at)
