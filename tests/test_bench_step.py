"""benchmarks/step.py and made_batches.py: both sides get the same documents, and must agree before they are timed."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from benchmarks.made_batches import Made, n_targets
from benchmarks.step import (
    KINDS,
    Side,
    Step,
    arguments,
    check,
    compare,
    make_model,
    make_step,
    make_theirs,
    our_loss,
    profiled,
    run,
    their_loss,
)
from kosmos_lit.batch import check_slots
from kosmos_lit.model import Kosmos
from kosmos_lit.tokenizer import IGNORE, PAD, SpecialTokens

VOCAB, SEQ_LEN, SIDE, LATENTS = 1200, 512, 28, 64
MADE = Made(SpecialTokens.for_pieces(VOCAB - 1037), LATENTS, SIDE, SEQ_LEN)


@pytest.fixture(scope="module")
def model() -> Kosmos:
    return make_model("micro", VOCAB, SEQ_LEN, SIDE)


@pytest.fixture(scope="module")
def step(model: Kosmos) -> Step:
    return make_step(model, MADE, (1, 2, 1), micro_rows=2, short_text=False)


def sides(model: Kosmos, step: Step) -> tuple[Side, Side]:
    theirs = make_theirs(model)
    return Side(model, our_loss, step.ours, step.n_targets), Side(theirs, their_loss, step.theirs, step.n_targets)


@pytest.mark.parametrize("kind", KINDS)
def test_made_rows_hold_what_a_batch_owes_the_model(kind: str) -> None:
    rows = MADE.rows(kind, 3, np.random.default_rng(0))
    batch = MADE.batch(rows)

    special = MADE.special
    check_slots(batch.tokens, batch.slots, len(batch.images), LATENTS, special.image, special.image_end)
    assert sum(batch.lengths) == 3 * SEQ_LEN
    assert batch.n_real == 3 * SEQ_LEN - sum(batch.padding)
    assert len(batch.loss_at) == n_targets(rows) == batch.n_step_targets
    in_slots = batch.tokens.eq(special.image)
    assert batch.targets[in_slots].eq(IGNORE).all()
    assert not batch.targets.eq(special.image).any()  # the position before an image predicts nothing


@pytest.mark.parametrize("kind", KINDS)
def test_a_target_is_the_next_token_wherever_there_is_one(kind: str) -> None:
    [[document, *_]] = MADE.rows(kind, 1, np.random.default_rng(1))

    here = document.targets[:-1] != IGNORE
    assert here.sum() > 10
    np.testing.assert_array_equal(document.targets[:-1][here], document.tokens[1:][here])


def test_short_texts_fill_rows_to_the_last_position() -> None:
    rows = MADE.rows("text", 3, np.random.default_rng(0), short_text=True)

    assert [sum(len(document.tokens) for document in row) for row in rows] == [SEQ_LEN] * 3
    assert max(map(len, rows)) > 1


def test_both_sides_are_given_the_same_documents(step: Step) -> None:
    ours: Counter[tuple[int, ...]] = Counter()
    for _, batch in step.ours:
        stream, at = batch.tokens.flatten().tolist(), 0
        for length in batch.lengths:
            ours[tuple(stream[at : at + length])] += 1
            at += length
    theirs = Counter(
        tuple(ids[keep.bool()].tolist())
        for _, batch in step.theirs
        for ids, keep in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    )

    assert theirs == Counter({document: n for document, n in ours.items() if document[0] != PAD})


def test_transformers_comes_to_the_same_loss_and_gradient(model: Kosmos, step: Step) -> None:
    found = check(*sides(model, step))

    assert found["loss"] == pytest.approx(found["loss of theirs"], rel=1e-5)  # float32, sums of 1,000 terms
    assert found["gradient norm"] == pytest.approx(found["gradient norm of theirs"], rel=1e-4)


def test_sides_that_compute_different_things_are_not_timed(model: Kosmos, step: Step) -> None:
    ours, theirs = sides(model, step)
    with torch.no_grad():
        theirs.model.text_model.model.layer_norm.weight.mul_(1.5)

    with pytest.raises(SystemExit, match="the losses of the two sides differ"):
        check(ours, theirs)


def test_what_is_frozen_here_is_frozen_there(model: Kosmos) -> None:
    theirs = make_theirs(model)

    trained = [sum(p.numel() for p in m.parameters() if p.requires_grad) for m in (model, theirs)]
    assert trained[0] == trained[1] < sum(p.numel() for p in model.parameters())


def test_the_table_has_a_line_for_each_corpus_and_for_all(model: Kosmos, step: Step) -> None:
    lines = {line["part"]: line for line in compare(step, *sides(model, step), n_rounds=1)}

    assert list(lines) == [*KINDS, "optimizer", "mixture"]
    assert lines["mixture"]["tokens"] == sum(lines[kind]["tokens"] for kind in KINDS)
    assert lines["caption"]["theirs, padding"] > 0
    assert lines["mixture"]["asked"] == 1.3


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch.profiler looks for devices
def test_the_command_runs_and_profiles(model: Kosmos, step: Step, capsys: pytest.CaptureFixture[str]) -> None:
    flags = f"--size micro --vocab {VOCAB} --seq-len {SEQ_LEN} --side {SIDE} --rows 1 1 1 --rounds 1 --threads 1 --profile 3"
    figures = run(arguments().parse_args(flags.split()))

    assert figures["threads"][1][-1]["ratio"] > 0
    assert capsys.readouterr().out.count("Self CPU time total") == 2
    assert "aten::mm" in profiled(sides(model, step)[0], 100)
