"""Prompts that a model has read once, and what is written after each of them as a tree.

Tokens that continue a prompt in different ways - the beams of a search, the candidates of a comparison - stand side by
side in the one row of their prompt. Each has the position of its depth and sees the prompt and its own ancestors, so that
nothing is ever copied when a search changes its mind: only the table of ancestors is.

Prompts are padded on the left. Cached keys stay valid under xPos because its centre is fixed (`ops.positions`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kosmos_lit.errors import UserError
from kosmos_lit.inference.prompts import Prompt, pad_left
from kosmos_lit.model import Kosmos
from kosmos_lit.ops.masks import padded
from kosmos_lit.tokenizer import PAD, Tokenizer


class Prefill:
    """B prompts in the cache, and up to `n_places` tokens after each."""

    def __init__(
        self,
        model: Kosmos,
        prompts: Sequence[Prompt],
        images: Tensor,
        tokenizer: Tokenizer,
        n_places: int,
        shown: Tensor | None = None,
    ) -> None:
        """Read all prompts at once, each image once.

        Args:
            model: the model.
            prompts: B prompts.
            images: (N, 3, H, W) uint8.
            tokenizer: the model's.
            n_places: most tokens that are written after each.
            shown: (M,) which of `images` each place of an image shows; None: each its own, in order.

        Raises: ValueError if the images are not those of the prompts.
        """
        self.decoder = model.decoder
        self.device = model.decoder.embed_tokens.weight.device
        n_shown = len(images) if shown is None else len(shown)
        tokens, slots = pad_left(prompts, n_shown, model.config.connector.n_latents, tokenizer.special)
        self.tokens = tokens.to(self.device)
        """(B, T) ids of the prompts."""
        self._real = self.tokens != PAD  # (B, T)
        self._is_padded = bool((tokens == PAD).any())
        positions, mask = padded(self._real)
        self._n_read = positions[:, -1:] + 1  # (B, 1)
        (B, T), self._n_written = self.tokens.shape, 0
        self._cache = self.decoder.new_cache(B, T + n_places)
        self.seen = model.encode_images(images.to(self.device)) if len(images) else None
        """(N, L, D) latents of all images, also of those that no prompt shows."""
        self.image = tokenizer.special.image
        latents = self.seen if self.seen is None or shown is None else self.seen[shown.to(self.device)]
        hidden = self.decoder(self.tokens, positions, mask, latents, slots.to(self.device), self._cache)
        self.hidden: Tensor = hidden[:, -1]
        """(B, D) after the last token of each prompt."""

    def write(
        self,
        tokens: Tensor,
        depth: Tensor | int,
        ancestors: Tensor | None = None,
        latents: Tensor | None = None,
        slots: Tensor | None = None,
    ) -> Tensor:
        """Let each row go on with n tokens side by side; return (B, n, D) hidden states after them.

        Args:
            tokens: (B, n) ids.
            depth: tokens between each of them and the prompt; one for all, or (B, n).
            ancestors: (B, n, S) bool: which of the S tokens written so far, these n included, each of them sees; None for
                n = 1: all of them.
            latents: (M, L, D) of images among the tokens, or None.
            slots: (M, 2) row and first slot of each of them.
        """
        (B, n), T = tokens.shape, self.tokens.shape[1]
        assert ancestors is not None or n == 1, f"{n} tokens side by side need their ancestors"
        self._n_written += n
        mask = None
        if ancestors is not None or self._is_padded:
            if ancestors is None:
                ancestors = self._real.new_ones(B, n, self._n_written)
            prompt = self._real[:, None, :].expand(B, n, T)
            mask = torch.cat([prompt, ancestors], dim=2).unsqueeze(1)  # (B, 1, n, T + S)
        positions = (self._n_read + depth).expand(B, n)
        return self.decoder(tokens, positions, mask, latents, slots, self._cache)  # type: ignore[no-any-return]

    def rewind(self) -> None:
        """Forget what was written, not the prompts."""
        self._n_written = 0
        for layer in self._cache:
            layer.length = self.tokens.shape[1]


def check_length(n_prompt: int, n_new: int, limit: int) -> None:
    """Raises: UserError if prompt and continuation are longer than the model's rows."""
    if n_prompt + n_new > limit:
        raise UserError(f"a prompt of {n_prompt} and {n_new} new tokens exceed the model's {limit} positions")
