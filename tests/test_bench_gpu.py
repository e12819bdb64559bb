"""benchmarks/gpu runs at tiny sizes on a CPU, and one failing measurement does not stop the others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.gpu.__main__ import kernels_of, run, table
from benchmarks.gpu.bench import Bench, Record, attempts, tiny_bench
from benchmarks.gpu.components import COMPONENTS, attention, rates
from benchmarks.gpu.performance_goals import GOALS, verdict
from benchmarks.gpu.reference import check_agreement
from kosmos_lit.errors import UserError


@pytest.fixture
def bench() -> Bench:
    return tiny_bench()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # warnings of webdataset, Lightning and torch.profiler
def test_every_component_and_goal_runs_and_has_a_verdict(bench: Bench, tmp_path: Path) -> None:
    run(bench, list(COMPONENTS), list(GOALS), tmp_path / "gpu.json")

    contents = json.loads((tmp_path / "gpu.json").read_text())
    assert contents["errors"] == {}
    assert list(contents["results"]) == [*COMPONENTS, *GOALS]
    assert all(result["MM, TFLOP/s"] > 0 and result["copy, GB/s"] > 0 for result in contents["results"].values())
    for goal in GOALS:
        for metric in contents["results"][goal]["verdicts"].values():
            assert metric["value"] > 0 or "at most" in metric
            assert metric["verdict"] == "reached" or metric["verdict"].startswith("missed: ")


def test_a_failing_measurement_is_recorded_and_the_next_one_runs(bench: Bench, tmp_path: Path) -> None:
    record, path = Record(tmp_path / "gpu.json", bench), tmp_path / "gpu.json"

    def fails(bench: Bench) -> dict[str, object]:
        raise torch.OutOfMemoryError("no room")

    record.take("rates", rates)
    record.take("fails", fails)
    contents = json.loads(path.read_text())
    record.take("later", lambda _: {"value": 3})

    assert contents["errors"] == {"fails": "OutOfMemoryError: no room"}
    assert list(contents["results"]) == ["rates"]
    assert list(json.loads(path.read_text())["results"]) == ["rates", "later"]
    assert "OutOfMemoryError: no room" in table(record)


def test_a_failing_variant_leaves_the_others_their_results() -> None:
    def fails() -> dict[str, object]:
        raise UserError("flex needs a CUDA device")

    results = attempts({"flex": fails, "sdpa": lambda: {"ms": 3.0}})

    assert results == {"flex": {"error": "UserError: flex needs a CUDA device"}, "sdpa": {"ms": 3.0}}


def test_kernels_that_a_cpu_lacks_are_errors_beside_the_results_of_others(bench: Bench) -> None:
    results = attention(bench)

    for mask in ("one document", "documents", "captions"):
        assert "needs a CUDA device" in results[mask]["xformers"]["error"]
        assert min(results[mask]["sdpa"]["both, ms"], results[mask]["sdpa"]["forward, ms"]) > 0


@pytest.mark.parametrize("kind", ["text", "caption"])
def test_the_reference_loop_computes_our_loss(bench: Bench, kind: str) -> None:
    model = bench.model(bench.config())

    assert check_agreement(bench, model, kind) < 0.01  # of some 7 nats, in bf16


def test_a_reference_that_computes_something_else_is_refused(bench: Bench) -> None:
    model = bench.model(bench.config())
    with torch.no_grad():
        model.decoder.layer_norm.weight.mul_(30)
    model.decoder.layers[0].dropout.register_forward_hook(
        lambda module, inputs, out: out * 30
    )  # the reference has no such hook

    with pytest.raises(RuntimeError, match="the reference's loss is"):
        check_agreement(bench, model, "text")


def test_a_verdict_says_by_how_much_a_threshold_is_missed() -> None:
    assert verdict(0.7, 0.63, 0.68)["verdict"] == "reached"
    assert verdict(0.315, 0.63, 0.68)["verdict"] == "missed: 0.50 of the threshold"
    assert verdict(0.3, 0.15, 0.08, at_most=True)["verdict"] == "missed: 0.50 of the threshold"
    assert verdict(0.0, 0.01, 0.003, at_most=True)["verdict"] == "reached"


@pytest.mark.filterwarnings("ignore")  # torch.profiler looks for devices
def test_a_profile_names_the_operations_of_a_step(bench: Bench) -> None:
    rates(bench)

    assert "aten::mm" in kernels_of(bench, "G1")
