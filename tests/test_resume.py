"""A run that is killed and resumed equals an uninterrupted run."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from itertools import count, islice
from pathlib import Path
from random import Random

import pytest
import torch
import yaml

from datamodules import MixtureData
from datamodules.stream import Stream
from kosmos_lit.checkpoint import load_checkpoint
from kosmos_lit.cli import main
from kosmos_lit.cli.trainer import DataCLI
from kosmos_lit.cli.verify_resume import compare
from tests.cli_runs import ROOT, TINY, losses, run, start, tiny_run


def weights(folder: Path, step: int) -> dict[str, torch.Tensor]:
    return load_checkpoint(folder / "checkpoints" / f"step={step:08d}.ckpt")["state_dict"]  # type: ignore[no-any-return]


def assert_same(one: Path, other: Path, step: int) -> None:
    assert losses(one) == losses(other)
    a, b = weights(one, step), weights(other, step)
    assert a.keys() == b.keys()
    assert [k for k in a if not torch.equal(a[k], b[k])] == []


def test_a_run_in_two_parts_equals_one_run(trained: Path, tmp_path: Path, tiny_world: Path) -> None:
    assert main(tiny_run("fit", tmp_path, tiny_world, "--trainer.max_steps=4")) == 0
    assert main(tiny_run("fit", tmp_path, tiny_world, "--ckpt_path=last")) == 0

    assert_same(tmp_path, trained, 6)


@pytest.mark.parametrize("micro_batch_rows", [1, 4])
def test_a_run_goes_on_with_other_micro_batches(tmp_path: Path, tiny_world: Path, micro_batch_rows: int) -> None:
    rates = ["decoder.dropout_rate", "decoder.attention_dropout_rate", "connector.attention_dropout_rate"]
    plain = [f"--model.kosmos.{name}=0" for name in rates]
    straight, parts = tmp_path / "straight", tmp_path / "parts"
    assert main(tiny_run("fit", straight, tiny_world, *plain)) == 0
    assert main(tiny_run("fit", parts, tiny_world, *plain, "--trainer.max_steps=3")) == 0

    more = ["--ckpt_path=last", f"--data.micro_batch_rows={micro_batch_rows}"]
    assert main(tiny_run("fit", parts, tiny_world, *plain, *more)) == 0

    # fp32 sums in another order: measured 2e-6
    assert list(map(float, losses(parts).values())) == pytest.approx(list(map(float, losses(straight).values())), rel=2e-5)


def test_a_checkpoint_is_named_after_its_own_step(tmp_path: Path, tiny_world: Path) -> None:
    assert main(tiny_run("fit", tmp_path, tiny_world, "--trainer.log_every_n_steps=2")) == 0

    for path in (tmp_path / "checkpoints").iterdir():
        assert path.name == f"step={load_checkpoint(path)['global_step']:08d}.ckpt"


def test_a_resumed_run_uses_its_own_optimizer_settings(tmp_path: Path, tiny_world: Path) -> None:
    assert main(tiny_run("fit", tmp_path, tiny_world, "--trainer.max_steps=3")) == 0

    more = ["--ckpt_path=last", "--model.optimizer.lr=1e-4", "--model.optimizer.weight_decay=0.5"]
    assert main(tiny_run("fit", tmp_path, tiny_world, *more)) == 0

    checkpoint = load_checkpoint(tmp_path / "checkpoints" / "step=00000006.ckpt")
    group = checkpoint["optimizer_states"][0]["param_groups"][0]
    assert group["weight_decay"] == 0.5
    assert group["lr"] < 1e-4


def test_a_run_whose_gradient_is_not_finite_ends_and_keeps_its_checkpoints(
    tmp_path: Path, tiny_world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(tiny_run("fit", tmp_path, tiny_world, "--trainer.max_steps=3")) == 0
    before = {p.name: p.read_bytes() for p in (tmp_path / "checkpoints").iterdir()}

    code = main(tiny_run("fit", tmp_path, tiny_world, "--ckpt_path=last", "--model.optimizer.lr=1e38"))

    assert code == 2
    assert "the gradient's norm is" in capsys.readouterr().err
    assert {p.name: p.read_bytes() for p in (tmp_path / "checkpoints").iterdir()} == before


def test_a_trial_run_leaves_no_checkpoint(tmp_path: Path, tiny_world: Path) -> None:
    assert main(tiny_run("fit", tmp_path, tiny_world, "--trainer.fast_dev_run=2", "--data.micro_batch_rows=4")) == 0

    assert not list(tmp_path.rglob("*.ckpt"))


def test_the_last_step_is_kept_even_between_two_checkpoints(tmp_path: Path, tiny_world: Path) -> None:
    assert main(tiny_run("fit", tmp_path, tiny_world, "--trainer.max_steps=4")) == 0

    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step=00000003.ckpt", "step=00000004.ckpt"]


def test_resuming_without_a_checkpoint_starts_from_the_beginning(
    tmp_path: Path, tiny_world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(tiny_run("fit", tmp_path, tiny_world, "--trainer.max_steps=1", "--ckpt_path=last")) == 0

    assert "starting from the beginning" in capsys.readouterr().out


def test_a_damaged_last_checkpoint_is_skipped(trained: Path, tmp_path: Path, tiny_world: Path) -> None:
    assert main(tiny_run("fit", tmp_path, tiny_world)) == 0
    newest = tmp_path / "checkpoints" / "step=00000006.ckpt"
    newest.write_bytes(newest.read_bytes()[:1000])

    assert main(tiny_run("fit", tmp_path, tiny_world, "--ckpt_path=last")) == 0

    assert_same(tmp_path, trained, 6)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_step_and_writes_a_checkpoint(tmp_path: Path, tiny_world: Path, number: int, code: int) -> None:
    endless = ["--trainer.max_steps=100000", "--trainer.val_check_interval=100000", "--data.num_workers=1"]
    process = start(tiny_run("fit", tmp_path, tiny_world, *endless), start_new_session=True)
    _wait_for_checkpoint(tmp_path)

    os.killpg(process.pid, number)  # as a terminal does: to the loader's processes too
    _, err = process.communicate(timeout=60)

    assert process.returncode == code
    assert "writing a checkpoint" in err
    assert "Traceback" not in err


# ---- killed


def keeping_all(folder: Path, tiny_world: Path, *more: str, every: int = 3, die_in: list[int] | None = None) -> list[str]:
    """Return the arguments of a run that keeps all its checkpoints and resumes from the last one."""
    folder.mkdir()
    callbacks = yaml.safe_load(Path(TINY).read_text(encoding="utf-8"))["trainer"]["callbacks"]
    callbacks[-1]["init_args"] |= {"dirpath": str(folder / "checkpoints"), "keep": -1, "every_n_train_steps": every}
    if die_in:
        callbacks.append({"class_path": "tests.kill_runs.DieInSteps", "init_args": {"steps": die_in}})
    (folder / "keep.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": callbacks}}), encoding="utf-8")
    steps = ["--trainer.val_check_interval=17", "--data.num_workers=1", "--ckpt_path=last"]
    return [*tiny_run("fit", folder, tiny_world, "-c", str(folder / "keep.yaml")), *steps, *more]


def killed(folder: Path, moments: list[str], arguments: list[str]) -> list[tuple[str, int]]:
    """Run to the end through kills at `moments`; return each moment, and the last checkpoint's step at it (0: none)."""
    command = [sys.executable, "-m", "tests.kill_runs", str(folder), "5", ",".join(moments), "--", *arguments]
    end = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert end.returncode == 0, end.stderr
    deaths = [line.split() for line in end.stdout.splitlines()]
    assert [(moment, how) for moment, _, how in deaths] == [(moment, "killed") for moment in moments]
    return [(moment, 0 if left == "-" else int(left[5:13])) for moment, left, _ in deaths]


