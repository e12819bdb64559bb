"""What `predict` asks: held-out documents as a prompt, its images, and the continuation that would be right."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info

from datamodules.corpus import IndexedCorpus
from datamodules.loader import RenderOptions
from kosmos_lit.batch import PromptBatch
from kosmos_lit.images import ImageError, Pixels, decode
from kosmos_lit.tokenizer import Ids, Tokenizer

BATCH = 16
MOST = 1024
"""Questions of a corpus at most; of captions a quarter."""
ROOM = 64
"""Positions that an answer may take; prompts that leave less of a row are not asked."""


def caption_prompts_of(
    corpus: IndexedCorpus, documents: Iterable[int], tokenizer: Tokenizer, image_size: int, prompt: str
) -> Iterator[PromptBatch]:
    """Yield questions about caption pairs' images; those that cannot be decoded are left out."""
    asked = list(islice(documents, MOST // 4))
    for first in range(0, len(asked), BATCH):
        images, answers = [], []
        for document in asked[first : first + BATCH]:
            decoded = _decoded_images(corpus, document, image_size)
            if decoded is not None:
                images.append(decoded[0])
                answers.append(tokenizer.decode(corpus.document_tokens(document).tolist()))
        if n := len(answers):
            yield PromptBatch(
                prompts=[prompt] * n, images=_stack(images, image_size), n_images=[1] * n, answers=answers,
                tasks=["caption"] * n,
            )  # fmt: skip


def example_prompts_of(corpus: IndexedCorpus, documents: Iterable[int], r: RenderOptions, seq_len: int) -> Iterator[PromptBatch]:
    """Yield the prompt of each example, all before its last answer, in the very tokens of its row.

    Examples are left out whose prompt leaves no room for an answer, or an image of which cannot be decoded.
    """
    kept: list[tuple[Ids, list[Pixels], str]] = []  # one batch at a time: there may be thousands of images
    n_long = 0
    for document in islice(documents, MOST):
        ids, said = corpus.document_tokens(document), corpus.document_supervised(document)
        assert said is not None
        start = 0 if said.all() else int(np.flatnonzero(~said)[-1]) + 1
        if start + 1 + (r.n_latents + 1) * int((ids == r.tokenizer.special.image).sum()) + ROOM > seq_len:
            n_long += 1
        elif (decoded := _decoded_images(corpus, document, r.image_size)) is not None:
            kept.append((ids[:start], decoded, r.tokenizer.decode(ids[start:].tolist())))
        if len(kept) == BATCH:
            yield _examples(kept, r)
            kept = []
    if kept:
        yield _examples(kept, r)
    if n_long:
        rank_zero_info(f"{n_long} prompts are not asked: they leave less than {ROOM} of {seq_len} positions for an answer")


def _examples(kept: Sequence[tuple[Ids, list[Pixels], str]], r: RenderOptions) -> PromptBatch:
    tokens, images_of, answers = zip(*kept, strict=True)
    return PromptBatch(
        prompts=[_readable(ids, r.tokenizer) for ids in tokens],
        images=_stack([image for decoded in images_of for image in decoded], r.image_size),
        n_images=[len(decoded) for decoded in images_of],
        answers=answers,
        tasks=["instruct"] * len(answers),
        tokens=tokens,
    )


def _decoded_images(corpus: IndexedCorpus, document: int, size: int) -> list[Pixels] | None:
    try:
        return [decode(corpus.image_bytes(image), size, "square") for image in corpus.document_images(document)]
    except ImageError:
        return None


def _stack(images: list[Pixels], size: int) -> torch.Tensor:
    return torch.from_numpy(np.stack(images) if images else np.zeros((0, 3, size, size), np.uint8))


def _readable(ids: Ids, tokenizer: Tokenizer) -> str:
    """Return a prompt as a person would write it."""
    cuts = np.flatnonzero(ids == tokenizer.special.image)
    pieces = np.split(ids, cuts)
    texts = [tokenizer.decode(piece.tolist()) for piece in pieces]  # decoding leaves the marker out
    return " ".join([texts[0], *(f"<image> {text}".strip() for text in texts[1:])]).strip()
