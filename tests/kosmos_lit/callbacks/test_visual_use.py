"""The gauge separates a model that uses images from one that does not, and leaves the run as it is."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

from kosmos_lit.batch import KosmosBatch
from kosmos_lit.callbacks import Throughput, VisualUse
from kosmos_lit.callbacks.visual_use import shuffled_images
from kosmos_lit.cli import main
from kosmos_lit.errors import UserError
from tests.cli_runs import TINY, losses, run, tiny_run
from tests.kosmos_lit.callbacks.fake_run import FakeRun, Recorder
from tests.kosmos_lit.tiny_kosmos import SIDE, Doc, batch_of, image_doc, text_doc, tiny_config

TEXT, CAPTION, INTERLEAVED = range(3)
COLOUR = (0.2, 0.4, 0.6)
BLANK = torch.tensor([51, 102, 153])
MARK = 100
"""Added to an image's number, so that none is blank."""


def marked(*numbers: int, words: int = 5) -> Doc:
    """A document whose images are their numbers, all over."""
    doc = image_doc(words, n_images=len(numbers))
    random_images = torch.tensor(numbers).view(-1, 1, 1, 1).expand(-1, 3, SIDE, SIDE) + MARK
    return Doc(doc.ids, random_images.to(torch.uint8))


class Looker(nn.Module):
    """Stands for a model: a token's loss is 1 with its row's own image, 2 with another and 4 with a blank one.

    Row r of a batch owns the images 10 n + r. Tokens of rows without images cost 64.
    """

    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.5)
        self.frozen = nn.Dropout(0.5).eval()
        self.seen: list[tuple[int, bool]] = []

    def nll(self, batch: KosmosBatch) -> Tensor:
        self.seen.append((len(batch.images), self.dropout.training))
        self.dropout(torch.rand(3))  # random numbers that a run must not miss
        price = torch.full((len(batch.tokens),), 64.0)
        for (row, _), image in zip(batch.slots.tolist(), batch.images, strict=True):
            colour = image[:, 0, 0].long()
            own = (colour - MARK) % 10 == row
            price[row] = 4.0 if colour.equal(BLANK) else 1.0 if own.all() else 2.0
        return price[batch.loss_at // batch.tokens.shape[1]]


class Gauge:
    """A gauge on a run with given held-out batches."""

    def __init__(self, tower: str, held_out: Sequence[KosmosBatch], callback: VisualUse, **fields: Any) -> None:
        self.module = Recorder(tiny_config(tower, vision={"mean": COLOUR}))
        self.module.net = Looker()  # type: ignore[assignment]
        self.reads = 0
        self.printed: list[str] = []
        self.written: list[tuple[int, dict[str, float]]] = []
        logger = SimpleNamespace(log_metrics=lambda m, step: self.written.append((step, m)), save=lambda: None)
        kinds = fields.pop("kinds", {"text": TEXT, "caption": CAPTION, "interleaved": INTERLEAVED})
        data = SimpleNamespace(val_dataloader=lambda: self._read(held_out), kinds=kinds)
        defaults = {
            "limit_val_batches": 1.0,
            "loggers": [logger],
            "datamodule": data,
            "progress_bar_callback": SimpleNamespace(print=self.printed.append),
        }
        self.run = FakeRun(**(defaults | fields))
        self.run.trainer.strategy.validation_step = self.module.validation_step
        self.run.trainer.strategy.model = self.module
        self.module._trainer = self.run.trainer
        self.module.train()
        self.module.net.frozen.eval()
        self.callback = callback
        callback.on_train_start(self.run.trainer, self.module)

    def _read(self, held_out: Sequence[KosmosBatch]) -> Any:
        self.reads += 1
        torch.rand(1)  # a loader draws a seed for its processes
        yield from held_out

    def train(self, steps: int) -> None:
        for _ in range(steps):
            self.run.micro_batch(self.callback, self.module, batch_of([[text_doc(2)]], 5))


@pytest.fixture
def held_out() -> list[KosmosBatch]:
    """As a loader gives them: texts, then captions and texts, then pages."""
    texts = batch_of([[text_doc(7)], [text_doc(11)]], 31)
    captions = batch_of([[marked(10), marked(20)], [marked(11)], [text_doc(9)]], 31, corpus=[CAPTION, CAPTION, TEXT])
    pages = batch_of([[marked(30, 40)], [marked(31, 41)]], 31, corpus=[INTERLEAVED] * 2)
    return [texts, captions, pages]


def test_gains_are_what_other_and_blank_images_cost_a_token_of_rows_that_have_some(kosmos_tower: str) -> None:
    # rows of one image each, so that any other is of another row
    captions = batch_of([[marked(10)], [marked(11)], [text_doc(3)]], 31, corpus=[CAPTION, CAPTION, TEXT])
    pages = batch_of([[marked(10)], [marked(11)], [marked(12)]], 31, corpus=[INTERLEAVED] * 3)
    gauge = Gauge(kosmos_tower, [captions, pages], VisualUse(every_n_steps=2))
    gauge.train(2)

    [(step, metrics)] = gauge.written
    expected = {"true": 1.0, "blank": 4.0, "gain_blank": 3.0}
    names = ("true", "shuffled", "blank", "gain_shuffled", "gain_blank")
    assert step == 2
    assert set(metrics) == {f"val/visual_use/{corpus}/{name}" for corpus in ("caption", "interleaved") for name in names}
    for corpus in ("caption", "interleaved"):
        assert {name: metrics[f"val/visual_use/{corpus}/{name}"] for name in expected} == expected
        assert 1.5 <= metrics[f"val/visual_use/{corpus}/shuffled"] <= 2.0  # one may go to the same row of another batch
        assert metrics[f"val/visual_use/{corpus}/gain_shuffled"] == metrics[f"val/visual_use/{corpus}/shuffled"] - 1.0
    assert gauge.module.rows == [metrics]
    assert "caption +" in gauge.printed[0]
    assert "(+3.000 blank)" in gauge.printed[0]


def test_shuffling_moves_every_image_and_keeps_most_in_their_corpus() -> None:
    captions = batch_of([[marked(1), marked(2), marked(3)], [marked(4), marked(5)]], 37, corpus=[CAPTION] * 2)
    mixed = batch_of([[marked(6, 7)], [marked(8)]], 37, corpus=[INTERLEAVED, CAPTION])
    batches, kinds = [captions, mixed], {(0, i): CAPTION for i in range(5)} | {(1, 2): CAPTION}
    kinds |= {(1, 0): INTERLEAVED, (1, 1): INTERLEAVED}

    moved = {(b, i): other for b, row in enumerate(shuffled_images(batches)) for i, other in enumerate(row)}

    assert set(moved) == set(moved.values()) == set(kinds)
    assert all(place != other for place, other in moved.items())
    assert sum(kinds[place] != kinds[other] for place, other in moved.items()) == 2  # to the other corpus and back


def test_batches_of_one_image_each_are_shuffled_among_each_other(kosmos_tower: str) -> None:
    batches = [batch_of([[text_doc(3)]] * r + [[marked(10 + r)]], 31, corpus=[CAPTION] * (r + 1)) for r in range(3)]
    gauge = Gauge(kosmos_tower, batches, VisualUse(every_n_steps=2))
    gauge.train(2)

    assert gauge.written[0][1]["val/visual_use/caption/gain_shuffled"] == 1.0


def test_a_measurement_costs_three_passes_over_so_many_batches(kosmos_tower: str) -> None:
    captions = [batch_of([[marked(10)], [marked(11)]], 31, corpus=[CAPTION] * 2) for _ in range(5)]
    pages = [batch_of([[marked(20, 30)]], 31, corpus=[INTERLEAVED]) for _ in range(4)]
    gauge = Gauge(kosmos_tower, captions + pages, VisualUse(every_n_steps=2, batches=3))
    gauge.train(2)

    assert [n for n, _ in gauge.module.net.seen] == ([2] * 6) * 3  # type: ignore[attr-defined]


def test_rows_are_read_once(kosmos_tower: str, held_out: list[KosmosBatch]) -> None:
    gauge = Gauge(kosmos_tower, held_out, VisualUse(every_n_steps=2))
    gauge.train(6)

    assert gauge.reads == 1
    assert [step for step, _ in gauge.written] == [2, 4, 6]
    assert gauge.written[0][1] == gauge.written[2][1]


def test_a_reading_waits_for_a_row_of_the_log(kosmos_tower: str, held_out: list[KosmosBatch]) -> None:
    gauge = Gauge(kosmos_tower, held_out, VisualUse(every_n_steps=5), log_every_n_steps=3)
    gauge.train(20)

    assert [step for step, _ in gauge.written] == [6, 12, 15]


def test_a_resumed_run_measures_when_the_unbroken_one_does(kosmos_tower: str, held_out: list[KosmosBatch]) -> None:
    gauge = Gauge(kosmos_tower, held_out, VisualUse(every_n_steps=5), log_every_n_steps=3, global_step=7)
    gauge.train(13)

    assert [step for step, _ in gauge.written] == [12, 15]


def test_random_numbers_modes_and_validation_metrics_stay(kosmos_tower: str, held_out: list[KosmosBatch]) -> None:
    gauge = Gauge(kosmos_tower, held_out, VisualUse(every_n_steps=2))
    torch.manual_seed(3)
    expected = torch.rand(5)
    torch.manual_seed(3)
    gauge.train(2)

    assert torch.rand(5).equal(expected)
    assert {training for _, training in gauge.module.net.seen} == {False}  # type: ignore[attr-defined]
    modes = {name: module.training for name, module in gauge.module.named_modules()}
    assert modes == {name: name != "net.frozen" for name in modes}
    assert gauge.module.val_loss.tokens.sum() == 0


def test_modes_come_back_after_a_failure(kosmos_tower: str, held_out: list[KosmosBatch]) -> None:
    gauge = Gauge(kosmos_tower, held_out, VisualUse(every_n_steps=2))

    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory")

    gauge.run.trainer.strategy.validation_step = fail
    with pytest.raises(RuntimeError, match="out of memory"):
        gauge.train(2)
    assert gauge.module.net.dropout.training  # type: ignore[union-attr]


def test_the_throughput_does_not_count_a_measurement(kosmos_tower: str, held_out: list[KosmosBatch]) -> None:
    throughput = Throughput()
    gauge = Gauge(kosmos_tower, held_out, VisualUse(every_n_steps=2), callbacks=[throughput])
    throughput.clock = gauge.run.clock
    throughput.on_train_start(gauge.run.trainer, gauge.module)
    gauge.train(2)
    gauge.run.now += 40  # the time of the measurement
    throughput.on_train_batch_start(gauge.run.trainer, gauge.module, None, 0)
    gauge.run.now += 3

    assert throughput._elapsed + gauge.run.now - throughput._started == pytest.approx(2 + 3)


@pytest.mark.parametrize("fields", [{"kinds": {"text": TEXT, "more": TEXT}}, {"limit_val_batches": 0}])
def test_a_run_without_images_or_validation_logs_nothing(
    kosmos_tower: str, held_out: list[KosmosBatch], fields: dict[str, Any]
) -> None:
    gauge = Gauge(kosmos_tower, held_out, VisualUse(every_n_steps=2), **fields)
    gauge.train(4)

    assert (gauge.reads, gauge.written, gauge.printed) == (0, [], [])


def test_a_single_held_out_image_is_reported_as_too_few_once(kosmos_tower: str, caplog: pytest.LogCaptureFixture) -> None:
    one = [batch_of([[marked(10)]], 31, corpus=[CAPTION])]
    gauge = Gauge(kosmos_tower, one, VisualUse(every_n_steps=2))
    with caplog.at_level("INFO"):
        gauge.train(6)

    assert gauge.written == []
    assert [r.message for r in caplog.records if "VisualUse is off" in r.message] == [
        "VisualUse is off: no rank has two held-out images; raise a corpus's val_share"
    ]


def test_a_rank_without_images_takes_part_in_as_many_passes_as_the_others(kosmos_tower: str) -> None:
    texts = [batch_of([[text_doc(5)]], 31)] * 2
    gauge = Gauge(kosmos_tower, texts, VisualUse(every_n_steps=2), others=[[3.0]])
    gauge.train(2)

    assert [n for n, _ in gauge.module.net.seen] == [1] * 9  # type: ignore[attr-defined]
    assert gauge.written[0][1] == {}  # none of the metrics are this rank's


def test_a_filler_batch_replaces_no_image(kosmos_tower: str) -> None:
    captions = batch_of([[marked(10)], [marked(11)], [marked(12)]], 31, corpus=[CAPTION] * 3)
    gauge = Gauge(kosmos_tower, [captions], VisualUse(every_n_steps=2), others=[[3.0]])
    gauge.train(2)

    assert [n for n, _ in gauge.module.net.seen] == [3, 1, 1] * 3  # type: ignore[attr-defined]
    metrics = gauge.written[0][1]
    assert [metrics[f"val/visual_use/caption/{name}"] for name in ("true", "shuffled", "blank")] == [1, 2, 4]


@pytest.mark.parametrize("setting", [{"every_n_steps": 0}, {"batches": -1}])
def test_a_gauge_needs_steps_and_batches(setting: dict[str, int]) -> None:
    with pytest.raises(UserError, match="must be positive"):
        VisualUse(**setting)


# ---- whole runs


def with_gauge(folder: Path, **settings: int) -> list[str]:
    """Return flags that add a gauge to the tiny run."""
    callbacks = yaml.safe_load(Path(TINY).read_text(encoding="utf-8"))["trainer"]["callbacks"]
    callbacks.append({"class_path": "kosmos_lit.callbacks.VisualUse", "init_args": settings})
    path = folder / "gauge.yaml"
    path.write_text(yaml.safe_dump({"trainer": {"callbacks": callbacks}}), encoding="utf-8")
    return ["-c", str(path)]


def gauge_metrics(folder: Path) -> dict[int, dict[str, float]]:
    with (folder / "csv" / "version_0" / "metrics.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    prefix = "val/visual_use/"
    metrics = [(int(r["step"]), {k.removeprefix(prefix): float(v) for k, v in r.items() if prefix in k and v}) for r in rows]
    return {step: metrics_of_step for step, metrics_of_step in metrics if metrics_of_step}


def test_a_run_learns_the_same_with_a_gauge(trained: Path, tmp_path: Path, tiny_world: Path) -> None:
    assert main(tiny_run("fit", tmp_path, tiny_world, *with_gauge(tmp_path, every_n_steps=2, batches=2))) == 0

    assert losses(tmp_path) == losses(trained)
    metrics = gauge_metrics(tmp_path)
    assert list(metrics) == [2, 4, 6]
    for metrics_of_step in metrics.values():
        assert len(metrics_of_step) == 2 * 5  # captions and pages
        for corpus in ("caption", "interleaved"):
            for control in ("shuffled", "blank"):
                gain = metrics_of_step[f"{corpus}/{control}"] - metrics_of_step[f"{corpus}/true"]
                assert metrics_of_step[f"{corpus}/gain_{control}"] == pytest.approx(gain, abs=1e-6)  # of float32 sums


@pytest.mark.slow
def test_ranks_of_which_one_has_no_image_read_what_one_rank_does(tmp_path: Path, tiny_world: Path) -> None:
    still = ["--model.kosmos.decoder.dropout_rate=0", "--model.kosmos.decoder.attention_dropout_rate=0"]
    still += ["--model.kosmos.connector.attention_dropout_rate=0", "--data.val_rows=1", "--data.micro_batch_rows=1"]
    metrics = {}
    for ranks in (1, 4):  # held out are a row of text, one of captions and one of a page: two of four ranks have no image
        folder = tmp_path / str(ranks)
        folder.mkdir()
        flags = [*still, "--trainer.max_steps=3", *with_gauge(folder, every_n_steps=3)]
        flags += ["--trainer.devices=4", "--trainer.strategy=ddp"] if ranks > 1 else []
        end = run(tiny_run("fit", folder, tiny_world, *flags))
        assert end.returncode == 0, end.stderr
        metrics[ranks] = gauge_metrics(folder)

    assert list(metrics[4]) == list(metrics[1]) == [3]
    for name in ("caption/true", "interleaved/true", "caption/blank", "interleaved/blank"):
        # fp32 sums in another order, three Adam steps: see test_ranks
        assert metrics[4][3][name] == pytest.approx(metrics[1][3][name], rel=2e-4)
