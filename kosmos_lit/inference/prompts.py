"""Prompts as ids and image slots, and batches of them."""

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
    """The ids of a prompt, and where its images are."""

    tokens: Ids
    """(T,) ids, <s> first, each image expanded into its slots."""
    slots: Ids
    """(n,) first slot of each image."""

    @classmethod
    def of(cls, ids: Ids | Sequence[Ids], tokenizer: Tokenizer, n_latents: int) -> Prompt:
        """Return the prompt of stored ids, in one part or several; they lack <s>, and have one marker per image."""
        parts = ids if isinstance(ids, Sequence) else [ids]
        start = np.array([BOS], dtype=np.int64)
        tokens, _, slots = expand_images(np.concatenate([start, *parts]), tokenizer.special, n_latents)
        return cls(tokens, slots)


def encode_prompt(text: str, n_images: int, tokenizer: Tokenizer, n_latents: int) -> Prompt:
    """Return a prompt as training rows have it: <s>, then text and images in order.

    Args:
        text: `<image>` marks where the next image stands; images beyond the marks come before the text. Names of the
            tokenizer's extra control tokens, such as <grounding>, stand for these.
        n_images: images of the prompt.
        tokenizer: the model's.
        n_latents: slots per image.

    Raises: UserError if the text has more marks than there are images.
    """
    texts = text.split(IMAGE_MARK)
    if len(texts) - 1 > n_images:
        raise UserError(f"the prompt has {len(texts) - 1} {IMAGE_MARK} marks, but {n_images} images are given")
    image = tokenizer.special.image
    # Blanks at the ends and beside images are no text, as in training rows (`tokenizer.trimmed`).
    ids = [image] * (n_images - len(texts) + 1)  # n marks cut the text into n + 1 parts
    for i, part in enumerate(texts):
        ids += [image] if i else []  # a mark stood before each part but the first
        ids += tokenizer.encode_marked(part.strip()).tolist() if part.strip() else []
    return Prompt.of(np.array(ids, dtype=np.int64), tokenizer, n_latents)


def pad_left(prompts: Sequence[Prompt], n_images: int, n_latents: int, special: SpecialTokens) -> tuple[Tensor, Tensor]:
    """Return the prompts as one batch, padded on the left so that all of them end at the same column.

    Returns: (B, T) ids, and (N, 2) row and first slot of each image.

    Raises: ValueError if the prompts have slots for other than `n_images` images of `n_latents` latents.
    """
    B, T = len(prompts), max(len(prompt.tokens) for prompt in prompts)
    tokens = torch.full((B, T), PAD)
    slots = []
    for b, prompt in enumerate(prompts):
        padding = T - len(prompt.tokens)
        tokens[b, padding:] = torch.from_numpy(prompt.tokens)
        slots += [(b, padding + int(first)) for first in prompt.slots]  # slots move with their tokens
    table = torch.tensor(slots, dtype=torch.int64).view(-1, 2)  # (0, 2) without images
    check_slots(tokens, table, n_images, n_latents, special.image, special.image_end)
    return tokens, table
