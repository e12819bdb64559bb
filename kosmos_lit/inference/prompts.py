"""Prompts as the model reads them, and several of them as one batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kosmos_lit.batch import check_slots
from kosmos_lit.errors import UserError
from kosmos_lit.tokenizer import BOS, PAD, Ids, SpecialTokens, Tokenizer, expand_images

IMAGE_MARK = "<image>"
"""Stands for the next image in a prompt."""


@dataclass(frozen=True)
class Prompt:
    """A prompt as the model reads it."""

    tokens: Ids
    """(T,) ids, from <s> on, images written out."""
    slots: Ids
    """(n,) first slot of each image."""

    @classmethod
    def of(cls, ids: Ids | Sequence[Ids], tokenizer: Tokenizer, n_latents: int) -> Prompt:
        """Return stored ids, without <s> and with one marker per image, as a prompt; of one part, or of several."""
        parts = ids if isinstance(ids, Sequence) else [ids]
        start = np.array([BOS], dtype=np.int64)
        tokens, _, slots = expand_images(np.concatenate([start, *parts]), tokenizer.special, n_latents)
        return cls(tokens, slots)


def encode_prompt(text: str, n_images: int, tokenizer: Tokenizer, n_latents: int) -> Prompt:
    """Return a prompt as training rows have it: <s>, then text and images in order.

    Args:
        text: `<image>` marks where the next image stands; images beyond the marks come before the text. Names of the
            tokenizer's extra control tokens, such as <grounding>, stand for these.
        n_images: images at hand.
        tokenizer: the model's.
        n_latents: slots per image.

    Raises: UserError if the text has more marks than there are images.
    """
    pieces = text.split(IMAGE_MARK)
    if len(pieces) - 1 > n_images:
        raise UserError(f"the prompt has {len(pieces) - 1} {IMAGE_MARK} marks, but {n_images} images are given")
    image = tokenizer.special.image
    ids = [image] * (n_images - len(pieces) + 1)
    for i, piece in enumerate(pieces):
        ids += [image] if i else []
        ids += tokenizer.encode_marked(piece.strip()).tolist() if piece.strip() else []
    return Prompt.of(np.array(ids, dtype=np.int64), tokenizer, n_latents)


def pad_left(prompts: Sequence[Prompt], n_images: int, n_latents: int, special: SpecialTokens) -> tuple[Tensor, Tensor]:
    """Return the prompts as one batch, padded on the left so that all of them end at the same place.

    Returns: (B, T) ids, and (N, 2) row and first slot of each image.

    Raises: ValueError if the images at hand are not those that the prompts have slots for.
    """
    B, T = len(prompts), max(len(prompt.tokens) for prompt in prompts)
    tokens = torch.full((B, T), PAD)
    places = []
    for b, prompt in enumerate(prompts):
        padding = T - len(prompt.tokens)
        tokens[b, padding:] = torch.from_numpy(prompt.tokens)
        places += [(b, padding + int(first)) for first in prompt.slots]
    slots = torch.tensor(places, dtype=torch.int64).view(-1, 2)
    check_slots(tokens, slots, n_images, n_latents, special.image, special.image_end)
    return tokens, slots
