"""A step has the same rows and gradient for any number of ranks and micro-batches."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml

from datamodules import MixtureData
from kosmos_lit.checkpoint import load_checkpoint
from kosmos_lit.cli import main
from kosmos_lit.cli.trainer import DataCLI
from kosmos_lit.cli.verify_resume import compare
from tests.cli_runs import TINY, losses, run, tiny_run
from tests.ranks import on_ranks

NO_DROPOUT = [
    "--model.kosmos.decoder.dropout_rate=0",
    "--model.kosmos.decoder.attention_dropout_rate=0",
    "--model.kosmos.connector.attention_dropout_rate=0",
]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, tiny_world: Path) -> Path:
    """One rank, one micro-batch a step."""
    folder = tmp_path_factory.mktemp("plain")
    assert main(tiny_run("fit", folder, tiny_world, *NO_DROPOUT, "--data.micro_batch_rows=4")) == 0
    return folder


def assert_close(one: Path, other: Path) -> None:
    # fp32 sums in another order, six Adam steps at up to 3e-3: measured 2e-6 in the loss, 3e-5 in the weights
    a, b = losses(one), losses(other)
    assert list(map(float, a.values())) == pytest.approx(list(map(float, b.values())), rel=2e-5)
    for (name, x), y in zip(state(one).items(), state(other).values(), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-3, msg=lambda text, name=name: f"{name}: {text}")


def state(folder: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(folder / "checkpoints" / "step=00000006.ckpt")["state_dict"]  # type: ignore[no-any-return]


@pytest.mark.parametrize("micro_batch_rows", [1, 2])
def test_accumulation_does_not_change_a_step(plain: Path, tmp_path: Path, tiny_world: Path, micro_batch_rows: int) -> None:
    more = [*NO_DROPOUT, f"--data.micro_batch_rows={micro_batch_rows}"]

    assert main(tiny_run("fit", tmp_path, tiny_world, *more)) == 0

    assert_close(plain, tmp_path)


def test_loader_workers_do_not_change_losses(trained: Path, tmp_path: Path, tiny_world: Path) -> None:
    assert main(tiny_run("fit", tmp_path, tiny_world, "--data.num_workers=2")) == 0

    assert losses(tmp_path) == losses(trained)


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "workers"), [(2, 0), (2, 2), (4, 0)])
def test_ranks_and_their_workers_do_not_change_a_step(
    plain: Path, tmp_path: Path, tiny_world: Path, ranks: int, workers: int
) -> None:
    callbacks = yaml.safe_load(Path(TINY).read_text(encoding="utf-8"))["trainer"]["callbacks"]
    callbacks.append({"class_path": "tests.recording_callbacks.CountValidation"})
    (tmp_path / "count.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": callbacks}}), encoding="utf-8")
    shared = [f"--trainer.devices={ranks}", "--trainer.strategy=ddp", f"--data.num_workers={workers}"]
    more = ["-c", str(tmp_path / "count.yaml"), *NO_DROPOUT, *shared, "--data.micro_batch_rows=1"]

    end = run(tiny_run("fit", tmp_path, tiny_world, *more))

    assert end.returncode == 0, end.stderr
    assert_close(plain, tmp_path)
    assert [c.step for c in compare(plain, tmp_path)] == [3, 6]
    assert all(c.has_same_rows for c in compare(plain, tmp_path))
    # 3 rows of each source, or all that it has, and at most one row a batch: a sanity batch, and two whole validations.
    counts = [(tmp_path / f"validation-{rank}.txt").read_text().split() for rank in range(ranks)]
    data = DataCLI(tiny_run("fit", tmp_path, tiny_world)[1:]).datamodule
    assert isinstance(data, MixtureData)
    data.open()
    n_rows = sum(min(3, source.val.plan.n_rows) for source in data.prepared.values() if source.val is not None)
    assert n_rows % 2 == 1 or ranks == 4  # not divisible: some rank has fewer rows than others
    assert counts == [["1", *[str(-(-n_rows // ranks))] * 2]] * ranks


@pytest.mark.slow
@pytest.mark.parametrize(
    "part",
    [
        ["--model.kosmos.lora.rank=3", "--model.kosmos.lora.dropout_rate=0"],
        ['--model.freeze=["vision", "decoder.layers.0", "connector.x_attn"]'],
    ],
    ids=["adapters", "frozen"],
)
def test_ranks_do_not_change_a_step_of_a_part_where_most_rows_have_no_image(
    tmp_path: Path, tiny_world: Path, part: list[str]
) -> None:
    texts = ["--data.ratio.text=0.9", "--data.ratio.caption=0.1", "--data.ratio.interleaved=0"]
    more = [*NO_DROPOUT, *part, *texts]
    one_rank, two_ranks = tmp_path / "one", tmp_path / "two"
    assert main(tiny_run("fit", one_rank, tiny_world, *more, "--data.micro_batch_rows=4")) == 0

    by_two = ["--trainer.devices=2", "--trainer.strategy=ddp", "--data.micro_batch_rows=1"]
    end = run(tiny_run("fit", two_ranks, tiny_world, *more, *by_two))

    assert end.returncode == 0, end.stderr
    assert_close(one_rank, two_ranks)


@pytest.mark.slow
def test_gradients_in_ddp_s_buckets_are_allocated_once_and_change_no_bit(tmp_path: Path, tiny_world: Path) -> None:
    record = ["--trainer.callbacks+=tests.recording_callbacks.RecordGradients", "--data.micro_batch_rows=1"]
    overlay = ["-c", "configs/trainer/ddp.yaml", "--trainer.accelerator=cpu", "--trainer.precision=32-true"]
    commands = {"views": [*overlay, "--trainer.devices=2"], "copies": ["--trainer.strategy=ddp", "--trainer.devices=2"]}
    runs = [tiny_run("fit", tmp_path / name, tiny_world, *flags, *record) for name, flags in commands.items()]

    on_ranks(2, runs, tmp_path / "ranks")

    views, copies = tmp_path / "views", tmp_path / "copies"
    assert losses(views) == losses(copies)
    assert all(torch.equal(a, b) for a, b in zip(state(views).values(), state(copies).values(), strict=True))
    n_storages, n_bytes = map(min, zip(*json.loads((copies / "gradients-1.json").read_text()), strict=True))
    assert n_storages > 50
    # Two micro-batches a step: the second is summed over ranks, the first is not; a validation after the third step. The
    # first micro-batch of all comes before the views.
    later = json.loads((views / "gradients-1.json").read_text())[1:]
    assert len(later) == 11
    assert all(n < 5 and total == n_bytes for n, total in later)


@pytest.mark.slow
def test_a_run_resumes_on_another_number_of_ranks(plain: Path, tmp_path: Path, tiny_world: Path) -> None:
    one_rank = [*NO_DROPOUT, "--trainer.max_steps=3", "--data.micro_batch_rows=4"]
    two_ranks = [*NO_DROPOUT, "--trainer.devices=2", "--trainer.strategy=ddp", "--data.micro_batch_rows=1"]
    assert main(tiny_run("fit", tmp_path, tiny_world, *one_rank)) == 0

    end = run(tiny_run("fit", tmp_path, tiny_world, *two_ranks, "--ckpt_path=last"))

    assert end.returncode == 0, end.stderr
    assert_close(plain, tmp_path)
