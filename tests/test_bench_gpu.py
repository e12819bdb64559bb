"""benchmarks/gpu runs at tiny sizes on a CPU; what was measured outlives a failure, a deadline or a signal."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from benchmarks.gpu import bench as gpu_bench
from benchmarks.gpu import steps, suite
from benchmarks.gpu.__main__ import summary
from benchmarks.gpu.bench import Bench, drawn, first_line, tiny_bench, verdict
from benchmarks.gpu.components import attention, clip, loss, rates
from benchmarks.gpu.parts import PARTS, Part
from benchmarks.gpu.reference import check_agreement
from benchmarks.gpu.supervise import Record, Settings, plain, supervise
from benchmarks.gpu.whole_model import mixture, text, trained
from kosmos_lit.costs.allocations import fake_device
from kosmos_lit.costs.memory import EstimateError, meta_model
from kosmos_lit.errors import UserError
from kosmos_lit.model import Kosmos

ROOT = Path(__file__).parents[1]


@pytest.fixture
def bench() -> Bench:
    return tiny_bench()


# ---- parts that the tests below have a worker measure


def quick(bench: Bench) -> dict[str, Any]:
    bench.matmul_rate, bench.copy_rate = 3e12, 5e9
    return {"value": math.nan, "rate": bench.matmul_rate}


def remembers(bench: Bench) -> dict[str, Any]:
    return {"rate": bench.matmul_rate, "pid": os.getpid()}


def fails(bench: Bench) -> dict[str, Any]:
    raise torch.OutOfMemoryError("no room\nand more lines")


def loses_the_device(bench: Bench) -> dict[str, Any]:
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


def dies(bench: Bench) -> dict[str, Any]:
    bench.report({"first": 7})
    os._exit(3)


def hangs(bench: Bench) -> dict[str, Any]:
    bench.report({"variants": {"first": 7}})
    bench.report({"child": subprocess.Popen(["sleep", "600"]).pid})
    bench.attempts({"second": lambda: {"ms": 3}})
    time.sleep(600)
    return {}


def part(function: str, seconds: float = 0.0) -> Part:
    return Part(f"{__name__}:{function}", seconds, "a test's")


def measure(path: Path, parts: dict[str, Part], seconds: float = 600) -> dict[str, Any]:
    """Return the file of a run of parts, with strict JSON."""
    record = Record(path, list(parts))
    supervise(parts, Settings(True, 2, False, time.monotonic() + seconds, None), record)
    assert "" in summary(record)
    return json.loads(path.read_text(), parse_constant=pytest.fail)


def is_running(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


@pytest.mark.slow
def test_a_part_that_fails_dies_or_loses_the_device_costs_itself_alone(tmp_path: Path) -> None:
    names = ("quick", "fails", "remembers", "dies", "loses_the_device", "unknown", "again")
    parts = {name: part({"again": "remembers", "unknown": "missing"}.get(name, name)) for name in names}

    contents = measure(tmp_path / "gpu.json", parts)

    assert contents["status"] == {
        "quick": "done",
        "fails": "failed: OutOfMemoryError: no room",
        "remembers": "done",
        "dies": "failed: its process ended with exit code 3",
        "again": "done",
        "loses_the_device": "failed: RuntimeError: CUDA error: an illegal memory access was encountered",
        "unknown": f"failed: AttributeError: module '{__name__}' has no attribute 'missing'",
    }
    results = contents["results"]
    assert results["quick"] | {"took, s": 0} == {
        "value": "nan",
        "rate": 3e12,
        "MM, TFLOP/s": 3.0,
        "copy, GB/s": 5.0,
        "took, s": 0,
    }
    assert results["dies"] == {"first": 7}
    # The process is another one, and knows the yardsticks of the first.
    assert results["remembers"]["pid"] != results["again"]["pid"]
    assert results["again"]["rate"] == results["again"]["MM, TFLOP/s"] * 1e12 == 3e12


@pytest.mark.slow
def test_a_deadline_cuts_what_runs_and_names_what_is_skipped(tmp_path: Path) -> None:
    parts = {"quick": part("quick"), "long": part("quick", 1e6), "hangs": part("hangs", 7), "later": part("quick")}
    begun = time.monotonic()

    contents = measure(tmp_path / "gpu.json", parts, seconds=45)

    assert time.monotonic() - begun < 50
    status = contents["status"]
    assert status["quick"] == "done"
    assert status["long"].startswith("skipped: it takes about 20000 s, and ")
    assert status["hangs"].startswith("cut after ")
    assert status["later"] == "skipped: no time is left"
    assert contents["results"]["hangs"]["variants"] == {"first": 7, "second": {"ms": 3}}  # what it had measured by then
    assert not is_running(contents["results"]["hangs"]["child"])


@pytest.mark.slow
def test_a_part_that_takes_much_longer_than_expected_leaves_the_others_their_time(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(Part, "limit", property(lambda self: 1.0 if "hangs" in self.function else 100.0))

    contents = measure(tmp_path / "gpu.json", {"hangs": part("hangs"), "quick": part("quick")})

    assert contents["status"]["quick"] == "done"
    assert contents["status"]["hangs"].startswith("cut after ")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_leaves_the_file_and_no_process(tmp_path: Path, number: signal.Signals) -> None:
    path = tmp_path / "gpu.json"
    code = f"from {__name__} import *; measure(Path({str(path)!r}), {{'quick': part('quick'), 'hangs': part('hangs')}})"
    # As a shell starts it in the background.
    ignores = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); "
    process = subprocess.Popen(
        [sys.executable, "-c", ignores + code], cwd=ROOT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    while not (path.exists() and "child" in json.loads(path.read_text())["results"].get("hangs", {})):
        assert process.poll() is None
        time.sleep(0.05)

    process.send_signal(number)

    assert process.wait(20) == 128 + number
    contents = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert contents["status"] == {"quick": "done", "hangs": "cut: the run was interrupted", "run": "interrupted by a signal"}
    assert not is_running(contents["results"]["hangs"]["child"])


def test_an_unwritable_moment_leaves_the_file_as_it_was(tmp_path: Path, monkeypatch) -> None:
    record = Record(tmp_path / "gpu.json", ["rates"])
    record.write()
    before = record.path.read_bytes()
    monkeypatch.setattr(Path, "replace", lambda *_: pytest.fail("interrupted"))

    with pytest.raises(pytest.fail.Exception):
        record.write()

    assert record.path.read_bytes() == before


def test_data_become_strict_json() -> None:
    value = {1: (math.nan, -math.inf, torch.tensor(3.0)), "x": [None, True, "y", Path("z")]}
    assert plain(value) == {"1": ["nan", "-inf", 3.0], "x": [None, True, "y", "z"]}


# ---- the command


@pytest.mark.slow
def test_the_rehearsal_measures_every_part(tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    command = [sys.executable, "-m", "benchmarks.gpu", "--tiny", "--json", str(path), "--profile"]
    process = subprocess.run(command, cwd=ROOT, text=True, capture_output=True)

    contents = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert contents["status"] == dict.fromkeys(PARTS, "done"), process.stdout + process.stderr[-3000:]
    assert process.returncode == 0
    assert list(contents["results"]) == list(PARTS)
    for name, results in contents["results"].items():
        assert min(results["MM, TFLOP/s"], results["copy, GB/s"]) > 0
        if name not in ("rates", "tests", "fp8"):  # which have no bar, or nothing to run on a CPU
            assert results["verdicts"]
            assert all(f"{v['verdict']}" in process.stdout for v in results["verdicts"].values())
    for name in ("text", "mixture", "decode", "loss", "clip", "block"):
        profile = contents["results"][name]["profile"]
        assert 0 < profile[0]["share"] <= 1
        assert profile[0]["kernel"].startswith("aten::")
        assert "Self CPU" in (tmp_path / f"gpu.{name}.txt").read_text()
    fits = contents["results"]["steps"]["runs"]
    for run in fits.values():
        assert run["command"].startswith("main.py fit -c configs/kosmos1.yaml -c configs/trainer/")
        assert len(run["steps"]["loss"]) == 4
    off = contents["results"]["steps"]["verdicts"]
    assert all(off[f"{metric}: FSDP2 beside DDP, off by"]["reached"] for metric in ("loss", "gradient norm"))
    assert contents["results"]["tests"]["skipped"] > 0


def test_without_a_gpu_the_command_says_what_runs_without_one(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    path = tmp_path / "gpu.json"
    path.write_text("an earlier run's")
    command = [sys.executable, "-m", "benchmarks.gpu", "--deadline", "60", "--json", str(path)]

    process = subprocess.run(command, cwd=ROOT, text=True, capture_output=True)

    assert process.returncode == 2
    assert "no CUDA device; --tiny runs everything on the CPU" in process.stderr
    assert path.read_text() == "an earlier run's"


# ---- sizes, weights, profiles


def test_weights_are_drawn_on_the_device_and_none_is_forgotten(bench: Bench) -> None:
    config = bench.config()
    model, usual = drawn(config, torch.device("cpu")), Kosmos.create(config)

    for (name, p), q in zip(model.named_parameters(), usual.parameters(), strict=True):
        assert (p.shape, p.requires_grad) == (q.shape, q.requires_grad), name
        assert p.isfinite().all(), name
        if p.numel() > 500 and not name.startswith("vision."):  # open_clip scales its tower's matrices by depth
            # sampling error of some hundred numbers
            assert float(p.detach().std()) == pytest.approx(float(q.detach().std()), rel=0.25), name
    assert not any(b.is_meta for b in model.buffers())


def test_weights_are_drawn_on_a_gpu_without_the_cpu(bench: Bench, monkeypatch) -> None:
    outline = meta_model(bench.config())
    monkeypatch.setattr(gpu_bench, "meta_model", lambda _: outline)
    with fake_device("cuda"):
        model = drawn(bench.config(), torch.device("cuda", 0))

    assert {p.device for p in model.parameters()} == {torch.device("cuda", 0)}


def unknown(*_: Any) -> None:
    raise EstimateError("of another PyTorch")


def test_the_largest_micro_batch_that_is_estimated_to_fit_is_taken(bench: Bench, monkeypatch) -> None:
    candidates = [{"text": 3}, {"text": 2}, {"text": 1}]
    everything = [known for _, known in bench.fitting(bench.config(), candidates)]
    assert [known["rows"] for known in everything] == candidates

    needed = [known["estimated bytes"] for known in everything]
    assert needed == sorted(needed, reverse=True)
    monkeypatch.setattr(bench, "available_bytes", lambda: needed[1] * 1.04 + 2e9 + 1)  # SLACK and RESERVE
    assert [known["rows"]["text"] for _, known in bench.fitting(bench.config(), candidates)] == [2, 1]

    monkeypatch.setattr(gpu_bench, "estimate", unknown)
    assert [known["estimate"] for _, known in bench.fitting(bench.config(), candidates)] == ["of another PyTorch"] * 3


def test_a_step_that_runs_out_of_memory_is_measured_on_a_smaller_micro_batch(bench: Bench, monkeypatch) -> None:
    rates(bench)
    seconds = bench.seconds

    def with_room_for_one(step: Any, n: int | None = None) -> float:
        if len(step.batch.tokens) > 1:
            raise torch.OutOfMemoryError("no room")
        return seconds(step, n)

    monkeypatch.setattr(bench, "seconds", with_room_for_one)
    results, _ = trained(bench, bench.config(), [{"text": 3}, {"text": 2}, {"text": 1}])
    assert results["rows"] == {"text": 1}
    assert results["out of memory"] == [{"text": 3}, {"text": 2}]

    with pytest.raises(RuntimeError, match="no micro-batch fits"):
        trained(bench, bench.config(), [{"text": 3}])


def test_parts_share_one_model(bench: Bench, monkeypatch) -> None:
    drawings = []
    monkeypatch.setattr(gpu_bench, "drawn", lambda *a: drawings.append(a) or drawn(*a))
    rates(bench)

    text(bench)
    mixture(bench)

    assert len(drawings) == 1
    bench.model(bench.config(norm="pre"))
    assert len(drawings) == 2


def test_a_tower_is_measured_as_training_rounds_it(bench: Bench, monkeypatch) -> None:
    rounded = []
    monkeypatch.setattr("kosmos_lit.vision.VisionTower.round_frozen", lambda _, dtype: rounded.append(dtype), raising=False)

    bench.model(bench.config())

    assert rounded == [torch.bfloat16]


@pytest.mark.filterwarnings("ignore")  # torch.profiler looks for devices
def test_a_missed_verdict_leaves_a_profile_if_time_is_left(bench: Bench, tmp_path: Path) -> None:
    bench.part, bench.tables = "text", tmp_path / "gpu"
    matrix = torch.ones(97, 97)
    missed, reached = {"a": verdict(1, 2, 3)}, {"a": verdict(2, 2, 3)}

    profile = bench.explain(lambda: matrix @ matrix, missed)["profile"]

    assert "aten::mm" in [line["kernel"] for line in profile]
    assert sum(line["share"] for line in profile) == pytest.approx(1, abs=0.01)
    assert "aten::mm" in (tmp_path / "gpu.text.txt").read_text()
    assert bench.explain(lambda: matrix @ matrix, reached) == {}
    assert bench.explain(lambda: fails(bench), missed) == {"profile": "failed: OutOfMemoryError: no room"}
    bench.end = time.monotonic() + 5
    assert bench.explain(lambda: pytest.fail("no time"), missed)["profile"].startswith("skipped: ")


def test_a_variant_that_fails_or_has_no_time_leaves_the_others_their_results(bench: Bench) -> None:
    def unable() -> dict[str, object]:
        raise UserError("flex needs a CUDA device")

    so_far: list[dict[str, Any]] = []
    bench.report = lambda results: so_far.append(json.loads(json.dumps(results)))

    def slow() -> dict[str, object]:
        time.sleep(0.2)
        bench.end = time.monotonic() + 0.1
        return {"ms": 3.0}

    results = bench.attempts({"flex": unable, "sdpa": slow, "late": slow})

    assert results["flex"] == {"error": "UserError: flex needs a CUDA device"}
    assert results["sdpa"] == {"ms": 3.0}
    assert re.search(r"another variant took \d+ s$", results["late"]["skipped"])
    assert [list(r["variants"]) for r in so_far] == [["flex"], ["flex", "sdpa"]]
    with pytest.raises(RuntimeError, match="illegal"):
        bench.attempts({"x": lambda: loses_the_device(bench)})


def test_kernels_that_a_cpu_lacks_are_errors_beside_the_results_of_others(bench: Bench) -> None:
    results = attention(bench)

    for mask in ("one document", "documents", "captions"):
        assert "needs a CUDA device" in results[mask]["xformers"]["error"]
        assert min(results[mask]["sdpa"]["both, ms"], results[mask]["sdpa"]["forward, ms"]) > 0


def test_losses_and_towers_are_compared_with_what_they_replace(bench: Bench) -> None:
    rates(bench)

    assert next(iter(loss(bench)["verdicts"])).startswith("over MM: gradients in chunks of ")
    assert list(clip(bench)["verdicts"]) == ["over MM", "over transformers"]
    assert bench.model(bench.config()).vision.config.chunk == bench.config().vision.chunk


def test_a_verdict_says_by_how_much_a_threshold_is_missed() -> None:
    assert verdict(0.7, 0.63, 0.68)["verdict"] == "reached"
    assert verdict(0.315, 0.63, 0.68)["verdict"] == "missed: 0.50 of the threshold"
    assert verdict(0.3, 0.15, 0.08, at_most=True)["verdict"] == "missed: 0.50 of the threshold"
    assert verdict(0.0, 0.01, 0.003, at_most=True)["verdict"] == "reached"
    assert first_line(RuntimeError("")) == "RuntimeError: "


# ---- the reference loop


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


# ---- the suite's tests, and real steps


def test_gpu_tests_are_counted_as_pytest_prints_them_alone_and_in_parallel() -> None:
    alone = """
