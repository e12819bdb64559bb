from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from kosmos_lit.batch import KosmosBatch
from kosmos_lit.connector import KINDS
from kosmos_lit.model import Kosmos
from kosmos_lit.tokenizer import BOS, EOS
from tests.kosmos_lit.tiny_kosmos import (
    LATENTS,
    SPECIAL,
    Doc,
    batch_of,
    image_doc,
    random_images,
    text_doc,
    tiny_config,
    tiny_model,
    words,
)

FIRST, SECOND, THIRD = image_doc(4, seed=1, n_images=2), image_doc(3, seed=2), text_doc(5, seed=3)
T = 37


def logits(model: Kosmos, batch: KosmosBatch) -> torch.Tensor:
    return model.decoder.logits(model(batch)).detach()


def of_document(values: torch.Tensor, batch: KosmosBatch, n: int) -> torch.Tensor:
    """The part of (B, T, ...) values that belongs to the n-th document."""
    return values.flatten(0, 1).split(batch.lengths)[n]


# ---- documents


@pytest.mark.parametrize("norm", ["sub", "pre", "post", "deepnorm"])
@pytest.mark.parametrize("positions", ["xpos", "rotary", "sinusoidal", "learned", "none"])
def test_packed_documents_have_the_logits_of_each_alone(kosmos_tower, positions, norm):
    model = tiny_model(kosmos_tower, positions=positions, norm=norm)
    packed = batch_of([[FIRST, SECOND], [THIRD, SECOND, THIRD]], T)
    actual = logits(model, packed)
    for n, doc in ((0, FIRST), (1, SECOND), (3, THIRD), (4, SECOND), (5, THIRD)):
        alone = logits(model, batch_of([[doc]], len(doc.expanded)))[0]
        torch.testing.assert_close(of_document(actual, packed, n), alone, rtol=1e-4, atol=2e-5)  # fp32, measured 2e-6


@pytest.mark.parametrize("kernel", ["sdpa", "reference"])
@pytest.mark.parametrize(
    "neighbour",
    [Doc(FIRST.ids, random_images(2, seed=9)), Doc([BOS, SPECIAL.image, *words(8, 9), SPECIAL.image, EOS], FIRST.images)],
    ids=["other images", "other text"],
)
def test_a_document_does_not_see_its_neighbour(kosmos_tower, kernel, neighbour):
    model = tiny_model(kosmos_tower, attention_kernel=kernel)
    before, after = (batch_of([[doc, SECOND, THIRD]], T) for doc in (FIRST, neighbour))
    one, other = logits(model, before), logits(model, after)
    assert not torch.equal(of_document(one, before, 0), of_document(other, after, 0))
    for n in (1, 2):
        assert torch.equal(of_document(one, before, n), of_document(other, after, n))


def test_a_document_does_not_see_what_follows_it(kosmos_tower):
    model = tiny_model(kosmos_tower)
    before, after = (batch_of([[SECOND, doc]], T) for doc in (FIRST, Doc(FIRST.ids, random_images(2, seed=9))))
    assert torch.equal(of_document(logits(model, before), before, 0), of_document(logits(model, after), after, 0))


def test_row_attention_sees_earlier_documents_of_the_row_and_of_no_other(kosmos_tower):
    model = tiny_model(kosmos_tower, document_attention="row")
    other = text_doc(5, seed=9)
    before, after = (batch_of([[doc, SECOND], [SECOND, THIRD]], T) for doc in (THIRD, other))
    one, two = logits(model, before), logits(model, after)
    assert not torch.allclose(of_document(one, before, 1), of_document(two, after, 1), atol=1e-3)
    assert torch.equal(one[1], two[1])


def test_row_attention_counts_positions_through_the_row(kosmos_tower):
    rowwise, own = (tiny_model(kosmos_tower, document_attention=a, positions="learned") for a in ("row", "own"))
    packed = batch_of([[THIRD, SECOND]], T)
    one_document = replace(packed, lengths=(T,), padding=(), positions=torch.arange(T)[None])
    assert torch.equal(logits(rowwise, packed), logits(own, one_document))


def test_no_position_of_a_document_sees_what_comes_after_it(kosmos_tower):
    # The second image stands after <s>, the first image and four words: positions 0 to 9.
    model = tiny_model(kosmos_tower)
    changed = Doc(FIRST.ids, torch.cat([FIRST.images[:1], random_images(1, seed=9)]))
    one, two = (logits(model, batch_of([[doc]], T))[0] for doc in (FIRST, changed))
    first_slot = 1 + (LATENTS + 2) + 4 + 1
    assert torch.equal(one[:first_slot], two[:first_slot])
    assert not torch.equal(one[first_slot], two[first_slot])


# ---- images


def test_an_image_changes_what_is_said_after_it(kosmos_tower):
    model = tiny_model(kosmos_tower)
    one, two = (logits(model, batch_of([[Doc(SECOND.ids, random_images(1, seed))]], 10))[0] for seed in (2, 9))
    assert torch.equal(one[:2], two[:2])  # <s> and <image>
    assert (one[2:] - two[2:]).abs().amax(-1).min() > 1e-3


def test_what_is_written_in_slots_is_not_read(kosmos_tower):
    model, batch = tiny_model(kosmos_tower), batch_of([[SECOND]], 11)
    other = batch.tokens.clone()
    other[0, 2 : 2 + LATENTS] = torch.tensor(words(LATENTS))
    assert torch.equal(logits(model, batch), logits(model, replace(batch, tokens=other)))


