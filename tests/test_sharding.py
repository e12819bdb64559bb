"""Sharded training is the single process's: the same first weights, losses, weights and checkpoints. On CPUs, over gloo."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy, Strategy
from torch import Tensor

from kosmos_lit.checkpoint import load_checkpoint
from kosmos_lit.cli import main
from kosmos_lit.errors import UserError
from kosmos_lit.sharding.fsdp import check_strategy
from tests.cli_runs import run, tiny_run
from tests.ranks import on_ranks
from tests.test_ranks import NO_DROPOUT

pytestmark = pytest.mark.xdist_group("sharding")  # one worker: its runs are made once

STEPS, HALF = 20, 10
LORA = ["--model.kosmos.lora.rank=3", "--model.kosmos.lora.dropout_rate=0"]
PARTS = ["vision", "decoder.layers.0", "connector.x_attn", "decoder.embed_tokens"]
FROZEN = [f"--model.freeze={json.dumps(PARTS)}"]
TEXTS = ["--data.ratio.text=0.9", "--data.ratio.caption=0.1", "--data.ratio.interleaved=0"]
BF16 = ["--trainer.precision=bf16-mixed"]
KEEP_GATHERED = "--trainer.strategy.init_args.reshard_after_forward=false"
RECOMPUTE = "--model.kosmos.decoder.recompute=full"
SYNC_ONCE = "--trainer.strategy.init_args.sync_every_micro_batch=false"
SHARD_SIZE = "--trainer.strategy.init_args.shard_size="
PAIRS = SHARD_SIZE + "2"
EIGHT_ROWS = "--data.global_batch_rows=8"
FUSED = ["--model.kosmos.decoder.compile=true", "--model.kosmos.decoder.recompute=selective"]
COMPILED = ["fsdp-fused", "fsdp1-fused"] if shutil.which("gcc") else []
"""Runs with torch.compile, the default on GPUs; they need a C compiler."""


def sharded(strategy: str, ranks: int, *more: str) -> list[str]:
    """Return the flags of a sharded run; a step has 4 rows, so 2 ranks accumulate over 2 micro-batches and 4 ranks none."""
    on_cpu = ["--trainer.accelerator=cpu", "--trainer.precision=32-true", f"--trainer.devices={ranks}"]
    return ["-c", f"configs/trainer/{strategy}.yaml", *on_cpu, "--data.micro_batch_rows=1", *more]


class Runs:
    """Runs on one world, each in its own folder."""

    def __init__(self, folder: Path, world: Path) -> None:
        self.folder, self.world = folder, world
        callbacks: list[dict[str, Any]] = [
            {"class_path": "kosmos_lit.callbacks.StepLog"},
            {"class_path": "kosmos_lit.callbacks.Predictions"},
            {"class_path": "tests.recording_callbacks.RecordWeights"},
            {
                "class_path": "kosmos_lit.callbacks.Checkpoints",
                "init_args": {"dirpath": "${trainer.default_root_dir}/checkpoints", "every_n_train_steps": HALF, "keep": 9},
            },
        ]
        arguments = {"save_dir": "${trainer.default_root_dir}", "name": "csv"}
        log = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": arguments}
        quiet = {"enable_progress_bar": False, "num_sanity_val_steps": 0, "logger": [log]}
        trainer = {"max_steps": STEPS, "val_check_interval": HALF, "callbacks": callbacks, **quiet}
        (folder / "run.yaml").write_text(yaml.safe_dump({"trainer": trainer}), encoding="utf-8")

    def command(self, name: str, *more: str, verb: str = "fit") -> list[str]:
        """Return a run's arguments; of the tower only the last block trains."""
        common = ["-c", str(self.folder / "run.yaml"), *NO_DROPOUT, "--model.kosmos.vision.trainable=last_block"]
        return tiny_run(verb, self.folder / name, self.world, *common, *more)

    def last(self, name: str) -> str:
        return f"--ckpt_path={self.checkpoint(name, STEPS)}"

    def state(self, name: str, step: int = STEPS) -> dict[str, Tensor]:
        return load_checkpoint(self.checkpoint(name, step))["state_dict"]  # type: ignore[no-any-return]

    def checkpoint(self, name: str, step: int) -> Path:
        return self.folder / name / "checkpoints" / f"step={step:08d}.ckpt"

    def start(self, name: str) -> dict[str, Tensor]:
        return torch.load(self.folder / name / "start.pt", weights_only=True)  # type: ignore[no-any-return]

    def contents(self, name: str) -> list[dict[str, Any]]:
        return [json.loads(path.read_text()) for path in sorted((self.folder / name).glob("held-*.json"))]

    def column(self, name: str, column: str) -> list[float]:
        """Return a logged metric at each step."""
        [path] = (self.folder / name).glob("csv/*/metrics.csv")
        with path.open() as file:
            return [float(row[column]) for row in csv.DictReader(file) if row[column]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_world: Path) -> Runs:
    r = Runs(tmp_path_factory.mktemp("sharding"), tiny_world)
    alone, short = ["--data.micro_batch_rows=4"], f"--trainer.max_steps={HALF}"
    assert main(r.command("one", *alone)) == 0
    assert main(r.command("one-lora", *alone, *LORA, *TEXTS, short)) == 0
    assert main(r.command("one-frozen", *alone, *FROZEN, *TEXTS, short)) == 0
    assert main(r.command("one-bf16", *alone, *BF16, short)) == 0
    two = {
        "fsdp": sharded("fsdp", 2),
        "fsdp1": sharded("fsdp1", 2),
        "fsdp-late": sharded("fsdp", 2, KEEP_GATHERED, SYNC_ONCE, short),
        "fsdp1-whole": sharded("fsdp1", 2, KEEP_GATHERED, short),
        "fsdp-lora": sharded("fsdp", 2, *LORA, *TEXTS, short),
        "fsdp1-lora": sharded("fsdp1", 2, *LORA, *TEXTS, short),
        "fsdp-frozen": sharded("fsdp", 2, *FROZEN, *TEXTS, short),
        "fsdp1-frozen": sharded("fsdp1", 2, *FROZEN, *TEXTS, short),
        "fsdp-again": sharded("fsdp", 2, RECOMPUTE, short),
        "fsdp1-again": sharded("fsdp1", 2, RECOMPUTE, short),
        "fsdp-bf16": sharded("fsdp", 2, *BF16, short),
        "fsdp1-bf16": sharded("fsdp1", 2, *BF16, short),
        "one-then-fsdp": sharded("fsdp", 2, f"--ckpt_path={r.checkpoint('one', HALF)}"),
        "fsdp-then-fsdp1": sharded("fsdp1", 2, f"--ckpt_path={r.checkpoint('fsdp', HALF)}"),
    }
    two |= {name: sharded(name.removesuffix("-fused"), 2, *FUSED, short) for name in COMPILED}
    predictions = [r.command(f"{s}-predict", *sharded(s, 2, r.last("one")), verb="predict") for s in ("fsdp", "fsdp1")]
    on_ranks(2, [*(r.command(name, *flags) for name, flags in two.items()), *predictions], r.folder / "two")
    four = {
        "fsdp-4": sharded("fsdp", 4),
        "fsdp1-4": sharded("fsdp1", 4, short),
        "fsdp1-then-fsdp-4": sharded("fsdp", 4, f"--ckpt_path={r.checkpoint('fsdp1', HALF)}"),
        "hsdp": sharded("hsdp", 4, PAIRS),
        "hsdp-accumulated": sharded("hsdp", 4, PAIRS, EIGHT_ROWS, short),
        "hsdp-accumulated-late": sharded("hsdp", 4, PAIRS, EIGHT_ROWS, SYNC_ONCE, short),
        "hsdp-frozen": sharded("hsdp", 4, PAIRS, *FROZEN, *TEXTS, short),
        "hsdp-bf16": sharded("hsdp", 4, PAIRS, *BF16, short),
        "fsdp-then-hsdp": sharded("hsdp", 4, PAIRS, f"--ckpt_path={r.checkpoint('fsdp', HALF)}"),
    }
    on_ranks(4, [r.command(name, *flags) for name, flags in four.items()], r.folder / "four")
    only = {"fsdp-1": sharded("fsdp", 1, short), "fsdp1-1": sharded("fsdp1", 1, short)}
    on_ranks(1, [r.command(name, *flags) for name, flags in only.items()], r.folder / "only")
    assert main(r.command("one-accumulated", "--data.micro_batch_rows=8", EIGHT_ROWS, short)) == 0
    assert main(r.command("hsdp-then-one", *alone, f"--ckpt_path={r.checkpoint('hsdp', HALF)}")) == 0
    assert main(r.command("fsdp-4-then-one", *alone, f"--ckpt_path={r.checkpoint('fsdp-4', HALF)}")) == 0
    assert main(r.command("one-predict", *alone, r.last("one"), verb="predict")) == 0
    return r


