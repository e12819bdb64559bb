"""Small Kosmos-2 models of transformers in several shapes, and rows of words and images for both programs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Kosmos2Config, Kosmos2ForConditionalGeneration

from kosmos_lit.batch import find_slots
from kosmos_lit.config import CLIP_MEAN, CLIP_STD
from kosmos_lit.model import Kosmos
from kosmos_lit.ops.masks import padded_positions
from kosmos_lit.tokenizer import BOS, PAD
from tests.kosmos_lit.tiny_kosmos import SPECIAL, shaken

VOCAB = 73
IMAGE, IMAGE_END = SPECIAL.image, SPECIAL.image_end
"""Of the tests' tokenizer; to the models they are ids like others."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a model, as transformers names them."""

    text: dict[str, Any]
    vision: dict[str, Any]
    n_latents: int

    def config(self, **text: Any) -> Kosmos2Config:
        common = {"vocab_size": VOCAB, "max_position_embeddings": 83}
        return Kosmos2Config(
            text_config=common | self.text | text, vision_config=dict(self.vision), latent_query_num=self.n_latents
        )


SHAPES = {
    "one_layer_quick_gelu": Shape(
        {"embed_dim": 42, "layers": 1, "attention_heads": 3, "ffn_dim": 37},
        {
            "hidden_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 3,
            "intermediate_size": 31,
            "image_size": 28,
            "patch_size": 7,
            "hidden_act": "quick_gelu",
        },
        1,
    ),
    "three_layers_gelu": Shape(
        {"embed_dim": 32, "layers": 3, "attention_heads": 4, "ffn_dim": 61},
        {
            "hidden_size": 22,
            "num_hidden_layers": 1,
            "num_attention_heads": 11,
            "intermediate_size": 88,
            "image_size": 42,
            "patch_size": 14,
            "hidden_act": "gelu",
        },
        3,
    ),
    "wide": Shape(
        {"embed_dim": 96, "layers": 2, "attention_heads": 2, "ffn_dim": 101},
        {
            "hidden_size": 40,
            "num_hidden_layers": 3,
            "num_attention_heads": 5,
            "intermediate_size": 53,
            "image_size": 35,
            "patch_size": 5,
            "hidden_act": "quick_gelu",
        },
        5,
    ),
}


def reference_model(shape: str | Shape, seed: int = 0, **text: Any) -> Kosmos2ForConditionalGeneration:
    """Return a model in evaluation mode, none of whose weights has a neutral value."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Kosmos2ForConditionalGeneration((SHAPES[shape] if isinstance(shape, str) else shape).config(**text))
    return shaken(model, seed, by=0.1).eval()


@dataclass(frozen=True)
class Rows:
    """A batch as a person writes it down: each row a list of word counts and of "p" for an image."""

    rows: Sequence[Sequence[int | str]]
    padding: str = "right"

    def tokens(self, n_latents: int, seed: int = 0) -> Tensor:
        """(B, T) ids; an image is <image>, its slots as <image> again, and </image>."""
        draw = torch.Generator().manual_seed(seed)
        rows = []
        for row in self.rows:
            ids = [BOS]
            for part in row:
                if part == "p":
                    ids += [IMAGE] * (n_latents + 1) + [IMAGE_END]
                else:
                    ids += torch.randint(4, SPECIAL.mask, (int(part),), generator=draw).tolist()
            rows.append(ids)
        tokens = torch.full((len(rows), max(map(len, rows))), PAD)
        for b, ids in enumerate(rows):
            at = tokens.shape[1] - len(ids) if self.padding == "left" else 0
            tokens[b, at : at + len(ids)] = torch.tensor(ids)
        return tokens

    @property
    def n_images(self) -> int:
        return sum(part == "p" for row in self.rows for part in row)


def noise_images(n: int, size: int, seed: int = 0) -> Tensor:
    """(n, 3, size, size) uint8 noise."""
    return torch.randint(0, 256, (n, 3, size, size), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


@torch.inference_mode()
def reference_logits(model: Kosmos2ForConditionalGeneration, tokens: Tensor, images: Tensor) -> Tensor:
    """(B, T, V), from the inputs that the processor of transformers would make."""
    if not len(images):
        return model.text_model(input_ids=tokens, attention_mask=(tokens != PAD).long()).logits
    in_slot = tokens == IMAGE
    in_slot[:, 1:] &= tokens[:, :-1] == IMAGE
    in_slot[:, 0] = False
    # The processor counts from 4 on in the slots.
    ids = torch.where(in_slot, 4 + in_slot.cumsum(1) % 53, tokens)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    return model(
        pixel_values=(images / 255 - mean) / std,
        input_ids=ids,
        attention_mask=(tokens != PAD).long(),
        image_embeds_position_mask=in_slot.long(),
    ).logits


@torch.inference_mode()
def kosmos_logits(model: Kosmos, tokens: Tensor, images: Tensor) -> Tensor:
    """(B, T, V), as `Engine.logits` gives them, for a model without tokenizer."""
    positions, mask = padded_positions(tokens != PAD)
    latents = model.encode_images(images) if len(images) else None
    return model.decoder.logits(model.decoder(tokens, positions, mask, latents, find_slots(tokens, IMAGE)))