def assert_same_log(uninterrupted: Path, resumed: Path, left: list[int], rel: float = 0.0) -> None:
    """A step is logged right behind its checkpoint: only the last step before a kill may be missing."""
    expected, logged = losses(uninterrupted), losses(resumed)
    assert expected.keys() - logged.keys() <= set(left)
    values = {step: float(loss) for step, loss in logged.items()}
    assert values == pytest.approx({step: float(expected[step]) for step in logged}, rel=rel, abs=0)


@pytest.fixture(scope="module")
def world_stream(tiny_world: Path) -> Stream:
    """The stream of these runs."""
    data = DataCLI(tiny_run("fit", tiny_world, tiny_world)[1:]).datamodule
    assert isinstance(data, MixtureData)
    data.open()
    return data.stream()


@pytest.mark.slow
def test_a_run_killed_at_20_moments_reads_the_same_rows_and_gets_the_same_weights(tmp_path: Path, tiny_world: Path) -> None:
    steps = "--trainer.max_steps=150"
    straight, parts = tmp_path / "straight", tmp_path / "killed"
    end = run(keeping_all(straight, tiny_world, steps))
    assert end.returncode == 0, end.stderr
    draw = Random(5)
    moments = ["starting", "writing", *draw.choices(["starting", "writing", "1", "2"], [2, 3, 10, 3], k=18)]
    draw.shuffle(moments)

    left = [step for _, step in killed(parts, moments, keeping_all(parts, tiny_world, steps))]

    compared = compare(straight, parts)
    assert [c.step for c in compared] == list(range(3, 153, 3))
    assert set(left) - {0} <= {c.step for c in compared}
    assert [c.describe() for c in compared if not c.is_same()] == []
    assert_same_log(straight, parts, left)


