"""Prompts and candidates as the rows of training have them.

One rule says what of the parts' blanks remains (`tokens.trimmed`), one encoder makes ids (`Tokenizer.encode_parts`), and
both are those of training documents. So a prompt with its answer is, id for id, the document of the same parts:

    <s> part part ... | answer </s>

A prompt's blanks at its end are the head of the answer, as in an example of instruction data; where there are none, one
space is. The texts of a dataset are text whatever they say: "<image>" or "</s>" in them is spelled out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from kosmos_lit.evaluation.requests import Part, Parts
from kosmos_lit.inference.prompts import IMAGE_MARK, Prompt
from kosmos_lit.tokenizer import Tokenizer, trimmed


def encode_prompts(prompts: Iterable[Parts], tokenizer: Tokenizer, n_latents: int) -> list[Prompt]:
    """Return prompts as the model reads them, from <s> on, images written out; texts side by side are one text.

    Args:
        prompts: each its parts: text, and images' files.
        tokenizer: the model's.
        n_latents: slots an image.
    """
    kept = [[part for _, part in trimmed(_joined(parts))] for parts in prompts]
    ids = iter(tokenizer.encode_parts(kept))
    return [Prompt.of([next(ids) for _ in parts], tokenizer, n_latents) for parts in kept]


def encode_answers(parts: Parts, answers: Sequence[str], tokenizer: Tokenizer) -> list[list[int]]:
    """Return the ids of texts that could follow a prompt, those of a training document that goes on so.

    Returns: for each answer its ids, none for one without a word.
    """
    return [tokenizer.encode(text).tolist() if text else [] for text in (_said(parts, a, tokenizer) for a in answers)]


def _said(parts: Parts, answer: str, tokenizer: Tokenizer) -> str:
    """Return an answer as it is to be encoded, with what stands between the prompt and it; empty if it has no word."""
    has_gap = bool(parts) and isinstance(parts[-1], str) and parts[-1][-1:].isspace()
    before = _joined(parts)
    kept = list(trimmed((*before, answer if has_gap else f" {answer}")))
    if not kept or kept[-1][0] != len(before):
        return ""
    text = kept[-1][1]
    assert isinstance(text, str)
    return tokenizer.continuation(text) if len(kept) > 1 and isinstance(kept[-2][1], str) else text


def _joined(parts: Parts) -> list[Part]:
    """Return texts side by side as one text."""
    found: list[Part] = []
    for part in parts:
        if isinstance(part, str) and found and isinstance(found[-1], str):
            found[-1] += part
        else:
            found.append(part)
    return found


def readable(parts: Parts) -> str:
    """Return a prompt for people: texts as they are, <image> where an image stands."""
    return "".join(part if isinstance(part, str) else IMAGE_MARK for part in parts)
