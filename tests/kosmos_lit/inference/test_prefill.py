"""Hidden states with the KV cache equal those without it."""

import numpy as np
import pytest
import torch
from torch import Tensor

from kosmos_lit.inference.prefill import Prefill
from kosmos_lit.inference.prompts import Prompt
from kosmos_lit.inference.trie import Trie
from kosmos_lit.ops.masks import DocumentMask
from kosmos_lit.tokenizer import BOS, expand_images
from tests.kosmos_lit.inference.conftest import POSITIONS
from tests.kosmos_lit.tiny_kosmos import LATENTS, SPECIAL, random_images, words

CLOSE = {"rtol": 1e-5, "atol": 1e-5}  # fp32, two layers, hidden states of size 1


def prompt(n_words: int, n_images: int, seed: int) -> Prompt:
    ids = [BOS]
    for i in range(n_images):
        ids += [SPECIAL.image, *words(2, seed + 10 + i)]
    tokens, _, slots = expand_images(np.array(ids + words(n_words, seed)), SPECIAL, LATENTS)
    return Prompt(tokens, slots)


PROMPTS = [prompt(4, 1, 1), prompt(1, 0, 2), prompt(13, 2, 3)]
N_IMAGES = [1, 0, 2]


def uncached(model, start: Prompt, images: Tensor, continuation: list[int]) -> Tensor:
    """Return (D,) after the last token of a document, as in training, without a cache."""
    tokens = torch.tensor([[*start.tokens.tolist(), *continuation]])
    T = tokens.shape[1]
    slots = torch.tensor([(0, int(slot)) for slot in start.slots]).view(-1, 2)
    latents = model.encode_images(images) if len(images) else None
    return model.decoder(tokens, torch.arange(T)[None], DocumentMask((T,), 1, T, tokens.device), latents, slots)[0, -1]


@torch.inference_mode()
@pytest.mark.parametrize("positions", POSITIONS)
def test_cached_equals_uncached_at_every_step(talker, positions):
    model, images = talker(positions=positions), random_images(3)
    prefill = Prefill(model, PROMPTS, images, SPECIAL, 11)
    continuations, hidden = [words(11, seed) for seed in (5, 6, 7)], prefill.hidden
    for step in range(12):
        for b, own in enumerate(images.split(N_IMAGES)):
            torch.testing.assert_close(hidden[b], uncached(model, PROMPTS[b], own, continuations[b][:step]), **CLOSE)
        if step < 11:
            hidden = prefill.decode(torch.tensor([[row[step]] for row in continuations]), step)[:, 0]


@torch.inference_mode()
@pytest.mark.parametrize("positions", POSITIONS)
def test_the_nodes_of_a_trie_decode_as_each_path_alone(talker, positions):
    model, images = talker(positions=positions), random_images(3)
    prefill = Prefill(model, PROMPTS, images, SPECIAL, 7)
    paths = [[5, 6, 7], [5, 6, 9], [5, 8], [11]]
    trie = Trie(paths)
    tokens, depths = (torch.tensor(x).expand(3, -1) for x in (trie.tokens, trie.depths))
    after = prefill.decode(tokens, depths, torch.from_numpy(trie.ancestors()).expand(3, -1, -1))
    for b, own in enumerate(images.split(N_IMAGES)):
        for path, end in zip(paths, trie.ends, strict=True):
            torch.testing.assert_close(after[b, end], uncached(model, PROMPTS[b], own, path), **CLOSE)


@torch.inference_mode()
def test_rewinding_leaves_no_trace(talker):
    prefill = Prefill(talker(), PROMPTS, random_images(3), SPECIAL, 3)
    first = prefill.decode(torch.tensor([[5], [6], [7]]), 0)
    prefill.rewind()
    prefill.decode(torch.tensor([[9], [9], [9]]), 0)
    prefill.rewind()
    assert torch.equal(prefill.decode(torch.tensor([[5], [6], [7]]), 0), first)
