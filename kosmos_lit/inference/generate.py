"""Text from a model: continuations of prompts with images, and how likely given ones are.

`docs/generation.md` says what each setting means; the parts live in `kosmos_lit.inference`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from kosmos_lit.errors import UserError
from kosmos_lit.inference.beam_search import search_beams
from kosmos_lit.inference.config import GenerationConfig
from kosmos_lit.inference.head import Head
from kosmos_lit.inference.logits_processors import LogitsProcessors
from kosmos_lit.inference.prefill import Prefill, check_length
from kosmos_lit.inference.prompts import IMAGE_MARK, Prompt, encode_prompt
from kosmos_lit.inference.results import Continuation, ScoredCandidate
from kosmos_lit.inference.sampling import RandomStreams, sample_tokens
from kosmos_lit.inference.scoring import TokenLogProb, places, score_candidates
from kosmos_lit.inference.stop_strings import StopStrings
from kosmos_lit.model import Kosmos
from kosmos_lit.tokenizer import EOS, Tokenizer

__all__ = [
    "IMAGE_MARK",
    "Continuation",
    "GenerationConfig",
    "Prompt",
    "ScoredCandidate",
    "encode_prompt",
    "generate",
    "score",
    "score_tokens",
    "token_log_probs",
]  # fmt: skip


@torch.inference_mode()
def generate(
    model: Kosmos,
    prompts: Sequence[Prompt],
    images: Tensor,
    tokenizer: Tokenizer,
    settings: GenerationConfig = GenerationConfig(),
    *,
    shown: Tensor | None = None,
) -> list[Continuation]:
    """Return a continuation of each prompt, as each alone would have it.

    Args:
        model: the model; dropout is off meanwhile.
        prompts: B prompts, of any lengths and with any numbers of images.
        images: (N, 3, H, W) uint8, the images of all prompts in order.
        tokenizer: the model's.
        settings: how to write.
        shown: (M,) which of `images` each place of an image shows, so that one seen several times is given once; None:
            each its own, in order.

    Raises: UserError if prompt and continuation are longer than the model's rows, or choices cannot be told apart;
    ValueError if the images are not those of the prompts.
    """
    if not prompts:
        return []
    decoder = model.decoder
    processors = LogitsProcessors(settings, tokenizer, decoder.config.vocab_size, decoder.embed_tokens.weight.device)
    stop_strings = StopStrings(settings.stop, tokenizer)
    check_length(max(len(prompt.tokens) for prompt in prompts), processors.n_steps, decoder.config.max_seq_len)
    with _evaluating(model):
        prefill = _read(model, prompts, images, tokenizer, processors.n_steps * settings.n_beams, shown)
        head = Head(decoder, processors.forbidden)
        if settings.n_beams > 1:
            written = search_beams(prefill, head, processors, stop_strings)
        else:
            random_streams = RandomStreams(prompts, images, settings.seed, shown) if settings.temperature > 0 else None
            written = sample_tokens(prefill, head, processors, stop_strings, random_streams)
    text = processors.choices.text if processors.choices else stop_strings.cut
    return [Continuation(text(ids), tuple(ids), ended) for ids, ended in written]


def score(
    model: Kosmos,
    prompts: Sequence[Prompt],
    candidates: Sequence[Sequence[str]],
    images: Tensor,
    tokenizer: Tokenizer,
    *,
    with_end: bool = False,
) -> list[list[ScoredCandidate]]:
    """Return how likely each candidate is as the continuation of its prompt.

    Log-probabilities are the model's own, over its whole vocabulary.

    Args:
        model: the model; dropout is off meanwhile.
        prompts: B prompts.
        candidates: B lists of strings, each read as text that follows the prompt with a space between.
        images: (N, 3, H, W) uint8, the images of all prompts in order.
        tokenizer: the model's.
        with_end: count the </s> after each candidate too.

    Raises: UserError if a candidate has no tokens, or with its prompt is longer than the model's rows.
    """
    if len(candidates) != len(prompts):
        raise UserError(f"score: {len(prompts)} prompts but {len(candidates)} lists of candidates; give each prompt its own")
    end = [EOS] if with_end else []
    ids = [[[*tokenizer.encode(text).tolist(), *end] for text in row] for row in candidates]
    for texts, row in zip(candidates, ids, strict=True):
        for text, tokens in zip(texts, row, strict=True):
            if len(tokens) == len(end):
                raise UserError(f"score: the candidate {text!r} has no tokens")
    found = score_tokens(model, prompts, ids, images, tokenizer)
    return [
        [ScoredCandidate(text, tuple(values)) for text, values in zip(*row, strict=True)]
        for row in zip(candidates, found, strict=True)
    ]


def score_tokens(
    model: Kosmos,
    prompts: Sequence[Prompt],
    candidates: Sequence[Sequence[Sequence[int]]],
    images: Tensor,
    tokenizer: Tokenizer,
    *,
    shown: Tensor | None = None,
    given: Sequence[Sequence[int]] | None = None,
) -> list[list[list[float]]]:
    """Return the log-probability in nats of every token of each candidate, given as ids; else as `score`.

    `shown` is as `generate` takes it; `given`, and images in candidates, are as `score_candidates` has them.

    Raises: UserError if a candidate with its prompt is longer than the model's rows.
    """
    found = token_log_probs(model, prompts, candidates, images, tokenizer, shown=shown, given=given)
    return [[[token.log_prob for token in candidate] for candidate in row] for row in found]


@torch.inference_mode()
def token_log_probs(
    model: Kosmos,
    prompts: Sequence[Prompt],
    candidates: Sequence[Sequence[Sequence[int]]],
    images: Tensor,
    tokenizer: Tokenizer,
    *,
    shown: Tensor | None = None,
    given: Sequence[Sequence[int]] | None = None,
) -> list[list[list[TokenLogProb]]]:
    """Return how likely every token of each candidate is, and whether any other is likelier; else as `score_tokens`."""
    if not any(candidates):
        return [[] for _ in prompts]
    for prompt, row in zip(prompts, candidates, strict=True):
        check_length(len(prompt.tokens), max(map(len, row), default=0), model.config.decoder.max_seq_len)
    n_places = max(places(row) for row in candidates)
    with _evaluating(model):
        prefill = _read(model, prompts, images, tokenizer, n_places, shown)
        nothing = torch.zeros(0, dtype=torch.int64, device=prefill.device)
        return score_candidates(prefill, Head(model.decoder, nothing), candidates, given)


def _read(
    model: Kosmos, prompts: Sequence[Prompt], images: Tensor, tokenizer: Tokenizer, n_places: int, shown: Tensor | None
) -> Prefill:
    prefill = Prefill(model, prompts, images, tokenizer, n_places, shown)
    if not bool(prefill.hidden.isfinite().all()):
        raise UserError("the model gives no finite numbers after the prompt; its weights have diverged or are damaged")
    return prefill


@contextmanager
def _evaluating(model: Kosmos) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}  # a caller may hold parts of it in evaluation mode
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