def single(name: str) -> str:
    """Return the name of the unsharded run that a sharded one must equal."""
    return next((f"one-{kind}" for kind in ("lora", "frozen", "bf16", "accumulated") if kind in name), "one")


EXACT = ["fsdp", "fsdp-4", "fsdp-1", "fsdp-late", "fsdp-lora", "fsdp-frozen", "fsdp-again"]
EXACT += ["hsdp", "hsdp-accumulated", "hsdp-accumulated-late", "hsdp-frozen"]
EXACT += ["fsdp1", "fsdp1-4", "fsdp1-1", "fsdp1-whole", "fsdp1-lora", "fsdp1-frozen", "fsdp1-again", *COMPILED]
BF16_RUNS = ["fsdp-bf16", "fsdp1-bf16", "hsdp-bf16"]
RESUMED = ["fsdp-then-hsdp", "hsdp-then-one", "one-then-fsdp", "fsdp-then-fsdp1", "fsdp1-then-fsdp-4", "fsdp-4-then-one"]


@pytest.mark.slow
@pytest.mark.parametrize("name", [*EXACT, *BF16_RUNS])
def test_first_weights_are_the_single_process_s_bit_by_bit(runs: Runs, name: str) -> None:
    expected, actual = runs.start(single(name)), runs.start(name)

    assert list(actual) == list(expected)
    assert all(torch.equal(actual[key], expected[key]) for key in expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*EXACT, *RESUMED])