def test_what_is_kept_is_counted_on_disk_over_all_starts(tmp_path: Path, tiny_world: Path) -> None:
    callbacks = yaml.safe_load(Path(TINY).read_text(encoding="utf-8"))["trainer"]["callbacks"]
    folder = tmp_path / "checkpoints"
    callbacks[-1]["init_args"] |= {"dirpath": str(folder), "keep": 2, "every_n_train_steps": 1}
    (tmp_path / "keep.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": callbacks}}), encoding="utf-8")
    arguments = tiny_run("fit", tmp_path, tiny_world, "-c", str(tmp_path / "keep.yaml"))
    assert main([*arguments, "--trainer.max_steps=3"]) == 0
    # What starts that were killed have left, and a file that is no checkpoint of the run's.
    for name in ("step=00000000.ckpt", "step=00000001.ckpt", "mine.ckpt"):
        shutil.copy(folder / "step=00000002.ckpt", folder / name)

    assert main([*arguments, "--ckpt_path=last"]) == 0

    assert sorted(p.name for p in folder.iterdir()) == ["mine.ckpt", "step=00000005.ckpt", "step=00000006.ckpt"]


@pytest.mark.slow
def test_a_run_killed_twice_in_one_epoch_and_at_epochs_edges_equals_an_uninterrupted_run(
    tmp_path: Path, tiny_world: Path, world_stream: Stream
) -> None:
    G = 4
    n = world_stream.by_name["caption"].plan.n_rows
    edges = [row_of(world_stream, "caption", epoch * n) for epoch in (1, 2)]
    assert [epochs(world_stream, range(edge - G, edge + 1), "caption")[-2:] for edge in edges] == [[0, 1], [1, 2]]
    at_edges = [edge // G + 1 for edge in edges]  # the steps, the first being 1, that read the new epochs' first rows
    twice = [5, 9]
    assert set(epochs(world_stream, range(twice[-1] * G), "caption")) == {0}
    die_in = [*twice, at_edges[0], at_edges[0] + 2, at_edges[1]]
    steps = f"--trainer.max_steps={die_in[-1] + 3}"
    straight, parts = tmp_path / "straight", tmp_path / "killed"
    assert run(keeping_all(straight, tiny_world, steps, every=1)).returncode == 0

    left = killed(parts, ["own"] * len(die_in), keeping_all(parts, tiny_world, steps, every=1, die_in=die_in))

    assert [step for _, step in left] == [step - 1 for step in die_in]
    compared = compare(straight, parts)
    assert [c.step for c in compared] == list(range(1, die_in[-1] + 4))
    assert [c.describe() for c in compared if not c.is_same()] == []


def row_of(stream: Stream, name: str, number: int) -> int:
    """Return the stream row that is a source's `number`-th."""
    rows = (row for row in count() if stream.locate(row)[0].name == name)
    return next(islice(rows, number, None))


def epochs(stream: Stream, rows: range, name: str) -> list[int]:
    """Return the epoch of each of a source's rows."""
    return [epoch for source, epoch, _ in map(stream.locate, rows) if source.name == name]


@pytest.mark.slow
def test_a_killed_run_goes_on_with_other_ranks_and_reads_the_same_rows(tmp_path: Path, tiny_world: Path) -> None:
    rates = ["decoder.dropout_rate", "decoder.attention_dropout_rate", "connector.attention_dropout_rate"]
    plain = [*(f"--model.kosmos.{name}=0" for name in rates), "--trainer.max_steps=24"]
    one, changing = tmp_path / "one", tmp_path / "changing"
    assert run(keeping_all(one, tiny_world, *plain)).returncode == 0
    arguments = keeping_all(changing, tiny_world, *plain)
    left = []
    for ranks in (1, 2, 4):
        before = len(list((changing / "checkpoints").glob("*.ckpt")))
        process = start([*arguments, *on_ranks(ranks)], start_new_session=True)
        _wait_for_checkpoint(changing, before + 1)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        left.append(int(max((changing / "checkpoints").glob("*.ckpt")).stem[5:]))

    end = run(arguments)

    assert end.returncode == 0, end.stderr
    compared = compare(one, changing)
    assert [c.step for c in compared] == list(range(3, 27, 3))
    assert all(c.has_same_rows for c in compared)
    # fp32 sums in another order, 24 Adam steps at up to 3e-3
    assert compared[-1].distance < 3e-3
    assert_same_log(one, changing, left, rel=2e-4)


def on_ranks(ranks: int) -> list[str]:
    return [f"--trainer.devices={ranks}", "--trainer.strategy=ddp", "--data.micro_batch_rows=1"] if ranks > 1 else []


def _wait_for_checkpoint(folder: Path, n: int = 1) -> None:
    """Wait until a run has written `n` checkpoints."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if len(list((folder / "checkpoints").glob("*.ckpt"))) >= n:
            return
        time.sleep(0.02)
    raise AssertionError(f"no checkpoint appears in {folder}")
