"""Prompts for `predict`: held-out documents as a prompt, its images, and the expected continuation."""

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

BATCH_SIZE = 16
MAX_PROMPTS = 1024
"""Prompts of a source at most; of captions a quarter."""
ANSWER_POSITIONS = 64
"""Positions that an answer may take; prompts that leave fewer of a row are skipped."""


def caption_prompts(
    corpus: IndexedCorpus, documents: Iterable[int], tokenizer: Tokenizer, image_size: int, prompt: str
) -> Iterator[PromptBatch]:
    """Yield `prompt` with the image of each caption pair; pairs whose image cannot be decoded are skipped."""
    numbers = list(islice(documents, MAX_PROMPTS // 4))
    for first in range(0, len(numbers), BATCH_SIZE):
        images, targets = [], []
        for document in numbers[first : first + BATCH_SIZE]:
            decoded = _decoded_images(corpus, document, image_size)
            if decoded is not None:
                images.append(decoded[0])  # a caption pair has one image
                targets.append(tokenizer.decode(corpus.document_tokens(document).tolist()))
        if n := len(targets):
            yield PromptBatch(
                prompts=[prompt] * n,
                images=_stack(images, image_size),
                n_images=[1] * n,
                targets=targets,
                tasks=["caption"] * n,
            )


def example_prompts(
    corpus: IndexedCorpus, documents: Iterable[int], options: RenderOptions, seq_len: int
) -> Iterator[PromptBatch]:
    """Yield the prompt of each example, all before its last answer, in the very tokens of its row.

    Examples whose prompt leaves too few positions for an answer, or with an image that cannot be decoded, are skipped.
    """
    batch: list[tuple[Ids, list[Pixels], str]] = []  # one at a time: an example may have many images
    n_long = 0
    for document in islice(documents, MAX_PROMPTS):
        ids, supervised = corpus.document_tokens(document), corpus.document_supervised(document)
        assert supervised is not None
        # The last answer begins behind the last token that is not supervised.
        start = 0 if supervised.all() else int(np.flatnonzero(~supervised)[-1]) + 1
        n_images = int((ids == options.tokenizer.special.image).sum())
        # <s>, and for each image the L + 1 positions beside its marker.
        if start + 1 + (options.n_latents + 1) * n_images + ANSWER_POSITIONS > seq_len:
            n_long += 1
        elif (decoded := _decoded_images(corpus, document, options.image_size)) is not None:
            batch.append((ids[:start], decoded, options.tokenizer.decode(ids[start:].tolist())))
        if len(batch) == BATCH_SIZE:
            yield _example_batch(batch, options)
            batch = []
    if batch:
        yield _example_batch(batch, options)
    if n_long:
        rank_zero_info(
            f"{n_long} prompts are skipped: they leave less than {ANSWER_POSITIONS} of {seq_len} positions for an answer"
        )


def _example_batch(examples: Sequence[tuple[Ids, list[Pixels], str]], options: RenderOptions) -> PromptBatch:
    tokens, images_of, targets = zip(*examples, strict=True)
    return PromptBatch(
        prompts=[_readable(ids, options.tokenizer) for ids in tokens],
        images=_stack([image for decoded in images_of for image in decoded], options.image_size),
        n_images=[len(decoded) for decoded in images_of],
        targets=targets,
        tasks=["instruct"] * len(targets),
        tokens=tokens,
    )


def _decoded_images(corpus: IndexedCorpus, document: int, size: int) -> list[Pixels] | None:
    try:
        # "square", as the released evaluation fits images, whatever training does.
        return [decode(corpus.image_bytes(image), size, "square") for image in corpus.document_images(document)]
    except ImageError:
        return None


def _stack(images: list[Pixels], size: int) -> torch.Tensor:
    # np.stack refuses an empty list.
    return torch.from_numpy(np.stack(images) if images else np.zeros((0, 3, size, size), np.uint8))


def _readable(ids: Ids, tokenizer: Tokenizer) -> str:
    """Return a prompt as text, with <image> for each image."""
    # All parts but the first begin with an image's marker.
    parts = np.split(ids, np.flatnonzero(ids == tokenizer.special.image))
    texts = [tokenizer.decode(part.tolist()) for part in parts]  # decoding drops the marker that a part begins with
    return " ".join([texts[0], *(f"<image> {text}".strip() for text in texts[1:])]).strip()
