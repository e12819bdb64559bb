import math
from dataclasses import replace

import pytest
import torch

from kosmos_lit.corpus_loss import CorpusLoss
from tests.kosmos_lit.tiny_kosmos import batch_of, text_doc

BATCH = replace(
    batch_of([[text_doc(1)], [text_doc(3)], [text_doc(2)]], 7, corpus=[0, 2, 0]),  # 2, 4 and 3 targets
    n_bytes=torch.tensor([5, 13, 6]),
)
NLL = torch.tensor([1.0, 2.0, 3.0, 5.0, 7.0, 11.0, 13.0, 17.0, 19.0])


def computed(*updates) -> dict[str, float]:
    metric = CorpusLoss()
    for nll, batch in updates:
        metric.update(nll, batch)
    return {name: float(value) for name, value in metric.compute().items()}


def test_losses_are_means_over_tokens_of_each_corpus_and_of_all():
    metrics = computed((NLL, BATCH))
    assert metrics["loss"] == pytest.approx(78 / 9)
    assert metrics["loss/text"] == pytest.approx((1 + 2 + 13 + 17 + 19) / 5)
    assert metrics["loss/interleaved"] == pytest.approx((3 + 5 + 7 + 11) / 4)


def test_bits_are_counted_per_byte_of_text():
    metrics = computed((NLL, BATCH))
    assert metrics["bits_per_byte/text"] == pytest.approx(52 / math.log(2) / 11)
    assert metrics["bits_per_byte/interleaved"] == pytest.approx(26 / math.log(2) / 13)


def test_a_corpus_that_did_not_occur_is_left_out():
    assert computed((NLL, BATCH)).keys() == {
        "loss",
        "loss/text",
        "bits_per_byte/text",
        "loss/interleaved",
        "bits_per_byte/interleaved",
    }


def test_batches_add_up_by_their_tokens():
    one = replace(batch_of([[text_doc(1)]], 7, corpus=[0]), n_bytes=torch.tensor([4]))
    metrics = computed((NLL, BATCH), (torch.tensor([4.0, 6.0]), one))
    assert metrics["loss"] == pytest.approx(88 / 11)
    assert metrics["loss/text"] == pytest.approx(62 / 7)
    assert metrics["bits_per_byte/text"] == pytest.approx(62 / math.log(2) / 15)


def test_a_row_that_only_fills_up_counts_for_nothing():
    filled = replace(batch_of([[text_doc(1)], []], 7, corpus=[1, -1]), n_bytes=torch.tensor([4, 0]))
    metrics = computed((torch.tensor([4.0, 6.0]), filled))
    assert metrics == pytest.approx({"loss": 5.0, "loss/caption": 5.0, "bits_per_byte/caption": 10 / math.log(2) / 4})


def test_millions_of_tokens_lose_no_digits():
    metric = CorpusLoss()
    metric.update(NLL, BATCH)
    metric.nll += 2**25  # float32 would swallow the next batch's odd nats
    before = float(metric.nll[0])
    metric.update(NLL, BATCH)
    assert float(metric.nll[0]) - before == 52


def test_sums_keep_their_digits_in_a_module_of_low_precision():
    metric = CorpusLoss()
    metric.set_dtype(torch.bfloat16)  # what Lightning's true half precision does to the modules of a model
    for _ in range(101):
        metric.update(NLL, BATCH)
    assert float(metric.compute()["loss"]) == pytest.approx(78 / 9, rel=1e-12)


def test_a_reset_forgets_everything():
    metric = CorpusLoss()
    metric.update(NLL * 3, BATCH)
    metric.reset()
    metric.update(NLL, BATCH)
    assert float(metric.compute()["loss"]) == pytest.approx(78 / 9)


def test_no_gradient_is_kept():
    metric = CorpusLoss()
    metric.update(NLL.clone().requires_grad_(), BATCH)
    assert not metric.nll.requires_grad
