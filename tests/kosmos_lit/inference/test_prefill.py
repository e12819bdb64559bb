"""What is read from the cache is what is read anew."""

import numpy as np
import pytest
import torch
from torch import Tensor

from kosmos_lit.inference.generate import Prompt
from kosmos_lit.inference.prefill import Prefill
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


def anew(model, start: Prompt, images: Tensor, written: list[int]) -> Tensor:
    """Return (D,) after the last token of a document that is read as in training, without a cache."""
    tokens = torch.tensor([[*start.tokens.tolist(), *written]])
    T = tokens.shape[1]
    slots = torch.tensor([(0, int(slot)) for slot in start.slots]).view(-1, 2)
    latents = model.encode_images(images) if len(images) else None
    return model.decoder(tokens, torch.arange(T)[None], DocumentMask((T,), 1, T, tokens.device), latents, slots)[0, -1]


@torch.inference_mode()
@pytest.mark.parametrize("positions", POSITIONS)
def test_cached_equals_uncached_at_every_step(talker, kosmos_tokenizer, positions):
    model, images = talker(positions=positions), random_images(3)
    prefill = Prefill(model, PROMPTS, images, kosmos_tokenizer, 11)
    written, hidden = [words(11, seed) for seed in (5, 6, 7)], prefill.hidden
    for step in range(12):
        for b, own in enumerate(images.split(N_IMAGES)):
            torch.testing.assert_close(hidden[b], anew(model, PROMPTS[b], own, written[b][:step]), **CLOSE)
        if step < 11:
            hidden = prefill.write(torch.tensor([[row[step]] for row in written]), step)[:, 0]


@torch.inference_mode()
@pytest.mark.parametrize("positions", POSITIONS)
def test_the_nodes_of_a_tree_are_read_as_each_path_alone(talker, kosmos_tokenizer, positions):
    model, images = talker(positions=positions), random_images(3)
    prefill = Prefill(model, PROMPTS, images, kosmos_tokenizer, 7)
    paths = [[5, 6, 7], [5, 6, 9], [5, 8], [11]]
    trie = Trie(paths)
    tokens, depths = (torch.tensor(x).expand(3, -1) for x in (trie.tokens, trie.depths))
    after = prefill.write(tokens, depths, torch.from_numpy(trie.ancestors()).expand(3, -1, -1))
    for b, own in enumerate(images.split(N_IMAGES)):
        for path, end in zip(paths, trie.ends, strict=True):
            torch.testing.assert_close(after[b, end], anew(model, PROMPTS[b], own, path), **CLOSE)


@torch.inference_mode()
def test_what_is_forgotten_leaves_no_trace(talker, kosmos_tokenizer):
    prefill = Prefill(talker(), PROMPTS, random_images(3), kosmos_tokenizer, 3)
    first = prefill.write(torch.tensor([[5], [6], [7]]), 0)
    prefill.rewind()
    prefill.write(torch.tensor([[9], [9], [9]]), 0)
    prefill.rewind()
    assert torch.equal(prefill.write(torch.tensor([[5], [6], [7]]), 0), first)
