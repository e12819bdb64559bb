"""Rates are what was done by the time it took, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from kosmos_lit.batch import KosmosBatch
from kosmos_lit.callbacks import Throughput
from kosmos_lit.callbacks.throughput import matmul_precision
from kosmos_lit.costs.flops import ModelFlops, Work
from tests.kosmos_lit.callbacks.fake_run import FakeRun, Recorder
from tests.kosmos_lit.tiny_kosmos import batch_of, image_doc, text_doc, tiny_config


@pytest.fixture
def module(kosmos_tower: str) -> Recorder:
    return Recorder(tiny_config(kosmos_tower, vision={"trainable": "none"}), freeze=["decoder.embed_tokens"])


def begun(run: FakeRun, module: Recorder) -> Throughput:
    callback = Throughput()
    callback.clock = run.clock
    callback.on_train_start(run.trainer, module)
    return callback


@pytest.fixture
def texts() -> KosmosBatch:
    """Two rows of 31 positions, 53 of them real."""
    return batch_of([[text_doc(9), text_doc(16)], [text_doc(22)]], 31)


@pytest.fixture
def mixed() -> KosmosBatch:
    """Two rows of 31 positions, 41 of them real, and 3 images."""
    return batch_of([[image_doc(3, n_images=2)], [text_doc(5), image_doc(9)]], 31)


def test_rates_are_sums_over_micro_batches_by_the_seconds_since_the_row_before(
    module: Recorder, texts: KosmosBatch, mixed: KosmosBatch
) -> None:
    run = FakeRun()
    callback = begun(run, module)
    for batch, ends in ((texts, False), (mixed, True), (mixed, False), (mixed, True)):
        run.micro_batch(callback, module, batch, takes=2.0, ends=ends)

    [row] = module.rows  # a row every other step
    real = texts.n_real + 3 * mixed.n_real
    assert (texts.n_real, mixed.n_real) == (53, 18 + 7 + 16)
    assert row["tokens_per_second"] == pytest.approx(real / 8)
    assert row["images_per_second"] == pytest.approx(9 / 8)
    assert row["padding"] == pytest.approx(1 - real / (4 * 2 * 31))
    assert row["data_wait"] == 0


def test_model_operations_are_those_of_each_micro_batch(module: Recorder, texts: KosmosBatch, mixed: KosmosBatch) -> None:
    run = FakeRun()
    callback = begun(run, module)
    for batch in (texts, mixed):
        run.micro_batch(callback, module, batch, takes=0.5)

    model = ModelFlops(module.config, ["decoder.embed_tokens"])
    text = Work(n_tokens=53, n_pairs=11**2 + 18**2 + 24**2, n_targets=50, n_images=0)
    random_images = Work(n_tokens=41, n_pairs=18**2 + 7**2 + 16**2, n_targets=len(mixed.loss_at), n_images=3)
    cost = model.training(text) + model.training(random_images)
    assert module.rows[0]["tflops"] == pytest.approx(cost.total / 1.0 / 1e12)
    assert module.rows[0]["tflops_full"] == pytest.approx(cost.full / 1.0 / 1e12)
    assert module.rows[0]["tflops"] < module.rows[0]["tflops_full"]


def test_waiting_for_the_loader_is_its_share_of_the_time(module: Recorder, texts: KosmosBatch) -> None:
    run = FakeRun()
    callback = begun(run, module)
    for wait in (0.5, 1.5, 0.0, 1.0):
        run.micro_batch(callback, module, texts, wait=wait, takes=3.0)

    assert [row["data_wait"] for row in module.rows] == pytest.approx([2 / 8, 1 / 7])
    assert [row["tokens_per_second"] for row in module.rows] == pytest.approx([2 * 53 / 8, 2 * 53 / 7])


@pytest.mark.parametrize("pause", ["validation", "checkpoint", "gauge"])
def test_pauses_do_not_count_and_the_wait_after_them_does(module: Recorder, texts: KosmosBatch, pause: str) -> None:
    run = FakeRun()
    callback = begun(run, module)
    run.micro_batch(callback, module, texts)
    if pause == "validation":
        callback.on_validation_start(run.trainer, module)
    elif pause == "checkpoint":
        callback.on_save_checkpoint(run.trainer, module, {})
    else:
        callback.pause(run.trainer)
    run.now += 500
    run.micro_batch(callback, module, texts, wait=2.0)

    [row] = module.rows
    assert row["tokens_per_second"] == pytest.approx(2 * 53 / 4)
    assert row["data_wait"] == pytest.approx(2 / 4)


def test_a_pause_within_a_pause_counts_once(module: Recorder, texts: KosmosBatch) -> None:
    run = FakeRun()
    callback = begun(run, module)
    run.micro_batch(callback, module, texts)
    callback.on_validation_start(run.trainer, module)
    run.now += 70
    callback.on_save_checkpoint(run.trainer, module, {})
    run.now += 50
    run.micro_batch(callback, module, texts)

    assert module.rows[0]["tokens_per_second"] == pytest.approx(2 * 53 / 2)


def test_a_pause_after_a_row_belongs_to_no_row(module: Recorder, texts: KosmosBatch) -> None:
    run = FakeRun()
    callback = begun(run, module)
    for _ in range(2):
        run.micro_batch(callback, module, texts)
    callback.on_save_checkpoint(run.trainer, module, {})
    run.now += 30
    for _ in range(2):
        run.micro_batch(callback, module, texts)

    assert [row["tokens_per_second"] for row in module.rows] == pytest.approx([53, 53])


def test_writing_a_row_is_time_of_the_next(module: Recorder, texts: KosmosBatch) -> None:
    run = FakeRun()
    callback = begun(run, module)
    for _ in range(2):
        run.micro_batch(callback, module, texts)
    run.now += 2.0  # a slow logger
    for _ in range(2):
        run.micro_batch(callback, module, texts)

    assert [row["tokens_per_second"] for row in module.rows] == pytest.approx([53, 2 * 53 / 4])


def test_ranks_are_added_up_and_the_slowest_and_fullest_counts(module: Recorder, texts: KosmosBatch) -> None:
    # real positions, positions, images, operations, full operations, waited, memory
    run = FakeRun([[47.0, 124, 5, 3e12, 4e12, 1.75, 1e15]])
    callback = begun(run, module)
    for _ in range(2):
        run.micro_batch(callback, module, texts, wait=0.25, takes=2.25)

    [row], own = module.rows, ModelFlops(module.config, module.frozen).training(Work.of_batch(texts))
    assert row["tokens_per_second"] == pytest.approx((2 * 53 + 47) / 5)
    assert row["images_per_second"] == pytest.approx(5 / 5)
    assert row["padding"] == pytest.approx(1 - (2 * 53 + 47) / (2 * 62 + 124))
    assert row["tflops"] == pytest.approx((2 * own.total + 3e12) / 5 / 2 / 1e12)  # of one device
    assert row["data_wait"] == pytest.approx(1.75 / 5)
    assert row["memory/resident"] == 1e15


def seconds_left_per_step(module: Recorder, batch: KosmosBatch, row_seconds: Sequence[float]) -> list[float]:
    """Return the seconds a step that the time left of each row assumes; `row_seconds` is what each row's only step took."""
    run = FakeRun(max_steps=1000, log_every_n_steps=1)
    callback = begun(run, module)
    for seconds in row_seconds:
        run.micro_batch(callback, module, batch, takes=seconds)
    return [row["seconds_left"] / (1000 - step) for step, row in enumerate(module.rows, start=1)]


