"""Decoding one token after another: greedily, or by sampling."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from kosmos_lit.inference.lm_head import LMHead
from kosmos_lit.inference.logits_processors import LogitsProcessors
from kosmos_lit.inference.prefill import Prefill
from kosmos_lit.inference.prompts import Prompt
from kosmos_lit.inference.stop_strings import StopStrings
from kosmos_lit.tokenizer import EOS


class RandomStreams:
    """A stream of random numbers for each prompt, so that no draw depends on the rest of the batch."""

    def __init__(self, prompts: Sequence[Prompt], images: Tensor, seed: int, image_index: Tensor | None = None) -> None:
        """Seed each stream by `seed`, the prompt's tokens and its images (of (N, 3, H, W) uint8 for all prompts).

        `image_index` is as in `Prefill`.
        """
        self._streams, first = [], 0
        for prompt in prompts:
            n = len(prompt.slots)
            # Not `hash`, whose value for a string is another one in each process.
            digest = hashlib.sha256(f"{seed} {prompt.tokens.tolist()} ".encode())
            own = slice(first, first + n) if image_index is None else image_index[first : first + n].cpu()
            digest.update(images.cpu()[own].contiguous().numpy().tobytes())
            stream_seed = int.from_bytes(digest.digest()[:8], "little", signed=True)  # 64 bits, all that a seed has
            self._streams.append(torch.Generator().manual_seed(stream_seed))
            first += n

    def sample(self, scores: Tensor) -> Tensor:
        """Return one id a row, drawn from softmax of (B, V) scores by inverting the cumulative distribution."""
        # One double a step from a generator on the CPU: the same draws on every device.
        uniform = torch.stack([torch.rand((), generator=stream, dtype=torch.float64) for stream in self._streams])
        # In float64: float32 sums over a vocabulary would lose its rarest ids.
        cumulative = scores.double().softmax(-1).cumsum(-1)
        # The last sum is 1 but for rounding. `right` skips ids of probability 0 when the number falls on an edge.
        ids = torch.searchsorted(cumulative, uniform.to(scores.device)[:, None] * cumulative[:, -1:], right=True)
        return ids.squeeze(1).clamp(max=scores.shape[1] - 1)


def sample_tokens(
    prefill: Prefill,
    head: LMHead,
    processors: LogitsProcessors,
    stop_strings: StopStrings,
    random_streams: RandomStreams | None,
) -> list[tuple[list[int], str]]:
    """Return the tokens after each of B prompts, without </s>, and the finish reason: `end`, `stop` or `length`.

    Args:
        prefill: the prompts.
        head: the output matrix.
        processors: which tokens are allowed, and how scores change.
        stop_strings: strings that end a continuation.
        random_streams: random numbers, or None for the likeliest token.
    """
    B = len(prefill.tokens)
    generated: list[list[int]] = [[] for _ in range(B)]
    finish_reasons: list[str] = [""] * B
    history = prefill.tokens if processors.need_history else None
    hidden = prefill.hidden  # (B, D)
    for step in range(processors.n_steps):
        if processors.need_scores:
            # The next token of a finished row is dropped, so any valid prefix will do for it.
            prefixes = [[] if reason else ids for ids, reason in zip(generated, finish_reasons, strict=True)]
            scores = processors.apply(head.logits(hidden), history, prefixes)
            tokens = scores.argmax(-1) if random_streams is None else random_streams.sample(scores)
        else:
            tokens = head.greedy(hidden)
        for b, token in enumerate(tokens.tolist()):
            if finish_reasons[b]:
                continue
            if token == EOS:
                finish_reasons[b] = "end"
                continue
            generated[b].append(token)
            if stop_strings.occurs_in(generated[b]):
                finish_reasons[b] = "stop"
        if all(finish_reasons) or step + 1 == processors.n_steps:
            break
        hidden = prefill.decode(tokens[:, None], step)[:, -1]  # (B, D)
        if history is not None:
            history = torch.cat([history, tokens[:, None]], dim=1)
    return [(ids, reason or "length") for ids, reason in zip(generated, finish_reasons, strict=True)]
