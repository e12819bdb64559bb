"""An evaluation stores its results, continues after an interruption, and refuses results of another one."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kosmos_lit.errors import UserError
from kosmos_lit.evaluation.config import EvalConfig
from kosmos_lit.evaluation.requests import LogLikelihood
from kosmos_lit.evaluation.results import Result
from kosmos_lit.evaluation.runner import evaluate, read_samples
from kosmos_lit.evaluation.scheduler import RequestScheduler
from kosmos_lit.evaluation.storage import weights_digest
from kosmos_lit.evaluation.task import Sample, limit_samples
from kosmos_lit.inference.engine import Engine
from kosmos_lit.model import Kosmos
from kosmos_lit.tokenizer import Tokenizer
from tests.kosmos_lit.evaluation.toy_tasks import TwoRounds, draw_images
from tests.kosmos_lit.tiny_kosmos import tiny_model


@pytest.fixture
def model(kosmos_tower: str) -> Kosmos:
    return tiny_model(kosmos_tower)


@pytest.fixture
def task(tmp_path: Path) -> TwoRounds:
    draw_images(tmp_path / "images", 5)
    return TwoRounds(str(tmp_path / "images"), n=11)


def lines(folder: Path, task: str = "rounds") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / task / "samples.jsonl").read_text().splitlines()]


def test_results_are_in_the_samples_order_and_metrics_are_their_means(
    model: Kosmos, kosmos_tokenizer: Tokenizer, task: TwoRounds, tmp_path: Path
) -> None:
    entries = evaluate(
        Engine(model, kosmos_tokenizer), EvalConfig(tasks={"rounds": task}, batch_tokens=100), tmp_path / "out"
    )

    rows = lines(tmp_path / "out")
    assert [row["key"] for row in rows] == [f"s{i}" for i in range(11)]
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["tasks"] == entries
    accuracy = metrics["tasks"]["rounds"]["metrics"]["accuracy"]
    assert accuracy["value"] == pytest.approx(sum(row["scores"]["accuracy"] for row in rows) / 11)
    assert accuracy["n"] == metrics["tasks"]["rounds"]["n_samples"] == 11
    assert metrics["tasks"]["rounds"]["options"] == {
        "path": str(task.path),
        "n": 11,
        "max_new_tokens": 5,
        "n_shots": 0,
        "seed": 0,
        "max_samples": None,
        "title": None,
        "chance": None,
    }


def test_evaluated_samples_are_not_evaluated_again(
    model: Kosmos, kosmos_tokenizer: Tokenizer, task: TwoRounds, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = evaluate(Engine(model, kosmos_tokenizer), EvalConfig(tasks={"rounds": task}), tmp_path / "whole")
    evaluate(Engine(model, kosmos_tokenizer), EvalConfig(tasks={"rounds": task}, max_samples=5), tmp_path / "out")
    before = lines(tmp_path / "out")
    evaluated: list[str] = []
    run = RequestScheduler.run

    def watched(
        scheduler: RequestScheduler, task: TwoRounds, samples: Sequence[Sample], pool: Sequence[Sample]
    ) -> Iterator[list[Result]]:
        evaluated.extend(sample.key for sample in samples)
        return run(scheduler, task, samples, pool)

    monkeypatch.setattr(RequestScheduler, "run", watched)

    again = evaluate(Engine(model, kosmos_tokenizer), EvalConfig(tasks={"rounds": task}), tmp_path / "out")

    assert sorted([*evaluated, *(row["key"] for row in before)]) == sorted(f"s{i}" for i in range(11))
    assert len(before) == 5
    assert again["rounds"]["metrics"] == expected["rounds"]["metrics"]
    assert [row["key"] for row in lines(tmp_path / "out")] == [f"s{i}" for i in range(11)]


def test_a_sample_whose_line_was_cut_off_is_evaluated_again(
    model: Kosmos, kosmos_tokenizer: Tokenizer, task: TwoRounds, tmp_path: Path
) -> None:
    expected = evaluate(Engine(model, kosmos_tokenizer), EvalConfig(tasks={"rounds": task}), tmp_path / "out")
    path = tmp_path / "out/rounds/samples.jsonl"
    rows = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(rows[:4]))
    (path.parent / "samples.0.part").write_bytes(rows[5] + rows[7][:31])
    (path.parent / "samples.3.part").write_bytes(rows[6] + rows[4] + rows[8][:-1])

    again = evaluate(Engine(model, kosmos_tokenizer), EvalConfig(tasks={"rounds": task}), tmp_path / "out")

    assert again["rounds"]["metrics"] == expected["rounds"]["metrics"]
    assert [row["key"] for row in lines(tmp_path / "out")] == [f"s{i}" for i in range(11)]
    assert sorted(p.name for p in path.parent.iterdir()) == ["fingerprint.json", "samples.jsonl"]


def test_failed_samples_are_evaluated_again(
    model: Kosmos, kosmos_tokenizer: Tokenizer, task: TwoRounds, tmp_path: Path
) -> None:
    image = (task.path / "1.png").read_bytes()
    (task.path / "1.png").write_bytes(b"")
    config = EvalConfig(tasks={"rounds": task})
    first = evaluate(Engine(model, kosmos_tokenizer), config, tmp_path / "out")["rounds"]
    (task.path / "1.png").write_bytes(image)

    then = evaluate(Engine(model, kosmos_tokenizer), config, tmp_path / "out")["rounds"]

    assert first["n_failed"] == first["failures"]["unreadable image"] > 0
    assert first["metrics"]["accuracy"]["n"] == 11 - first["n_failed"]
    assert (then["n_failed"], then["metrics"]["accuracy"]["n"]) == (0, 11)


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        ({"seed": 3}, "weights is '.*' in the folder, '.*' in this run"),
        ({"image_control": "blank"}, "image_control is 'true' in the folder, 'blank' in this run"),
        ({"max_new_tokens": 4}, "max_new_tokens is 5 in the folder, 4 in this run"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_results_of_another_evaluation_are_refused_and_kept(
    kosmos_tower: str, kosmos_tokenizer: Tokenizer, task: TwoRounds, tmp_path: Path, other: dict[str, Any], difference: str
) -> None:
    evaluate(Engine(tiny_model(kosmos_tower), kosmos_tokenizer), EvalConfig(tasks={"rounds": task}), tmp_path / "out")
    before = lines(tmp_path / "out")
    changed = TwoRounds(str(task.path), n=11, max_new_tokens=other.get("max_new_tokens", 5))
    config = EvalConfig(tasks={"rounds": changed}, image_control=other.get("image_control", "true"))

    with pytest.raises(UserError, match=rf"holds results of another evaluation: {difference}\. Give this run another"):
        evaluate(Engine(tiny_model(kosmos_tower, other.get("seed", 0)), kosmos_tokenizer), config, tmp_path / "out")

    assert lines(tmp_path / "out") == before


def test_a_task_whose_samples_all_fail_is_an_error(
    model: Kosmos, kosmos_tokenizer: Tokenizer, task: TwoRounds, tmp_path: Path
) -> None:
    class Empty(TwoRounds):
        def ask(self, sample: Any, shots: Any) -> Any:
            yield [LogLikelihood(("the",), ("cat", " "))]

    config = EvalConfig(tasks={"empty": Empty(str(task.path), n=3)})
    with pytest.raises(UserError, match=r"empty: all samples failed, 3 of them so: candidate without tokens"):
        evaluate(Engine(model, kosmos_tokenizer), config, tmp_path / "out")

    assert [row["error"] for row in lines(tmp_path / "out", "empty")] == ["candidate without tokens: ' '"] * 3


def test_a_sample_that_its_task_refuses_is_listed(
    model: Kosmos, kosmos_tokenizer: Tokenizer, task: TwoRounds, tmp_path: Path
) -> None:
    class Unlabelled(TwoRounds):
        def ask(self, sample: Any, shots: Any) -> Any:
            if sample.key == "s1":
                raise UserError("s1 has no label")
            return (yield from super().ask(sample, shots))

    config = EvalConfig(tasks={"unlabelled": Unlabelled(str(task.path), n=3)})
    entry = evaluate(Engine(model, kosmos_tokenizer), config, tmp_path / "out")["unlabelled"]

    assert (entry["n_failed"], entry["failures"]) == (1, {"invalid sample": 1})
    assert lines(tmp_path / "out", "unlabelled")[1]["error"] == "invalid sample: s1 has no label"


def test_a_smaller_selection_is_part_of_a_larger_one(task: TwoRounds) -> None:
    keys = [{sample.key for sample in limit_samples(task, task.samples(), n)} for n in (3, 7, None)]

    assert [len(some) for some in keys] == [3, 7, 11]
    assert keys[0] < keys[1] < keys[2]


def test_two_samples_of_one_key_are_an_error(task: TwoRounds) -> None:
    with pytest.raises(UserError, match="1 keys belong to several samples, such as 's2'"):
        limit_samples(task, [*task.samples(), task.samples()[2]])


def test_shuffled_samples_show_others_images_and_keep_the_rest(
    model: Kosmos, kosmos_tokenizer: Tokenizer, task: TwoRounds, tmp_path: Path
) -> None:
    config = EvalConfig(tasks={"rounds": task}, image_control="shuffled")

    evaluate(Engine(model, kosmos_tokenizer), config, tmp_path / "out")

    rows = {row["key"]: row["requests"][0] for row in lines(tmp_path / "out")}
    for sample in task.samples():
        own, others = list(map(str, sample.images)), rows[sample.key]["images"]
        assert len(own) == len(others)
        assert not own or own != others
        assert sample.data["text"] in rows[sample.key]["prompt"]


def test_different_weights_have_different_digests(kosmos_tower: str) -> None:
    one, same, other = tiny_model(kosmos_tower), tiny_model(kosmos_tower), tiny_model(kosmos_tower)
    with torch.no_grad():
        other.decoder.layers[1].ffn.fc1.bias[3] += 1e-6

    assert weights_digest(one) == weights_digest(same) != weights_digest(other)


def test_all_datasets_that_are_missing_are_named_at_once() -> None:
    def task(message: str | None) -> SimpleNamespace:
        def samples() -> list[Any]:
            if message is not None:
                raise UserError(message)
            return []

        return SimpleNamespace(samples=samples, n_shots=0, max_samples=None)

    tasks = {"a": task("no file a"), "b": task(None), "c": task("no file c"), "d": task("no file a")}
    with pytest.raises(UserError) as all_of_them:
        read_samples(SimpleNamespace(enabled_tasks=tasks, max_samples=None))  # type: ignore[arg-type]
    with pytest.raises(UserError) as one:
        read_samples(SimpleNamespace(enabled_tasks={"c": tasks["c"]}, max_samples=None))  # type: ignore[arg-type]

    assert str(all_of_them.value) == "3 of 4 tasks cannot be read:\n  no file a\n  no file c"
    assert str(one.value) == "no file c"
