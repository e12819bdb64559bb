from dataclasses import fields

import torch
from torch import Tensor

from kosmos_lit.batch import CORPORA, PromptBatch
from tests.kosmos_lit.tiny_kosmos import batch_of, image_doc, random_images, text_doc


def test_moving_a_batch_moves_every_tensor():
    batch = batch_of([[text_doc(3), image_doc(2)]], 17)
    moved = batch.to("meta")
    tensors = [f.name for f in fields(batch) if isinstance(getattr(batch, f.name), Tensor)]
    assert len(tensors) == 8
    assert {getattr(moved, name).device.type for name in tensors} == {"meta"}
    assert batch.tokens.device.type == "cpu"


def test_moving_a_batch_keeps_everything_else():
    batch = batch_of([[text_doc(3), image_doc(2)]], 17)
    moved = batch.to("cpu", non_blocking=True)
    assert (moved.lengths, moved.rows, moved.n_real) == ((5, 9, 3), (0,), 14)
    assert moved.n_step_targets == batch.n_step_targets == 4 + 3
    assert torch.equal(moved.images, batch.images)


def test_moving_questions_moves_the_images():
    batch = PromptBatch(prompts=["a", "b"], images=random_images(3), n_images=[1, 2], targets=["c", "d"], tasks=["t", "t"])
    moved = batch.to("meta")
    assert (moved.images.device.type, moved.prompts, moved.n_images) == ("meta", ["a", "b"], [1, 2])


def test_the_corpora_are_in_the_papers_order():
    assert CORPORA == ("text", "caption", "interleaved", "instruct")