def test_steps_are_the_single_process_s(runs: Runs, name: str) -> None:
    expected = single(name)
    steps = max(int(step) for step in runs.column(name, "step"))
    for column in ("train/loss", "grad_norm"):
        actual = runs.column(name, column)
        # fp32 sums in another order: measured 5e-7 in a loss of 5, 1e-7 in the norm
        assert actual == pytest.approx(runs.column(expected, column)[steps - len(actual) : steps], rel=2e-6), column
    if expected == "one":
        assert min(runs.column(expected, "grad_norm")) < 1.0 < max(runs.column(expected, "grad_norm")), (
            "clipped in some steps"
        )
    # Adam at up to 3e-3 turns them into 2.5e-6 after 20 steps
    assert distance(runs.state(name, steps), runs.state(expected, steps)) < 2e-5
    [actual_state] = load_checkpoint(runs.checkpoint(name, steps))["optimizer_states"]
    [expected_state] = load_checkpoint(runs.checkpoint(expected, steps))["optimizer_states"]
    assert actual_state["param_groups"] == expected_state["param_groups"]
    for index, values in expected_state["state"].items():
        assert distance(actual_state["state"][index], values) < 1e-6


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert {k: v.shape for k, v in one.items()} == {k: v.shape for k, v in other.items()}
    return max(float((one[name] - other[name]).abs().max()) for name in one)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fsdp", "fsdp-4", "fsdp-lora", "fsdp1", "fsdp1-4", "fsdp1-lora"])
def test_each_rank_holds_its_part_of_what_trains_and_of_the_optimizer_s_state(runs: Runs, name: str) -> None:
    [full], contents = runs.contents(single(name)), runs.contents(name)

    for part in ("trained", "state"):
        assert sum(h[part] for h in contents) == full[part]
        assert (
            max(h[part] for h in contents) < (0.7 if "lora" in name else 1.2 / len(contents)) * full[part]
        )  # small, so uneven
    tower = sum(t.numel() for key, t in runs.start(name).items() if is_frozen_in_tower(key, name))
    n_frozen_outside_tower = full["frozen"] - tower
    assert sum(h["frozen"] - tower for h in contents) == n_frozen_outside_tower


@pytest.mark.slow
@pytest.mark.parametrize("name", ["hsdp", "hsdp-accumulated", "hsdp-accumulated-late", "hsdp-bf16"])
def test_two_ranks_hold_a_replica_together_and_replicas_are_equal(runs: Runs, name: str) -> None:
    [full], contents = runs.contents(single(name)), runs.contents(name)

    for part in ("trained", "state"):
        held = [h[part] for h in contents]
        assert held[:2] == held[2:]
        assert sum(held[:2]) == full[part]
        assert max(held) < 0.6 * full[part]
    assert len({h["checksum"] for h in contents[::2]}) == len({h["checksum"] for h in contents[1::2]}) == 1
    assert contents[0]["checksum"] != contents[1]["checksum"]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "n"), [("fsdp", 2), ("fsdp-4", 1), ("hsdp", 1), ("hsdp-accumulated", 2)])
def test_the_root_is_gathered_once_a_step_and_a_layer_for_each_micro_batch(runs: Runs, name: str, n: int) -> None:
    steps = max(int(step) for step in runs.column(name, "step"))

    for contents in runs.contents(name):
        assert contents["sharded"] == [*[[False, True]] * (n - 1), [True, True]] * steps


def is_frozen_in_tower(key: str, name: str) -> bool:
    return key.startswith("net.vision.") and ("lora" in name or not any(p in key for p in LAST_BLOCK))


LAST_BLOCK = ("resblocks.1.", "ln_post.")


