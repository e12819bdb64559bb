"""The check before the first step detects leaks between documents, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kosmos_lit.batch import check_slots
from kosmos_lit.checks.leaks import N_ROWS, evaluation_mode, find_leak, perturbations, probe_batch
from kosmos_lit.errors import UserError
from kosmos_lit.layers import attention
from kosmos_lit.model import Kosmos
from kosmos_lit.ops import masks
from tests.kosmos_lit.tiny_kosmos import LATENTS, SPECIAL, tiny_config, tiny_model

T, CPU = 61, torch.device("cpu")


def leak_of(model: Kosmos, row_len: int = T) -> str | None:
    return find_leak(model, row_len, SPECIAL)


def replace_kernel(monkeypatch: pytest.MonkeyPatch, kernel: Any) -> None:
    """Replace `attend` by attention under a mask of the test's own."""

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: masks.DocumentMask, **_: object) -> Tensor:
        return masked(q, k, v, kernel(mask))

    monkeypatch.setattr(attention, "attend", attend)


def masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    scores = torch.einsum("bqhk,bshk->bhqs", q, k).masked_fill(~mask, float("-inf"))
    return torch.einsum("bhqs,bshk->bqhk", scores.softmax(-1), v)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("kernel", ["auto", "sdpa", "flex", "reference"])
@pytest.mark.parametrize("within", ["own", "row"])
@pytest.mark.parametrize("row_len", [61, 29, 7])
def test_a_kernel_that_keeps_documents_apart_passes(kosmos_tower: str, kernel: str, within: str, row_len: int) -> None:
    assert leak_of(tiny_model(kosmos_tower, attention_kernel=kernel, document_attention=within), row_len) is None


def test_an_untrained_model_passes(kosmos_tower: str) -> None:
    assert leak_of(Kosmos.create(tiny_config(kosmos_tower, dropout_rate=0.3, attention_dropout_rate=0.3))) is None


def test_a_model_in_16_bits_passes(kosmos_tower: str) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert leak_of(tiny_model(kosmos_tower)) is None


def test_a_kernel_that_forgets_the_documents_is_detected(kosmos_tower: str, monkeypatch: pytest.MonkeyPatch) -> None:
    replace_kernel(monkeypatch, lambda mask: masks.causal(T, T, CPU))
    assert "document 1 of row 0 change" in str(leak_of(tiny_model(kosmos_tower)))


def test_one_boundary_that_is_off_by_one_is_detected(kosmos_tower: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def shifted(mask: masks.DocumentMask) -> Tensor:
        lengths = list(mask.lengths)
        lengths[-3:-1] = [lengths[-3] + 1, lengths[-2] - 1]  # the last document's first position belongs to the one before
        return masks.DocumentMask(lengths, mask.n_rows, mask.row_len, CPU).dense

    replace_kernel(monkeypatch, shifted)
    assert "of row 1" in str(leak_of(tiny_model(kosmos_tower)))


def test_a_document_of_the_row_that_sees_a_later_one_is_detected(kosmos_tower: str, monkeypatch: pytest.MonkeyPatch) -> None:
    replace_kernel(monkeypatch, lambda mask: torch.ones(1, 1, T, T, dtype=torch.bool))
    leak = str(leak_of(tiny_model(kosmos_tower, document_attention="row")))
    assert leak.startswith("the losses of document 0 of row 0 change")
    assert leak.endswith("with the tokens of document 1 of row 0")


def test_an_image_in_anothers_slots_is_detected(kosmos_tower: str) -> None:
    model = tiny_model(kosmos_tower)
    encode = model.encode_images
    model.encode_images = lambda images: encode(images).roll(1, 0)  # type: ignore[method-assign]
    assert "with the images of document 0 of row 0" in str(leak_of(model))


def test_a_model_that_ignores_its_tokens_is_detected(kosmos_tower: str) -> None:
    model = tiny_model(kosmos_tower)
    torch.nn.init.zeros_(model.decoder.embed_tokens.weight)
    assert leak_of(model) == "the losses of document 0 of row 0 stay the same when its own tokens change"


def test_losses_that_are_no_numbers_are_the_users_error(kosmos_tower: str) -> None:
    model = tiny_model(kosmos_tower)
    torch.nn.init.constant_(model.decoder.layer_norm.weight, float("nan"))
    with pytest.raises(UserError, match="not finite before the first step"):
        leak_of(model)


def test_a_kernel_that_refuses_the_tensors_is_the_users_error(kosmos_tower: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(mask: masks.DocumentMask) -> Tensor:
        raise NotImplementedError("no operator for heads of 4")

    replace_kernel(monkeypatch, refuse)
    with pytest.raises(UserError, match=r"auto does not run here .no operator for heads of 4.; set it to sdpa"):
        leak_of(tiny_model(kosmos_tower))


def test_the_probe_batch_keeps_the_contract(kosmos_tower: str) -> None:
    batch, documents = probe_batch(tiny_config(kosmos_tower), T, SPECIAL, CPU)
    check_slots(batch.tokens, batch.slots, len(batch.images), LATENTS, SPECIAL.image, SPECIAL.image_end)
    assert sum(batch.lengths) == N_ROWS * T
    assert len(batch.images) == len(documents) == 6
    assert torch.equal(batch.loss_at, (batch.targets.flatten() != -100).nonzero().flatten())


def test_a_perturbation_stays_in_its_document(kosmos_tower: str) -> None:
    batch, documents = probe_batch(tiny_config(kosmos_tower), T, SPECIAL, CPU)
    (first, with_tokens), (second, images) = perturbations(batch, documents[1], SPECIAL)
    assert (first, second) == ("tokens", "images")
    differs = (with_tokens.tokens != batch.tokens).flatten()
    assert differs.nonzero().min() >= documents[1].span.start
    assert differs.nonzero().max() < documents[1].span.stop
    assert int(differs.sum()) == documents[1].span.stop - documents[1].span.start - (LATENTS + 2)  # all but the image
    assert [not torch.equal(a, b) for a, b in zip(images.images, batch.images, strict=True)] == [0, 1, 0, 0, 0, 0]


def test_each_module_returns_to_its_own_mode(kosmos_tower: str) -> None:
    model = tiny_model(kosmos_tower).train()
    model.vision.eval()
    modes = [m.training for m in model.modules()]
    with evaluation_mode(model):
        assert not any(m.training for m in model.modules())
    assert [m.training for m in model.modules()] == modes
