"""KOSMOS-1: encode -> connect -> splice -> decode ("Language Is Not All You Need", arXiv 2302.14045, section 2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kosmos_lit.batch import KosmosBatch, check_slots, find_slots
from kosmos_lit.config import KosmosConfig, LoraConfig
from kosmos_lit.connector import build_connector
from kosmos_lit.decoder import Decoder
from kosmos_lit.errors import UserError
from kosmos_lit.images import ImageError, ImageLike, as_list
from kosmos_lit.images import load as load_image
from kosmos_lit.inference.results import ScoredCandidate
from kosmos_lit.layers.block import Block
from kosmos_lit.layers.lora import add_lora
from kosmos_lit.ops.losses import token_nll, weighted_nll
from kosmos_lit.ops.masks import DocumentMask, padded
from kosmos_lit.tokenizer import PAD, Tokenizer
from kosmos_lit.vision import VisionTower


class Kosmos(nn.Module):
    """A multimodal language model that sees images as L embeddings among its tokens."""

    tokenizer: Tokenizer | None
    """What its ids stand for; None for a model that has been given none."""

    def __init__(self, config: KosmosConfig) -> None:
        super().__init__()
        self.config = config
        self.tokenizer = None
        self._is_fused = False
        self.vision = VisionTower(config.vision)
        self.connector = build_connector(config, self.vision.width)
        self.decoder = Decoder(config.decoder)
        if config.lora is not None:
            add_lora(self, config.lora)

    @classmethod
    def create(cls, config: KosmosConfig, seed: int = 0) -> Kosmos:
        """Return a new model whose random weights depend on `config` and `seed` alone."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = cls(replace(config, lora=None))
            model.init()
            if config.lora is not None:
                model.adapt(config.lora)
        return model

    @classmethod
    def outline(cls, config: KosmosConfig) -> Kosmos:
        """Return the model on the meta device: all of it but its tensors' elements."""
        with torch.device("meta"):
            return cls(replace(config, vision=replace(config.vision, pretrained=None)))

    @classmethod
    def load(cls, path: str | Path) -> Kosmos:
        """Return a trained model with its tokenizer, in evaluation mode.

        Args:
            path: a checkpoint of a run, a folder that `export` or `import` wrote, or a folder of transformers' Kosmos-2.

        Raises: UserError if it is none of these, or its tensors do not fit.
        """
        from kosmos_lit.weights import load_model

        return load_model(path)

    def adapt(self, lora: LoraConfig) -> None:
        """Put new adapters beside the weights, and let these no longer train.

        Raises: UserError if a target is the end of no matrix's name.
        """
        self.config = replace(self.config, lora=lora)
        add_lora(self, lora)

    def init(self) -> None:
        """Draw the initial weights, but for those of a pretrained tower."""
        self.vision.init()
        self.connector.init()
        self.decoder.init()

    def fuse(self) -> None:
        """Let torch.compile fuse what decoder layers, the tower's blocks and the loss do in training.

        Nothing is compiled before it runs, and no name of a parameter changes: it can be called at any time.
        """
        # Else torch.compile cuts graphs where DDP's buckets of gradients end, in the middle of what is to be fused. Parts of
        # layers have a backward pass each as it is, so that sums over ranks begin early all the same.
        torch._dynamo.config.optimize_ddp = False
        for module in self.modules():
            if isinstance(module, Block):
                module.fuse()
        self.vision.fuse()
        self._is_fused = True

    def forward(self, batch: KosmosBatch) -> Tensor:
        """Return the decoder's hidden states (B, T, D)."""
        (B, T), tokens = batch.tokens.shape, batch.tokens
        positions, mask = batch.positions, DocumentMask(batch.lengths, B, T, tokens.device, batch.padding)
        if self.config.decoder.document_attention == "row":
            positions = torch.arange(T, device=tokens.device).expand(B, T)
            mask = DocumentMask((T,) * B, B, T, tokens.device)
        images, latents = batch.images, None
        if not len(images) and torch.distributed.is_initialized() and self.training:
            # A blank image for no slot: every rank takes part in every collective, also one whose rows have no image,
            # and all of them in one order, in the backward pass too.
            images = images.new_zeros(1, *images.shape[1:])
        if len(images):
            latents = self.encode_images(images)[: len(batch.slots)]  # (N, L, D)
        return self.decoder(tokens, positions, mask, latents, batch.slots)  # type: ignore[no-any-return]

    def encode_images(self, images: Tensor) -> Tensor:
        """Map images (N, 3, H, W) uint8 to latents (N, L, D)."""
        features = self.vision(images)
        # Files may hold tower and decoder in different precisions; each runs in its own.
        return self.connector(features.to(next(self.connector.parameters()).dtype))  # type: ignore[no-any-return]

    def nll(self, batch: KosmosBatch) -> Tensor:
        """Return (S,) negative log-likelihoods in nats of the batch's supervised tokens, in the order of `loss_at`.

        The plain way: with gradients, all their logits are held. Training takes `loss`.
        """
        hidden, targets = self._supervised(batch)
        return token_nll(hidden, self.decoder.embed_tokens.weight, targets, self.config.decoder.loss_chunk)

    def loss(self, batch: KosmosBatch, weights: Tensor | float) -> tuple[Tensor, Tensor]:
        """Return the sum of `weights` times `nll`, and `nll` without gradient; one weight, or (S,) float32."""
        hidden, targets = self._supervised(batch)
        head, chunk = self.decoder.embed_tokens.weight, self.config.decoder.loss_chunk
        return weighted_nll(hidden, head, targets, weights, chunk, compiled=self._is_fused)

    def _supervised(self, batch: KosmosBatch) -> tuple[Tensor, Tensor]:
        """Return hidden states (S, D) and targets (S,) of the supervised positions: no other reaches the vocabulary."""
        # Hooks, where there are any, are those of the method that asks.
        hidden = self.forward(batch).flatten(0, 1).index_select(0, batch.loss_at)
        return hidden, batch.targets.flatten().index_select(0, batch.loss_at)

    # ---- in a notebook

    def generate(self, prompt: str, images: ImageLike | Sequence[ImageLike] = (), **settings: Any) -> str:
        """Return the model's continuation of a prompt, as `main.py generate` prints it.

        Args:
            prompt: `<image>` stands for the next image; images beyond these marks come before the text.
            images: one or several: paths, bytes of files, Pillow images, (3, H, W) uint8 arrays or tensors.
            settings: fields of `GenerationConfig`.

        Raises: UserError for an image that cannot be read, for unknown settings, or if there are too many tokens.
        """
        from kosmos_lit.inference.generate import GenerationConfig, encode_prompt, generate

        pixels = self.pixels(images)
        tokens = encode_prompt(prompt, len(pixels), self._own_tokenizer, self.config.connector.n_latents)
        [written] = generate(self, [tokens], pixels, self._own_tokenizer, GenerationConfig.from_dict(settings))
        return written.text

    def score(
        self, prompt: str, candidates: Sequence[str], images: ImageLike | Sequence[ImageLike] = ()
    ) -> list[ScoredCandidate]:
        """Return how likely each candidate is as the continuation of a prompt, as `main.py generate --score` prints it.

        Args:
            prompt: as in `generate`.
            candidates: texts that could follow; the prompt is read once for all of them.
            images: as in `generate`.

        Raises: UserError for an image that cannot be read, a candidate without tokens, or if there are too many of them.
        """
        from kosmos_lit.inference.generate import encode_prompt, score

        if isinstance(candidates, str):
            raise UserError(f"candidates must be a list of texts, got one text, {candidates!r}")
        pixels = self.pixels(images)
        tokens = encode_prompt(prompt, len(pixels), self._own_tokenizer, self.config.connector.n_latents)
        [scored] = score(self, [tokens], [candidates], pixels, self._own_tokenizer)
        return scored

    @torch.no_grad()  # not inference mode: a caller may go on to compute with the result
    def logits(self, tokens: Tensor | Sequence[int], images: ImageLike | Sequence[ImageLike] = ()) -> Tensor:
        """Return the logits of every next token, (T, V), or (B, T, V) for a batch, in the model's present mode.

        Args:
            tokens: (T,) or (B, T) ids, one document a row, padded with <pad> on either side; an image is <image>, as many
                <image> again as it has latents, and </image>.
            images: the images in the order of their places, in any form that `generate` takes.

        Raises: UserError if tokens are no ids of the model or too many, or tokens and images do not fit.
        """
        ids = _checked_ids(tokens, self.config.decoder.vocab_size, self.config.decoder.max_seq_len)
        rows = ids if ids.ndim == 2 else ids[None]  # (B, T)
        pixels, slots = self.pixels(images), torch.empty(0, 2, dtype=torch.int64)
        if len(pixels) or self.tokenizer is not None:
            special = self._own_tokenizer.special
            slots = find_slots(rows, special.image)
            try:
                check_slots(rows, slots, len(pixels), self.config.connector.n_latents, special.image, special.image_end)
            except ValueError as error:
                raise UserError(str(error)) from error
        positions, mask = padded(rows != PAD)
        device = self.decoder.embed_tokens.weight.device
        rows, slots, positions, mask = (t.to(device) for t in (rows, slots, positions, mask))
        latents = self.encode_images(pixels) if len(pixels) else None
        found = self.decoder.logits(self.decoder(rows, positions, mask, latents, slots))
        return found if ids.ndim == 2 else found[0]

    def pixels(self, images: ImageLike | Sequence[ImageLike]) -> Tensor:
        """Return images as the tower takes them, (N, 3, H, W) uint8, on the model's device; both sides are scaled.

        Raises: UserError naming the image that cannot be read.
        """
        size = self.config.vision.image_size
        sources = as_list(images)
        pixels = torch.empty(len(sources), 3, size, size, dtype=torch.uint8)
        for number, image in enumerate(sources):
            try:
                pixels[number] = torch.from_numpy(load_image(image, size, "square"))
            except ImageError as error:
                raise UserError(f"image {number}: {error}") from error
        return pixels.to(self.decoder.embed_tokens.weight.device)

    @property
    def _own_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise UserError("this model has no tokenizer; set its `tokenizer`, or load it from a folder that has one")
        return self.tokenizer


def _checked_ids(tokens: Tensor | Sequence[int], vocab_size: int, max_seq_len: int) -> Tensor:
    """Return (T,) or (B, T) int64 ids on the CPU.

    Raises: UserError if they are none, or too many for the model.
    """
    try:
        ids = torch.as_tensor(tokens).cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"tokens must be (T,) or (B, T) ids, rows of one length: {error}") from error
    kind = str(ids.dtype).removeprefix("torch.")
    if ids.ndim not in (1, 2) or not ids.numel() or "int" not in kind:
        raise UserError(f"tokens must be (T,) or (B, T) ids, and not none at all; got {tuple(ids.shape)} {kind}")
    low, high, longest = int(ids.min()), int(ids.max()), int((ids != PAD).sum(-1).max())
    if low < 0 or high >= vocab_size:
        raise UserError(f"tokens lie in {low} to {high}, but the model has {vocab_size} embeddings, from 0 on")
    if longest > max_seq_len:
        raise UserError(f"{longest} tokens exceed the model's {max_seq_len} positions")
    return ids.long()
