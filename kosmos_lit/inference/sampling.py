"""One token after another: the likeliest, or a drawn one."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from kosmos_lit.inference.head import Head
from kosmos_lit.inference.logits_processors import LogitsProcessors
from kosmos_lit.inference.prefill import Prefill
from kosmos_lit.inference.prompts import Prompt
from kosmos_lit.inference.stop_strings import StopStrings
from kosmos_lit.tokenizer import EOS


class RandomStreams:
    """A stream of random numbers for each prompt."""

    def __init__(self, prompts: Sequence[Prompt], images: Tensor, seed: int, shown: Tensor | None = None) -> None:
        """Seed each stream by `seed`, the prompt's tokens and its images (of (N, 3, H, W) uint8 for all prompts).

        `shown` is as `Reading` has it.
        """
        self._streams, first = [], 0
        for prompt in prompts:
            n = len(prompt.slots)
            told = hashlib.sha256(f"{seed} {prompt.tokens.tolist()} ".encode())
            own = slice(first, first + n) if shown is None else shown[first : first + n].cpu()
            told.update(images.cpu()[own].contiguous().numpy().tobytes())
            number = int.from_bytes(told.digest()[:8], "little", signed=True)
            self._streams.append(torch.Generator().manual_seed(number))
            first += n

    def choose(self, scores: Tensor) -> Tensor:
        """Return one id a row, drawn from softmax of (B, V) scores: the first at which the sum passes the random number."""
        share = torch.stack([torch.rand((), generator=stream, dtype=torch.float64) for stream in self._streams])
        sums = scores.double().softmax(-1).cumsum(-1)
        at = torch.searchsorted(sums, share.to(scores.device)[:, None] * sums[:, -1:], right=True)
        return at.squeeze(1).clamp(max=scores.shape[1] - 1)


def sample_tokens(
    prefill: Prefill,
    head: Head,
    processors: LogitsProcessors,
    stop_strings: StopStrings,
    random_streams: RandomStreams | None,
) -> list[tuple[list[int], str]]:
    """Return the tokens after each of B prompts, without </s>, and why they end: `end`, `stop` or `length`.

    Args:
        prefill: the prompts.
        head: the output matrix.
        processors: what may be written.
        stop_strings: strings that end a continuation.
        random_streams: random numbers, or None for the likeliest token.
    """
    B = len(prefill.tokens)
    written: list[list[int]] = [[] for _ in range(B)]
    ended: list[str] = [""] * B
    history = prefill.tokens if processors.need_history else None
    hidden = prefill.hidden  # (B, D)
    for step in range(processors.n_steps):
        if processors.need_scores:
            scores = processors.apply(
                head.logits(hidden), history, [[] if e else w for w, e in zip(written, ended, strict=True)]
            )
            tokens = scores.argmax(-1) if random_streams is None else random_streams.choose(scores)
        else:
            tokens = head.likeliest(hidden)
        for b, token in enumerate(tokens.tolist()):
            if ended[b]:
                continue
            if token == EOS:
                ended[b] = "end"
                continue
            written[b].append(token)
            if stop_strings.end(written[b]):
                ended[b] = "stop"
        if all(ended) or step + 1 == processors.n_steps:
            break
        hidden = prefill.write(tokens[:, None], step)[:, -1]
        if history is not None:
            history = torch.cat([history, tokens[:, None]], dim=1)
    return [(ids, end or "length") for ids, end in zip(written, ended, strict=True)]
