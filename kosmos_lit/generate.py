"""Text from a model: greedy and beam search on a key-value cache, for prompts of different lengths at once.

Prompts are padded on the left, so that all rows of a batch write the same place of the cache. Cached keys stay valid
because the centre of xPos is fixed (`ops.positions`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kosmos_lit.batch import check_slots
from kosmos_lit.errors import UserError
from kosmos_lit.layers.attention import KeyValues
from kosmos_lit.model import Kosmos
from kosmos_lit.ops.masks import padded
from kosmos_lit.tokens import BOS, EOS, PAD, UNK, Ids, Tokenizer, expand_images

IMAGE_MARK = "<image>"
"""Stands for the next picture in a prompt."""


@dataclass(frozen=True)
class Prompt:
    """A prompt as the model reads it."""

    tokens: Ids
    """(T,) ids, from <s> on, pictures written out."""
    slots: Ids
    """(n,) first slot of each picture."""

    @classmethod
    def of(cls, ids: Ids, tokenizer: Tokenizer, n_latents: int) -> Prompt:
        """Return stored ids, without <s> and with one marker per picture, as a prompt."""
        tokens, _, slots = expand_images(np.concatenate([[BOS], ids]), tokenizer.special, n_latents)
        return cls(tokens, slots)


def encode_prompt(text: str, n_images: int, tokenizer: Tokenizer, n_latents: int) -> Prompt:
    """Return a prompt as training rows have it: <s>, then text and pictures in order.

    Args:
        text: `<image>` marks where the next picture stands; pictures beyond the marks come before the text.
        n_images: pictures at hand.
        tokenizer: the model's.
        n_latents: slots per picture.

    Raises: UserError if the text has more marks than there are pictures.
    """
    pieces = text.split(IMAGE_MARK)
    if len(pieces) - 1 > n_images:
        raise UserError(f"the prompt has {len(pieces) - 1} {IMAGE_MARK} marks, but {n_images} pictures are given")
    special = tokenizer.special
    ids: list[int] = [BOS, *[special.image] * (n_images - len(pieces) + 1)]
    for i, piece in enumerate(pieces):
        ids += [special.image] if i else []
        ids += tokenizer.encode(piece.strip()).tolist() if piece.strip() else []
    tokens, _, slots = expand_images(torch.tensor(ids).numpy(), special, n_latents)
    return Prompt(tokens, slots)


@torch.inference_mode()
def generate(
    model: Kosmos,
    prompts: Sequence[Prompt],
    images: Tensor,
    tokenizer: Tokenizer,
    *,
    max_new_tokens: int = 64,
    n_beams: int = 1,
    length_penalty: float = 1.0,
) -> list[list[int]]:
    """Return the continuation of each prompt, up to </s> and without it.

    Args:
        model: the model; dropout is off meanwhile.
        prompts: B prompts.
        images: (N, 3, H, W) uint8, the pictures of all prompts in order.
        tokenizer: the model's.
        max_new_tokens: longest continuation.
        n_beams: 1 for greedy decoding, else the width of the beam.
        length_penalty: a finished beam scores sum of log-probabilities / length ** length_penalty.

    Raises: UserError if prompt and continuation are longer than the model's rows.
    """
    longest = max(len(prompt.tokens) for prompt in prompts)
    limit = model.config.decoder.max_seq_len
    if longest + max_new_tokens > limit:
        raise UserError(f"a prompt of {longest} and {max_new_tokens} new tokens exceed the model's {limit} positions")
    with _evaluating(model):
        state = _State.start(model, prompts, images, tokenizer, longest + max_new_tokens)
        if n_beams == 1:
            return _greedy(state, max_new_tokens)
        return _beams(state, len(prompts), n_beams, max_new_tokens, length_penalty)


class _State:
    """What the model has read so far, and what it would write next."""

    def __init__(self, model: Kosmos, cache: list[KeyValues], visible: Tensor, position: Tensor, forbidden: Tensor):
        self.model, self.cache, self.forbidden = model, cache, forbidden
        self.visible = visible  # (B, S) bool: cache places that are no padding
        self.position = position  # (B,) position of the next token in its document
        self.log_probs: Tensor  # (B, V) of the next token

    @classmethod
    def start(
        cls, model: Kosmos, prompts: Sequence[Prompt], images: Tensor, tokenizer: Tokenizer, n_positions: int
    ) -> _State:
        """Read all prompts at once."""
        device = model.decoder.embed_tokens.weight.device
        B, T = len(prompts), max(len(prompt.tokens) for prompt in prompts)
        tokens = torch.full((B, T), PAD)
        slots = []
        for b, prompt in enumerate(prompts):
            padding = T - len(prompt.tokens)
            tokens[b, padding:] = torch.from_numpy(prompt.tokens)
            slots += [(b, padding + int(first)) for first in prompt.slots]
        at = torch.tensor(slots, dtype=torch.int64).view(-1, 2)
        special = tokenizer.special
        check_slots(tokens, at, len(images), model.config.connector.n_latents, special.image, special.image_end)
        tokens, at = tokens.to(device), at.to(device)
        real = tokens != PAD  # (B, T)
        positions, mask = padded(real)
        forbidden = torch.tensor(
            [BOS, PAD, UNK, special.mask, special.doc_end, special.image, special.image_end, special.chunk_end,
             *range(tokenizer.vocab_size, model.config.decoder.vocab_size)],
            device=device,
        )
        state = cls(model, model.decoder.new_cache(B, n_positions), real, positions[:, -1] + 1, forbidden)
        latents = model.see(images.to(device)) if len(images) else None
        state._read(tokens, positions, mask, latents, at)
        return state

    def write(self, tokens: Tensor) -> None:
        """Let each row go on with one token, (B,)."""
        self.visible = torch.cat([self.visible, torch.ones_like(self.visible[:, :1])], dim=1)
        self._read(tokens[:, None], self.position[:, None], self.visible[:, None, None, :])
        self.position = self.position + 1

    def select(self, rows: Tensor) -> None:
        """Go on with copies of these rows, in this order."""
        for layer in self.cache:
            layer.select(rows)
        self.visible, self.position, self.log_probs = self.visible[rows], self.position[rows], self.log_probs[rows]

    def _read(
        self, tokens: Tensor, positions: Tensor, mask: Tensor, latents: Tensor | None = None, slots: Tensor | None = None
    ) -> None:
        decoder = self.model.decoder
        hidden = decoder(tokens, positions, mask, latents, slots, self.cache)
        logits = decoder.logits(hidden[:, -1]).float()
        logits[:, self.forbidden] = float("-inf")
        self.log_probs = logits.log_softmax(-1)


def _greedy(state: _State, max_new_tokens: int) -> list[list[int]]:
    written: list[Tensor] = []
    done = torch.zeros(len(state.position), dtype=torch.bool, device=state.position.device)
    for step in range(max_new_tokens):
        best = state.log_probs.argmax(-1).masked_fill(done, EOS)  # (B,)
        written.append(best)
        done |= best == EOS
        if bool(done.all()) or step + 1 == max_new_tokens:
            break
        state.write(best)
    rows = torch.stack(written, dim=1).tolist()
    return [row[: row.index(EOS)] if EOS in row else row for row in rows]


@dataclass
class _Finished:
    """The best complete continuations of one prompt."""

    n_beams: int
    length_penalty: float
    found: list[tuple[float, list[int]]]
    is_final: bool = False
    """What other prompts of the batch still write must not change this one's answer."""

    def add(self, total: float, tokens: list[int], length: int) -> None:
        if self.is_final:
            return
        self.found.append((total / length**self.length_penalty, tokens))
        self.found = sorted(self.found, key=lambda scored: -scored[0])[: self.n_beams]

    def settle(self, best_running: float, length: int) -> None:
        """Be final if no running beam would be better than the worst one found if it ended now.

        With a positive length penalty a longer one still could; like the usual implementations, the search does not wait.
        """
        full = len(self.found) == self.n_beams
        self.is_final |= full and self.found[-1][0] >= best_running / length**self.length_penalty


