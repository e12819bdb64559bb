"""A corpus's weight scales that corpus's part of the loss that is minimised, and nothing else."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.overrides import TorchFunctionMode

from kosmos_lit.batch import CORPORA, KosmosBatch
from kosmos_lit.cli import main
from kosmos_lit.config import LossWeights
from kosmos_lit.lit import KosmosLit
from tests.cli_runs import losses, tiny_run
from tests.kosmos_lit.tiny_kosmos import batch_of, image_doc, text_doc, tiny_config, tiny_model

TRAINER = SimpleNamespace(accumulate_grad_batches=3, world_size=2)
SHARE = 6
N_STEP_TARGETS = 101


def batch() -> KosmosBatch:
    """Rows of caption, text, interleaved, caption and instruct, with 5, 6, 9, 4 and 8 supervised tokens."""
    rows = [[image_doc(4, seed=1)], [text_doc(5, seed=2)], [image_doc(4, seed=3, n_images=2)], [image_doc(3, 4)]]
    micro_batch = batch_of([*rows, [text_doc(7, seed=5)]], 23, corpus=[1, 0, 2, 1, 3])
    micro_batch.n_step_targets = N_STEP_TARGETS
    return micro_batch


def step(tower: str, weights: LossWeights) -> tuple[KosmosLit, torch.Tensor]:
    lit = KosmosLit(tiny_config(tower), loss_weights=weights)
    lit.net = tiny_model(tower)
    lit.trainer = TRAINER
    loss = lit.training_step(batch(), 0)
    loss.backward()
    return lit, loss.detach()


def gradient(lit: KosmosLit) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in lit.net.parameters()])


def test_equal_weights_give_the_token_mean(kosmos_tower):
    lit, loss = step(kosmos_tower, LossWeights())
    model = tiny_model(kosmos_tower)
    expected = model.nll(batch()).sum() * (SHARE / N_STEP_TARGETS)
    expected.backward()
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-6, atol=0)  # fp32, 32 terms
    expected = torch.cat([p.grad.flatten() for p in model.parameters()])
    torch.testing.assert_close(gradient(lit), expected, rtol=1e-4, atol=1e-5)  # fp32, sums in another order


def test_each_weight_scales_its_corpus_and_leaves_the_count_of_tokens(kosmos_tower):
    nll = tiny_model(kosmos_tower).nll(batch()).detach()
    caption, text, interleaved, more, instruct = (part.sum() for part in nll.split([5, 6, 9, 4, 8]))
    _, loss = step(kosmos_tower, LossWeights(text=0.25, caption=3.0, interleaved=0.5, instruct=2.0))
    expected = (0.25 * text + 3 * (caption + more) + 0.5 * interleaved + 2 * instruct) * SHARE / N_STEP_TARGETS
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)  # fp32, 32 terms


class MadeFromNumbers(TorchFunctionMode):
    """Counts the tensors that are made of as many Python numbers as there are weights, each a copy to the device."""

    n = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.n += function is torch.tensor and len(args[0]) == len(CORPORA) and isinstance(args[0][0], float)
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("weights", [LossWeights(), LossWeights(caption=0.5)])
def test_a_second_micro_batch_copies_no_weights_to_the_device(kosmos_tower, weights):
    lit, _ = step(kosmos_tower, weights)
    rows = batch()
    with MadeFromNumbers() as counter:
        lit.training_step(rows, 1)
    assert counter.n == 0


def test_weights_keep_their_precision_in_a_half_precision_module_and_out_of_checkpoints(kosmos_tower):
    lit, _ = step(kosmos_tower, LossWeights(caption=0.3))
    weights = lit.bfloat16()._corpus_weights(torch.device("cpu"))
    assert torch.equal(weights, torch.tensor([1.0, 0.3, 1.0, 1.0]))
    assert all(name.startswith("net.") for name in lit.state_dict())


@pytest.mark.parametrize("corpus", CORPORA)
def test_a_gradient_is_the_sum_of_the_corpora_s_by_weight(kosmos_tower, corpus):
    alone = {name: gradient(step(kosmos_tower, only(name))[0]) for name in CORPORA}
    weights = dict.fromkeys(CORPORA, 1.0) | {corpus: 0.5}
    actual = gradient(step(kosmos_tower, LossWeights(**weights))[0])
    expected = sum(weights[name] * alone[name] for name in CORPORA)
    assert all(part.any() for part in alone.values())  # a corpus without a row would be equal whatever its weight is
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)  # fp32, values of about 1, sums reordered


def only(corpus: str) -> LossWeights:
    return LossWeights(**(dict.fromkeys(CORPORA, 0.0) | {corpus: 1.0}))


def test_logged_losses_are_not_weighted(kosmos_tower):
    plain, weighted = (step(kosmos_tower, w)[0].step_loss.compute() for w in (LossWeights(), LossWeights(caption=0.5)))
    assert plain.keys() == weighted.keys()
    assert all(torch.equal(plain[name], weighted[name]) for name in plain)


def test_a_checkpoint_remembers_the_weights(kosmos_tower):
    stored = KosmosLit(tiny_config(kosmos_tower), loss_weights=LossWeights(caption=0.5)).hparams["loss_weights"]
    assert stored == {"text": 1.0, "caption": 0.5, "interleaved": 1.0, "instruct": 1.0}
    assert KosmosLit(tiny_config(kosmos_tower), loss_weights=stored).loss_weights == LossWeights(caption=0.5)


def test_a_run_with_a_weight_reads_the_same_rows_and_learns_something_else(trained: Path, tiny_world: Path, tmp_path: Path):
    flags = ("--model.loss_weights.caption=0.5", "--trainer.max_steps=2")
    assert main(tiny_run("fit", tmp_path, tiny_world, *flags)) == 0
    plain, weighted = losses(trained), losses(tmp_path)
    assert weighted[1] == plain[1]  # what is logged is the stored loss, and both start from the same weights
    assert weighted[2] != plain[2]