def test_time_left_is_that_of_all_steps_to_come(module: Recorder, texts: KosmosBatch) -> None:
    run = FakeRun(max_steps=20)  # a row every other step
    callback = begun(run, module)
    for seconds in (90, 1, 1, 1, 2, 4):
        run.micro_batch(callback, module, texts, takes=seconds)

    assert [row["seconds_left"] for row in module.rows] == pytest.approx([18 * 45.5, 16 * 1, 14 * 1])


def test_time_left_forgets_the_first_row(module: Recorder, texts: KosmosBatch) -> None:
    assert seconds_left_per_step(module, texts, [90, 1, 1]) == pytest.approx([90, 1, 1])  # compilation


@pytest.mark.parametrize("n_usual", [1, 2, 3, 4, 30])
def test_time_left_ignores_one_slow_row(n_usual: int, module: Recorder, texts: KosmosBatch) -> None:
    usual = [1.0, 1.06, 0.97, 1.03, 0.98]  # of a quiet machine
    rows = [usual[i % 5] for i in range(n_usual)]
    estimates = seconds_left_per_step(module, texts, [9.0, *rows, 50.0, *usual, *usual])

    assert estimates[1:] == pytest.approx([1.0] * (n_usual + 11), rel=0.07)


@pytest.mark.parametrize("factor", [10.0, 0.1])
def test_time_left_follows_a_lasting_change_within_three_rows(factor: float, module: Recorder, texts: KosmosBatch) -> None:
    usual = [1.0, 1.06, 0.97, 1.03, 0.98]
    changed = [factor * seconds for seconds in (1.1, 0.9, 1.0, 1.15, 0.85, 1.05)]
    estimates = seconds_left_per_step(module, texts, [9.0, *usual * 6, *changed])

    assert estimates[-6:-4] == pytest.approx([1.0] * 2, rel=0.1)  # two rows could be a disturbance
    assert estimates[-4:] == pytest.approx([factor] * 4, rel=0.25)