def _beams(state: _State, B: int, n: int, max_new_tokens: int, length_penalty: float) -> list[list[int]]:
    device, V = state.position.device, state.log_probs.shape[-1]
    state.select(torch.arange(B, device=device).repeat_interleave(n))
    totals = torch.full((B, n), float("-inf"), device=device)
    totals[:, 0] = 0.0  # all beams of a prompt are equal at first: let one of them speak
    written = torch.zeros(B, n, 0, dtype=torch.int64, device=device)
    finished = [_Finished(n, length_penalty, []) for _ in range(B)]
    for step in range(1, max_new_tokens + 1):
        scores = totals[:, :, None] + state.log_probs.view(B, n, V)
        best, at = scores.view(B, n * V).topk(2 * n)  # (B, 2n): enough to go on if n of them end
        beams, tokens = at // V, at % V
        keep = torch.zeros(B, n, dtype=torch.int64, device=device)
        for b in range(B):
            going_on = []
            for rank, (total, beam, token) in enumerate(
                zip(best[b].tolist(), beams[b].tolist(), tokens[b].tolist(), strict=True)
            ):
                if token != EOS:
                    going_on.append(rank)
                elif rank < n and total > float("-inf"):
                    finished[b].add(total, written[b, beam].tolist(), step)
            keep[b] = torch.tensor(going_on[:n], device=device)
        totals, beams, tokens = best.gather(1, keep), beams.gather(1, keep), tokens.gather(1, keep)
        written = torch.cat([written.gather(1, beams[:, :, None].expand(-1, -1, step - 1)), tokens[:, :, None]], dim=2)
        for result, total in zip(finished, totals, strict=True):
            result.settle(float(total[0]), step)
        if step == max_new_tokens or all(result.is_final for result in finished):
            break
        state.select((torch.arange(B, device=device)[:, None] * n + beams).flatten())
        state.write(tokens.flatten())
    for b, result in enumerate(finished):
        for beam in range(n):
            result.add(float(totals[b, beam]), written[b, beam].tolist(), written.shape[2])
    return [result.found[0][1] for result in finished]


@contextmanager
def _evaluating(model: Kosmos) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