def test_images_go_to_their_own_slots(kosmos_tower):
    model = tiny_model(kosmos_tower)
    batch = batch_of([[SECOND], [Doc(SECOND.ids, random_images(1, seed=9))]], 11)
    swapped = replace(batch, images=batch.images.flip(0), slots=batch.slots.flip(0))
    torch.testing.assert_close(logits(model, swapped), logits(model, batch), rtol=1e-4, atol=1e-5)  # fp32, reordered


def test_latents_are_those_of_the_connector_on_the_towers_features(kosmos_tower):
    model = tiny_model(kosmos_tower)
    latents = model.encode_images(random_images(5))
    assert latents.shape == (5, LATENTS, 20)
    assert torch.equal(latents, model.connector(model.vision(random_images(5))))


def test_a_batch_without_images_works(kosmos_tower):
    model, batch = tiny_model(kosmos_tower), batch_of([[THIRD, THIRD], [THIRD]], 17)
    model.nll(batch).mean().backward()
    assert model(batch).shape == (2, 17, 20)
    assert all(p.grad is None for p in model.vision.parameters())


# ---- loss


@pytest.mark.parametrize("chunk", [None, 3])
def test_the_loss_is_the_cross_entropy_of_the_supervised_tokens(kosmos_tower, chunk):
    model, batch = tiny_model(kosmos_tower, loss_chunk=chunk), batch_of([[FIRST, SECOND], [THIRD]], T)
    expected = [
        F.cross_entropy(position, target)
        for position, target in zip(logits(model, batch).flatten(0, 1), batch.targets.flatten(), strict=True)
        if target >= 0
    ]
    assert len(expected) == 2 * 4 + 1 + 3 + 1 + 6  # words and </s> of each document, first words included
    torch.testing.assert_close(model.nll(batch), torch.stack(expected), rtol=1e-5, atol=1e-5)  # fp32, sums of 73


@pytest.mark.parametrize("norm", ["sub", "pre", "post", "deepnorm"])
@pytest.mark.parametrize("connector", KINDS)
def test_every_part_of_the_model_learns_from_the_loss(kosmos_tower, connector, norm):
    model, batch = tiny_model(kosmos_tower, connector=connector, norm=norm), batch_of([[FIRST], [SECOND, THIRD]], T)
    model.nll(batch).sum().backward()
    still = {name for name, p in model.named_parameters() if not p.grad.abs().max() > 1e-6}
    # Softmax does not notice a shift of all scores, which is what a bias on the keys gives without rotation.
    assert still == ({"connector.x_attn.k_proj.bias"} if connector == "resampler" else set())


@pytest.mark.parametrize("connector", KINDS)
def test_one_batch_is_learned_by_heart_from_its_images(kosmos_tower, connector):
    """Two rows differ in their images only: text alone cannot tell their captions apart."""
    config = tiny_config(kosmos_tower, vision={"feature_length": 90.0}, connector=connector)
    model = Kosmos.create(config, seed=3).train()
    captions = [words(5, seed) for seed in (1, 2)]
    docs = [Doc([BOS, SPECIAL.image, *caption, EOS], random_images(1, i)) for i, caption in enumerate(captions)]
    batch = batch_of([[doc] for doc in docs], 13)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(120):
        loss = model.nll(batch).mean()
        if loss < 0.02:
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    swapped = replace(batch, images=batch.images.flip(0))
    assert model.nll(batch).mean() < 0.1
    first_words = model.nll(swapped).detach()[[0, 6]]  # each row has 5 words and </s> to say
    assert (first_words > 1).all()


def test_dropout_acts_in_training_only(kosmos_tower):
    model, batch = tiny_model(kosmos_tower, dropout_rate=0.3), batch_of([[SECOND]], 11)
    assert torch.equal(model.nll(batch), model.nll(batch))
    model.train()
    torch.manual_seed(0)
    assert not torch.equal(model.nll(batch), model.nll(batch))


def test_computed_latents_follow_the_decoders_dtype(kosmos_tower):
    model, batch = tiny_model(kosmos_tower).bfloat16(), batch_of([[SECOND]], 11)
    assert model(batch).dtype == torch.bfloat16
    assert model.nll(batch).dtype == torch.float32
    assert model.nll(batch).isfinite().all()


def test_hidden_states_have_the_decoders_width(kosmos_tower):
    assert tiny_model(kosmos_tower)(batch_of([[FIRST], [SECOND]], T)).shape == (2, T, 20)


def test_a_models_weights_fit_a_model_of_equal_architecture(kosmos_tower):
    one, other = tiny_model(kosmos_tower, seed=1), tiny_model(kosmos_tower, seed=2, init="magneto", loss_chunk=7)
    assert one.config.architecture() == other.config.architecture()
    other.load_state_dict(one.state_dict())
    batch = batch_of([[FIRST]], T)
    assert torch.equal(logits(one, batch), logits(other, batch))


def test_the_loss_of_training_is_the_weighted_sum_of_what_each_token_costs(kosmos_tower):
    model, batch = tiny_model(kosmos_tower, loss_chunk=3), batch_of([[FIRST, SECOND], [THIRD]], T)
    weights = torch.linspace(0.1, 2, len(batch.loss_at))
    expected = (weights * model.nll(batch)).sum()
    gradients = torch.autograd.grad(expected, list(model.parameters()), allow_unused=True)
    loss, nll = model.loss(batch, weights)
    loss.backward()
    torch.testing.assert_close(nll, model.nll(batch).detach(), rtol=1e-6, atol=1e-6)  # fp32, in chunks
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)  # fp32
    for (name, parameter), gradient in zip(model.named_parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-5, msg=name)  # fp32, four blocks' sums
