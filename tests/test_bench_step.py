"""benchmarks/step.py and synthetic_batches.py: both models read the same documents and must agree before they are timed."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from benchmarks.step import (
    KINDS,
    Step,
    TrainLoop,
    arguments,
    check,
    compare,
    kosmos_loss,
    make_model,
    make_step,
    make_transformers,
    profiled,
    run,
    transformers_loss,
)
from benchmarks.synthetic_batches import SyntheticBatches, n_targets
from kosmos_lit.batch import check_slots
from kosmos_lit.model import Kosmos
from kosmos_lit.tokenizer import IGNORE, PAD, SpecialTokens

VOCAB, SEQ_LEN, IMAGE_SIZE, LATENTS = 1200, 512, 28, 64
SYNTHETIC = SyntheticBatches(SpecialTokens.for_pieces(VOCAB - 1037), LATENTS, IMAGE_SIZE, SEQ_LEN)


@pytest.fixture(scope="module")
def model() -> Kosmos:
    return make_model("micro", VOCAB, SEQ_LEN, IMAGE_SIZE)


@pytest.fixture(scope="module")
def step(model: Kosmos) -> Step:
    return make_step(model, SYNTHETIC, (1, 2, 1), micro_rows=2, short_text=False)


def loops(model: Kosmos, step: Step) -> tuple[TrainLoop, TrainLoop]:
    return (
        TrainLoop(model, kosmos_loss, step.packed, step.n_targets),
        TrainLoop(make_transformers(model), transformers_loss, step.padded, step.n_targets),
    )


@pytest.mark.parametrize("kind", KINDS)
def test_synthetic_rows_keep_the_contract_of_a_batch(kind: str) -> None:
    rows = SYNTHETIC.rows(kind, 3, np.random.default_rng(0))
    batch = SYNTHETIC.batch(rows)

    special = SYNTHETIC.special
    check_slots(batch.tokens, batch.slots, len(batch.images), LATENTS, special.image, special.image_end)
    assert sum(batch.lengths) == 3 * SEQ_LEN
    assert batch.n_real == 3 * SEQ_LEN - sum(batch.padding)
    assert len(batch.loss_at) == n_targets(rows) == batch.n_step_targets
    in_slots = batch.tokens.eq(special.image)
    assert batch.targets[in_slots].eq(IGNORE).all()
    assert not batch.targets.eq(special.image).any()  # the position before an image predicts nothing


@pytest.mark.parametrize("kind", KINDS)
def test_a_target_is_the_next_token_wherever_there_is_one(kind: str) -> None:
    [[document, *_]] = SYNTHETIC.rows(kind, 1, np.random.default_rng(1))

    supervised = document.targets[:-1] != IGNORE
    assert supervised.sum() > 10
    np.testing.assert_array_equal(document.targets[:-1][supervised], document.tokens[1:][supervised])


def test_short_texts_fill_rows_to_the_last_position() -> None:
    rows = SYNTHETIC.rows("text", 3, np.random.default_rng(0), short_text=True)

    assert [sum(len(document.tokens) for document in row) for row in rows] == [SEQ_LEN] * 3
    assert max(map(len, rows)) > 1


def test_both_models_read_the_same_documents(step: Step) -> None:
    packed: Counter[tuple[int, ...]] = Counter()
    for _, batch in step.packed:
        stream, at = batch.tokens.flatten().tolist(), 0
        for length in batch.lengths:
            packed[tuple(stream[at : at + length])] += 1
            at += length
    padded = Counter(
        tuple(ids[keep.bool()].tolist())
        for _, batch in step.padded
        for ids, keep in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    )

    assert padded == Counter({document: n for document, n in packed.items() if document[0] != PAD})


def test_transformers_computes_the_same_loss_and_gradient(model: Kosmos, step: Step) -> None:
    results = check(*loops(model, step))

    assert results["loss"] == pytest.approx(results["transformers, loss"], rel=1e-5)  # float32, sums of 1,000 terms
    assert results["gradient norm"] == pytest.approx(results["transformers, gradient norm"], rel=1e-4)


def test_models_that_compute_different_losses_are_not_timed(model: Kosmos, step: Step) -> None:
    kosmos, transformers = loops(model, step)
    with torch.no_grad():
        transformers.model.text_model.model.layer_norm.weight.mul_(1.5)

    with pytest.raises(SystemExit, match=r"the losses differ: .* in kosmos-lit, .* in transformers"):
        check(kosmos, transformers)


def test_the_model_in_transformers_freezes_the_same_parameters(model: Kosmos) -> None:
    models = (model, make_transformers(model))
    trained = [sum(p.numel() for p in m.parameters() if p.requires_grad) for m in models]

    assert trained[0] == trained[1] < sum(p.numel() for p in model.parameters())


def test_the_table_has_a_line_for_each_corpus_and_for_all(model: Kosmos, step: Step) -> None:
    lines = {line["part"]: line for line in compare(step, *loops(model, step), n_rounds=1)}

    assert list(lines) == [*KINDS, "optimizer", "mixture"]
    assert lines["mixture"]["tokens"] == sum(lines[kind]["tokens"] for kind in KINDS)
    assert lines["caption"]["transformers, padding"] > 0
    assert lines["mixture"]["required"] == 1.3


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch.profiler looks for devices
def test_the_command_runs_and_profiles(model: Kosmos, step: Step, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = f"--size micro --vocab {VOCAB} --seq-len {SEQ_LEN} --image-size {IMAGE_SIZE}"
    flags = f"{sizes} --rows 1 1 1 --rounds 1 --threads 1 --profile 3"
    results = run(arguments().parse_args(flags.split()))

    assert results["threads"][1][-1]["ratio"] > 0
    assert capsys.readouterr().out.count("Self CPU time total") == 2
    assert "aten::mm" in profiled(loops(model, step)[0], 100)