@pytest.mark.slow
@pytest.mark.parametrize("name", [*EXACT, *BF16_RUNS])
def test_frozen_tensors_stay_bit_by_bit_and_all_others_move(runs: Runs, name: str) -> None:
    start, end = runs.start(name), runs.state(name, HALF)
    trained, alone = (load_checkpoint(runs.checkpoint(run, HALF))["trained"] for run in (name, single(name)))

    moved = {key for key in start if not torch.equal(start[key], end[key])}

    assert moved == set(trained) == set(alone)
    assert 0 < len(moved) < len(start)


@pytest.mark.slow
@pytest.mark.parametrize("name", BF16_RUNS)
def test_bf16_arithmetic_has_float32_weights_and_state(runs: Runs, name: str) -> None:
    end = runs.state(name, HALF)

    assert {dtype for h in runs.contents(name) for dtype in h["dtypes"]} == {"torch.float32"}
    # The tower's frozen matrices, whose originals checkpoints hold.
    assert {dtype for h in runs.contents(name) for dtype in h["frozen_dtypes"]} == {"torch.float32", "torch.bfloat16"}
    matrices = [t for key, t in end.items() if key.startswith("net.decoder.layers") and t.ndim == 2]
    assert all((t != t.bfloat16().float()).float().mean() > 0.9 for t in matrices)  # more bits than bf16 has
    # bf16 has 8 bits: measured 1e-3 in a loss of 5
    assert runs.column(name, "train/loss") == pytest.approx(runs.column("one-bf16", "train/loss"), rel=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["fsdp", "fsdp1"])
def test_a_sharded_model_writes_the_single_process_s_answers(runs: Runs, strategy: str) -> None:
    answers = [(runs.folder / f"{name}-predict" / "predictions.jsonl").read_text() for name in (strategy, "one")]

    assert answers[0] == answers[1]
    assert len(set(answers[0].splitlines())) > 3


@pytest.fixture
def broken_weights(tmp_path: Path, trained: Path) -> Path:
    """A model folder whose configuration fits, and whose weights cannot be read."""
    kosmos = load_checkpoint(trained / "checkpoints/step=00000006.ckpt")["hyper_parameters"]["kosmos"]
    folder = tmp_path / "broken"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "kosmos-lit", "kosmos": kosmos}), encoding="utf-8")
    (folder / "model.safetensors").write_bytes(b"no tensors")
    return folder


@pytest.mark.slow
def test_ranks_that_do_not_divide_a_step_are_named_before_the_model_is_built(
    tmp_path: Path, tiny_world: Path, broken_weights: Path
) -> None:
    more = sharded("fsdp", 2, "--data.global_batch_rows=5", f"--model.init_from={broken_weights}")

    end = run(tiny_run("fit", tmp_path, tiny_world, *more))

    assert end.returncode == 2
    assert "5 is not divisible by 2 ranks x 1 micro_batch_rows; use a multiple of 2 rows, or 1 or 5 ranks" in end.stderr
    assert "broken" not in end.stderr


@pytest.mark.slow
def test_a_model_that_rank_0_cannot_build_ends_all_ranks_with_one_message(
    tmp_path: Path, tiny_world: Path, broken_weights: Path
) -> None:
    end = run(tiny_run("fit", tmp_path, tiny_world, *sharded("fsdp", 2, f"--model.init_from={broken_weights}")))

    assert end.returncode == 2
    assert end.stderr.count("error: ") == end.stderr.count("broken") == 1


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--trainer.precision=16-mixed"], "trainer.precision is 16-mixed, but configs/trainer/fsdp.yaml needs 32-true"),
        (["--trainer.precision=bf16-true"], "trainer.precision is bf16-true, but configs/trainer/fsdp.yaml needs 32-true"),
        (["-c", "configs/trainer/fsdp1.yaml", "--trainer.precision=16-true"], "configs/trainer/fsdp1.yaml needs 32-true"),
        (["--trainer.strategy.init_args.tensor_parallel_size=2"], "'tensor_parallel_size' is not accepted"),
        (["--trainer.strategy=fsdp"], "fsdp does not know this model's units; use -c configs/trainer/fsdp.yaml"),
        (["--trainer.strategy=nonsense"], "invalid strategy name"),
        (["--trainer.devices=6", SHARD_SIZE + "4"], "does not divide 6 ranks"),
        ([SHARD_SIZE + "1"], "no weight is sharded; use -c configs/trainer/ddp.yaml"),
    ],
)
def test_invalid_settings_are_refused_before_ranks_start(
    tmp_path: Path, tiny_world: Path, capsys: pytest.CaptureFixture[str], flags: list[str], expected: str
) -> None:
    code = main(tiny_run("fit", tmp_path, tiny_world, *sharded("fsdp", 2), *flags))

    assert code == 2
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize("strategy", [ModelParallelStrategy(), FSDPStrategy()])
def test_lightning_s_own_strategies_are_refused(strategy: Strategy) -> None:
    with pytest.raises(UserError, match="does not know this model's units"):
        check_strategy(strategy)
