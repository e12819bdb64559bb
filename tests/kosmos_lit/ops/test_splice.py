import pytest
import torch

from kosmos_lit.batch import check_slots
from kosmos_lit.ops.splice import splice
from tests.kosmos_lit.tiny_kosmos import normal

B, T, D, L = 2, 11, 5, 3
SLOTS = torch.tensor([[0, 2], [1, 1], [1, 7]])
IMAGE, END = 7, 8


def rows(*texts: str) -> torch.Tensor:
    """Read `i` as <image>, `e` as </image>, anything else as text."""
    return torch.tensor([[{"i": IMAGE, "e": END}.get(letter, 4) for letter in text] for text in texts])


def test_latents_land_in_their_slots_and_nothing_else_changes():
    embeddings, latents = normal(B, T, D, seed=1), normal(3, L, D, seed=2)
    expected = embeddings.clone()
    expected[0, 2:5], expected[1, 1:4], expected[1, 7:10] = latents
    assert torch.equal(splice(embeddings, latents, SLOTS), expected)


def test_the_embeddings_stay_as_they_were():
    embeddings = normal(B, T, D, seed=1)
    splice(embeddings, normal(3, L, D, seed=2), SLOTS)
    assert torch.equal(embeddings, normal(B, T, D, seed=1))


def test_gradients_reach_latents_and_text_but_no_overwritten_embedding():
    embeddings, latents = normal(B, T, D, seed=1).requires_grad_(), normal(3, L, D, seed=2).requires_grad_()
    upstream = normal(B, T, D, seed=3)
    splice(embeddings, latents, SLOTS).backward(upstream)
    slots = torch.zeros(B, T, dtype=torch.bool)
    slots[0, 2:5] = slots[1, 1:4] = slots[1, 7:10] = True
    assert torch.equal(latents.grad, upstream[slots].view(3, L, D))
    assert torch.equal(embeddings.grad, upstream.masked_fill(slots[:, :, None], 0))


def test_latents_take_the_dtype_of_the_embeddings():
    spliced = splice(normal(B, T, D).bfloat16(), normal(3, L, D), SLOTS)
    assert spliced.dtype == torch.bfloat16


def test_slots_that_fit_pass():
    check_slots(rows("xiiiiexxxxx", "iiiiexiiiie"), SLOTS, 3, L, IMAGE, END)
    check_slots(rows("xxxxx"), SLOTS[:0], 0, L, IMAGE, END)
    check_slots(rows("iiiieiiiie"), torch.tensor([[0, 1], [0, 6]]), 2, L, IMAGE, END)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (("xiiiiexxxxx", "iiiiexiiiex"), "row 1: 2 slots at position 7 but image 2 has 3 latents"),
        (("xiiiiexxxxx", "iiiiiexiiie"), "row 1: 4 slots at position 1 but image 1 has 3 latents"),  # right in sum
        (("xiiiixxxxxx", "iiiiexiiiie"), "row 0: 3 slots at position 2 but image 0 has 3 latents"),  # not closed
        (("xxiiiexxxxx", "iiiiexiiiie"), "row 0: 3 slots at position 2 but image 0 has 3 latents"),  # not opened
        (("xiiiiexxxxx", "iiiiexiiiii"), "row 1: 4 slots at position 7 but image 2 has 3 latents"),  # runs out
        (("xiiiiexxxix", "iiiiexiiiie"), "10 slots in the batch but 3 images of 3 latents"),  # one without an image
    ],
)
def test_an_error_names_row_image_and_both_counts(texts, message):
    with pytest.raises(ValueError, match=message):
        check_slots(rows(*texts), SLOTS, 3, L, IMAGE, END)


def test_an_image_without_a_place_is_an_error():
    with pytest.raises(ValueError, match="3 places for 4 images"):
        check_slots(rows("xiiiiexxxxx", "iiiiexiiiie"), SLOTS, 4, L, IMAGE, END)