tests/a/test_b.py::test_c PASSED                    [ 10%]
tests/a/test_b.py::test_c[{'n_beams': 3}] PASSED [ 20%]
tests/a/test_b.py::test_d[dtype0-FAILED] FAILED [ 30%]
tests/a/test_b.py::test_e SKIPPED (needs 8.9)       [ 40%]
tests/a/test_b.py::test_f ERROR [ 50%]
=========================== short test summary info ============================
FAILED tests/a/test_b.py::test_d[dtype0-FAILED] - RuntimeError: no kernel - image
ERROR tests/a/test_b.py::test_f - OSError: no file
ERROR tests/a/test_g.py - ModuleNotFoundError: No module named 'hypothesis'
!!!!!! KeyboardInterrupt !!!!!!
==== 1 failed, 2 passed, 1 skipped, 2 errors in 3.07s ===="""
    parallel = """
scheduling tests via LoadScheduling
tests/a/test_b.py::test_c
[gw1] [ 10%] PASSED tests/a/test_b.py::test_c
[gw0] [ 20%] PASSED tests/a/test_b.py::test_c[{'n_beams': 3}]
[gw0] [ 30%] FAILED tests/a/test_b.py::test_d[dtype0-FAILED]
[gw0] [ 40%] SKIPPED tests/a/test_b.py::test_e
[gw0] [ 50%] ERROR tests/a/test_b.py::test_f""" + alone[alone.index("\n====") :]
    expected = {
        "passed": 2,
        "failed": 1,
        "skipped": 1,
        "errors": 2,
        "reasons": {
            "tests/a/test_b.py::test_d[dtype0-FAILED]": "RuntimeError: no kernel - image",
            "tests/a/test_b.py::test_f": "OSError: no file",
            "tests/a/test_g.py": "ModuleNotFoundError: No module named 'hypothesis'",
        },
    }

    for output in (alone, parallel):
        results = suite.summed(output.splitlines())
        assert results.pop("end")[-1] == "1 failed, 2 passed, 1 skipped, 2 errors in 3.07s"
        assert results == expected


def test_a_run_of_tests_that_takes_too_long_is_summed_up(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(suite, "ROOT", tmp_path)
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_x.py").write_text(
        "import time, pytest\npytestmark = pytest.mark.gpu\ndef test_a(): pass\ndef test_b(): assert 3 == 5\n"
        "def test_c(): time.sleep(600)\n"
    )
    (tmp_path / "tests" / "test_y.py").write_text("import no_such_module  # pytest.mark.gpu\n")
    files = suite.gpu_files(tmp_path / "tests")

    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in a command in the background
    try:
        results = suite.summed(suite.run_pytest(files, seconds=8))
    finally:
        signal.signal(signal.SIGINT, before)

    assert files == ["tests/test_x.py", "tests/test_y.py"]
    assert (results["passed"], results["failed"], results["errors"]) == (1, 1, 1)
    assert results["reasons"]["tests/test_x.py::test_b"] == "assert 3 == 5"


def test_every_gpu_test_of_the_suite_is_in_the_files() -> None:
    files = suite.gpu_files(ROOT / "tests")
    assert {"tests/kosmos_lit/test_gpu.py", "tests/kosmos_lit/ops/test_attention.py"} <= set(files)


def test_missing_pytest_is_said(bench: Bench, monkeypatch) -> None:
    monkeypatch.setattr(suite, "_is_installed", lambda name: name != "pytest")
    with pytest.raises(RuntimeError, match="pytest is not installed"):
        suite.gpu_tests(bench)


def run_of(losses: list[float], norms: list[float], rows: list[float]) -> dict[str, Any]:
    return {"steps": {"loss": losses, "gradient norm": norms, "rows read": rows}}


def test_losses_and_norms_of_two_strategies_are_compared_step_by_step() -> None:
    plain_run = run_of([11.0, 10.0], [2.0, 3.0], [5, 7])

    def verdicts(**runs: Any) -> list[bool]:
        return [v["reached"] for v in steps.compare(runs).values()]

    assert verdicts(FSDP2=run_of([11.0, 10.009], [2.0, 3.1], [5, 7]), DDP=plain_run) == [False, True, True, True]
    assert verdicts(FSDP2=run_of([11.012, 10.0], [2.0, 3.2], [5, 6]), DDP=plain_run) == [False, False, False, False]
    assert verdicts(FSDP2=run_of([11.0, math.nan], [2.0, 3.0], [5, 7]), DDP=plain_run)[1:3] == [False, True]
    assert verdicts(FSDP2=run_of([11.0], [2.0], [5]), DDP=plain_run)[1:3] == [False, False]
    twenty = run_of([11.0] * 20, [1.0] * 20, list(range(20)))
    assert verdicts(FSDP2=twenty, DDP={"error": "exit code 1"}) == [True]
    assert verdicts(FSDP2={"error": "exit code 1"}) == []


def test_micro_batches_of_real_steps_follow_the_memory(bench: Bench, monkeypatch) -> None:
    needed = {rows: 1e9 * rows for rows in steps.MICRO_ROWS}
    monkeypatch.setattr(steps, "estimate", lambda _, setting: type("M", (), {"needed": needed[setting.batch.rows]}))
    bench = replace(bench, sizes=gpu_bench.FULL)
    for available, rows in {13e9: 8, 15e9: 12, 4e9: 3, 0.5e9: 1}.items():
        monkeypatch.setattr(Bench, "available_bytes", lambda _, available=available: available)
        assert steps.micro_rows(bench) == rows
    monkeypatch.setattr(steps, "estimate", unknown)
    assert steps.micro_rows(bench) == 3
    assert all(steps.GLOBAL_ROWS % rows == 0 for rows in steps.MICRO_ROWS)
    overlay = yaml.safe_load((ROOT / steps.OVERLAY).read_text())
    assert overlay["data"]["init_args"]["global_batch_rows"] == steps.GLOBAL_ROWS == 24
    assert overlay["trainer"]["max_steps"] == steps.N_STEPS == 20
    assert overlay["model"]["kosmos"]["decoder"]["attention_kernel"] == "xformers"


def test_parts_are_in_the_order_of_what_they_tell() -> None:
    first = ["rates", "tests", "steps", "text", "mixture", "decode", "loss", "clip"]
    assert list(itertools.islice(PARTS, len(first))) == first