def test_a_run_without_end_has_no_time_left(module: Recorder, texts: KosmosBatch) -> None:
    run = FakeRun(max_steps=-1)
    callback = begun(run, module)
    for _ in range(2):
        run.micro_batch(callback, module, texts)

    assert "seconds_left" not in module.rows[0]


def test_a_resumed_run_counts_from_where_it_goes_on(module: Recorder, texts: KosmosBatch) -> None:
    run = FakeRun(global_step=7, max_steps=10)
    run.trainer.train_dataloader.waited_seconds = 33.0
    run.now += 600  # until training starts
    callback = begun(run, module)
    run.micro_batch(callback, module, texts, wait=1.0, takes=1.0)

    [row] = module.rows
    assert row["tokens_per_second"] == pytest.approx(53 / 2)
    assert row["data_wait"] == pytest.approx(0.5)
    assert row["seconds_left"] == pytest.approx(2 * 2)


def test_memory_is_the_process_where_there_is_no_device_memory(module: Recorder, texts: KosmosBatch) -> None:
    run = FakeRun(log_every_n_steps=1)
    run.micro_batch(begun(run, module), module, texts)

    assert 50e6 < module.rows[0]["memory/resident"] < 1e12  # PyTorch alone is more, and kibibytes or pages would be less
    assert "peak_share" not in module.rows[0]


class FakeGpu:
    """Stands for one CUDA device."""

    def __init__(self, patch: pytest.MonkeyPatch, name: str) -> None:
        self.waits = 0
        patch.setattr(torch.cuda, "get_device_name", lambda device: name)
        patch.setattr(torch.cuda, "synchronize", self._synchronize)
        patch.setattr(torch.cuda, "max_memory_allocated", lambda device: 7_000)
        patch.setattr(torch.cuda, "max_memory_reserved", lambda device: 11_000)

    def _synchronize(self, device: Any) -> None:
        self.waits += 1


def on_gpu(patch: pytest.MonkeyPatch, name: str, **fields: Any) -> tuple[FakeRun, FakeGpu]:
    run = FakeRun(**fields)
    run.trainer.strategy.root_device = torch.device("cuda", 0)
    return run, FakeGpu(patch, name)


def test_the_share_of_the_peak_is_that_of_the_device_and_precision(
    module: Recorder, texts: KosmosBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, _ = on_gpu(monkeypatch, "NVIDIA H200", precision="bf16-mixed")
    callback = begun(run, module)
    for _ in range(2):
        run.micro_batch(callback, module, texts)

    [row] = module.rows
    assert row["peak_share"] == pytest.approx(row["tflops"] / 989.4)
    assert (row["memory/allocated"], row["memory/reserved"]) == (7_000, 11_000)
    assert "memory/resident" not in row


def test_an_unknown_device_has_no_share(module: Recorder, texts: KosmosBatch, monkeypatch: pytest.MonkeyPatch) -> None:
    run, _ = on_gpu(monkeypatch, "NVIDIA Next", precision="bf16-mixed", log_every_n_steps=1)
    run.micro_batch(begun(run, module), module, texts)

    assert "peak_share" not in module.rows[0]
    assert module.rows[0]["tflops"] > 0


def test_the_device_is_waited_for_at_rows_and_pauses_alone(
    module: Recorder, texts: KosmosBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, gpu = on_gpu(monkeypatch, "NVIDIA H200", log_every_n_steps=5)
    callback = begun(run, module)
    for _ in range(4):
        run.micro_batch(callback, module, texts)
    assert gpu.waits == 0
    callback.on_validation_start(run.trainer, module)
    run.micro_batch(callback, module, texts)
    assert gpu.waits == 2


@pytest.mark.parametrize(
    ("precision", "multiplied"),
    [("bf16-mixed", "bf16"), ("bf16-true", "bf16"), ("16-mixed", "fp16"), ("64-true", None), ("32-true", "fp32")],
)
def test_a_precision_says_what_is_multiplied(precision: str, multiplied: str | None) -> None:
    assert matmul_precision(precision) == multiplied


def test_float32_is_multiplied_in_tf32_where_that_is_allowed() -> None:
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        assert matmul_precision("32-true") == "tf32"
    finally:
        torch.set_float32_matmul_precision(before)
