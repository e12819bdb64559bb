"""Prompts in the KV cache, and a tree of decoded tokens after each of them.

Tokens that continue a prompt in different ways - the beams of a search, the candidates of a comparison - stand side by
side in the one row of their prompt. Each has the position of its depth and attends to the prompt and its own ancestors.
So no cache is ever copied when a search changes its beams: only the table of ancestors is.

Prompts are padded on the left. Cached keys stay valid under xPos because its centre is fixed (`ops.positions`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kosmos_lit.errors import UserError
from kosmos_lit.inference.prompts import Prompt, pad_left
from kosmos_lit.model import Kosmos
from kosmos_lit.ops.masks import padded_positions
from kosmos_lit.tokenizer import PAD, SpecialTokens


class Prefill:
    """B prompts in the KV cache, with room for `capacity` tokens after each."""

    def __init__(
        self,
        model: Kosmos,
        prompts: Sequence[Prompt],
        images: Tensor,
        special: SpecialTokens,
        capacity: int,
        image_index: Tensor | None = None,
    ) -> None:
        """Run all prompts through the model at once, and each image once.

        Args:
            model: the model.
            prompts: B prompts.
            images: (N, 3, H, W) uint8.
            special: the ids of the model's control tokens.
            capacity: most tokens that are decoded after each prompt.
            image_index: (M,) which of `images` each of the prompts' M images is; None: M = N, in order.

        Raises: ValueError if the images are not those of the prompts.
        """
        self.decoder = model.decoder
        self.device = model.decoder.embed_tokens.weight.device
        n_images = len(images) if image_index is None else len(image_index)
        tokens, slots = pad_left(prompts, n_images, model.config.connector.n_latents, special)
        self.tokens = tokens.to(self.device)
        """(B, T) ids of the prompts."""
        self._is_real = self.tokens != PAD  # (B, T)
        # Without padding, tokens that follow one another need no mask, and kernels without one are faster.
        self._is_padded = bool((tokens == PAD).any())  # on the host, without waiting for a GPU
        positions, mask = padded_positions(self._is_real)
        self._prompt_lengths = positions[:, -1:] + 1  # (B, 1), as positions count from 0
        (B, T), self._n_decoded = self.tokens.shape, 0
        self._cache = self.decoder.new_cache(B, T + capacity)
        self.image_latents = model.encode_images(images.to(self.device)) if len(images) else None
        """(N, L, D) latents of all images, also of those that no prompt has."""
        self.image_id = special.image
        latents = self.image_latents
        if latents is not None and image_index is not None:
            latents = latents[image_index.to(self.device)]  # (M, L, D)
        hidden = self.decoder(self.tokens, positions, mask, latents, slots.to(self.device), self._cache)
        # Padded on the left, all prompts end in the last column.
        self.hidden: Tensor = hidden[:, -1]
        """(B, D) after the last token of each prompt."""

    def decode(
        self,
        tokens: Tensor,
        depth: Tensor | int,
        ancestors: Tensor | None = None,
        latents: Tensor | None = None,
        slots: Tensor | None = None,
    ) -> Tensor:
        """Append n tokens side by side to each row; return (B, n, D) hidden states after them.

        Args:
            tokens: (B, n) ids.
            depth: tokens between each of them and the prompt; one for all, or (B, n).
            ancestors: (B, n, S) bool: which of the S tokens decoded so far, these n included, each of them attends to; None
                for n = 1: all of them.
            latents: (M, L, D) of images among the tokens, or None.
            slots: (M, 2) row and first slot of each of them.
        """
        (B, n), T = tokens.shape, self.tokens.shape[1]
        assert ancestors is not None or n == 1, f"{n} tokens side by side need their ancestors"
        self._n_decoded += n
        mask = None
        if ancestors is not None or self._is_padded:
            if ancestors is None:
                ancestors = self._is_real.new_ones(B, n, self._n_decoded)
            prompt = self._is_real[:, None, :].expand(B, n, T)
            mask = torch.cat([prompt, ancestors], dim=2).unsqueeze(1)  # (B, 1, n, T + S)
        positions = (self._prompt_lengths + depth).expand(B, n)  # tokens side by side may share one
        return self.decoder(tokens, positions, mask, latents, slots, self._cache)  # type: ignore[no-any-return]

    def rewind(self) -> None:
        """Drop the decoded tokens from the cache and keep the prompts."""
        self._n_decoded = 0
        for layer in self._cache:
            layer.length = self.tokens.shape[1]  # the next `decode` overwrites what lies beyond


def check_length(n_prompt: int, n_new: int, limit: int) -> None:
    """Raises: UserError if prompt and continuation are longer than the model's rows."""
    if n_prompt + n_new > limit:
        raise UserError(f"a prompt of {n_prompt} and {n_new} new tokens exceed the model's {limit} positions")
