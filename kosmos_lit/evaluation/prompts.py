"""Prompts: templates, demonstrations, and their tokens, which are those of training rows.

One rule says which blanks of the parts remain (`tokenizer.trimmed`), one encoder makes ids (`Tokenizer.encode_parts`), and
both are those of training documents. So a prompt with its answer is, id for id, the document of the same parts:

    <s> part part ... | answer </s>

Blanks at a prompt's end begin the answer, as in an example of instruction data; a prompt without any is followed by one
space. Texts of a dataset are text whatever they contain: "<image>" or "</s>" in them is spelled out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from kosmos_lit.errors import UserError
from kosmos_lit.evaluation.requests import Part, Parts
from kosmos_lit.inference.prompts import IMAGE_MARK, Prompt
from kosmos_lit.tokenizer import Tokenizer, trimmed


def fill_template(template: str, **fields: object) -> str:
    """Return a template with each `{field}` replaced by its value; braces in the values are text.

    Raises: UserError if the template names a field that the task does not have, or its braces do not match.
    """
    try:
        return template.format(**fields)
    except (KeyError, IndexError, ValueError) as error:
        # {other} is a KeyError, {} an IndexError, an unmatched brace a ValueError.
        allowed = ", ".join(f"{{{name}}}" for name in fields) or "no fields"
        raise UserError(f"the template {template!r} cannot be filled in ({error}); it may use {allowed}") from error


def few_shot_prompt(demonstrations: Sequence[Parts], prompt: Parts, separator: str) -> Parts:
    """Return a prompt after its demonstrations, each of these followed by `separator`; adjacent texts become one."""
    parts = [part for demonstration in demonstrations for part in (*demonstration, separator)]
    return tuple(part for part in _join_texts((*parts, *prompt)) if part != "")  # empty separators between images


def encode_prompts(prompts: Iterable[Parts], tokenizer: Tokenizer, n_latents: int) -> list[Prompt]:
    """Return prompts as the model reads them, from <s> on, with slots for images; adjacent texts are one text.

    Args:
        prompts: each its parts: text, and images' files.
        tokenizer: the model's.
        n_latents: slots an image.
    """
    trimmed_prompts = [[part for _, part in trimmed(_join_texts(parts))] for parts in prompts]
    # The ids of all parts of all prompts are one flat list.
    ids = iter(tokenizer.encode_parts(trimmed_prompts))
    return [Prompt.of([next(ids) for _ in parts], tokenizer, n_latents) for parts in trimmed_prompts]


def encode_answers(parts: Parts, answers: Sequence[str], tokenizer: Tokenizer) -> list[list[int]]:
    """Return the ids of each answer as they follow the prompt in a training document; none for an answer without a word."""
    texts = [_text_after(parts, answer, tokenizer) for answer in answers]
    return [tokenizer.encode(text).tolist() if text else [] for text in texts]


def _text_after(parts: Parts, answer: str, tokenizer: Tokenizer) -> str:
    """Return an answer as it is encoded after a prompt, with the blanks between them; empty if it has no word."""
    # [-1:] and not [-1]: a text may be empty.
    has_gap = bool(parts) and isinstance(parts[-1], str) and parts[-1][-1:].isspace()
    before = _join_texts(parts)
    # Trimmed together: the prompt decides which blanks before the answer remain.
    kept = list(trimmed((*before, answer if has_gap else f" {answer}")))
    if not kept or kept[-1][0] != len(before):  # trimming has removed the answer
        return ""
    text = kept[-1][1]
    assert isinstance(text, str)
    # Behind a text the answer continues it; behind an image, or alone, it is a text of its own.
    return tokenizer.continuation(text) if len(kept) > 1 and isinstance(kept[-2][1], str) else text


def _join_texts(parts: Iterable[Part]) -> list[Part]:
    """Return the parts with adjacent texts as one text."""
    joined: list[Part] = []
    for part in parts:
        if isinstance(part, str) and joined and isinstance(joined[-1], str):
            joined[-1] += part
        else:
            joined.append(part)
    return joined


def prompt_text(parts: Parts) -> str:
    """Return a prompt for people: its texts as they are, <image> in the place of each image."""
    return "".join(part if isinstance(part, str) else IMAGE_MARK for part in parts)
