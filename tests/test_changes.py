"""A run that goes on with other data: refusals, messages, and the rows that it reads."""

from __future__ import annotations

import csv
import json
import shutil
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import yaml

from datamodules import MixtureData
from datamodules.io.compression import open_compressed
from datamodules.stream import Stream
from kosmos_lit.batch import CORPORA, DIGEST_MASK
from kosmos_lit.checkpoint import load_checkpoint
from kosmos_lit.cli import main
from kosmos_lit.cli.run_log import read_log
from kosmos_lit.cli.trainer import DataCLI
from kosmos_lit.cli.verify_resume import compare
from tests.cli_runs import tiny_run

pytestmark = pytest.mark.xdist_group("changes")  # one worker: its runs are made once

G = 4
ACCEPT = "--data.accept_changes=true"
RESUME = ["--ckpt_path=last"]

Refused = Callable[..., str]


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Refused:
    """Runs a verb that must end with a UserError, and returns the message."""

    def run(arguments: list[str]) -> str:
        assert main(arguments) == 2
        return capsys.readouterr().err.strip().splitlines()[-1]

    return run


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory, tiny_world: Path) -> Path:
    """The folder of a run of three steps; a test must not change it."""
    folder = tmp_path_factory.mktemp("begun")
    assert main(tiny_run("fit", folder, tiny_world, "--trainer.max_steps=3")) == 0
    return folder


@pytest.fixture
def folder(begun: Path, tmp_path: Path) -> Path:
    """A copy of that run."""
    shutil.copytree(begun, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def extra(tmp_path: Path, tiny_world: Path) -> list[str]:
    """Arguments that give another source of texts, `more`, of 11 documents of the world."""
    with open_compressed(sorted(tiny_world.glob("text-*.jsonl.zst"))[0]) as file:
        lines = file.read()
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "a.jsonl").write_bytes(b"".join(lines.splitlines(keepends=True)[:11]))
    return more_of(tmp_path)


def more_of(folder: Path, **options: Any) -> list[str]:
    source = {"format": "jsonl", "input": [f"{folder}/more/*.jsonl"], "index": f"{folder}/more/index", "val_share": 0.0}
    config = {"data": {"class_path": "datamodules.WorldData", "init_args": {"sources": {"more": source | options}}}}
    (folder / "more.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    return ["-c", str(folder / "more.yaml")]


def last(folder: Path) -> Path:
    return max((folder / "checkpoints").glob("*.ckpt"))


def printed(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> list[dict[str, Any]]:
    """Return what `rows --json` prints."""
    capsys.readouterr()
    assert main([*arguments, "--json"]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]


def total(rows: list[dict[str, Any]]) -> str:
    return f"{sum(int(row['digest'], 16) for row in rows) & DIGEST_MASK:016x}"


def by_source(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """Return the rows of each source in order, without their numbers."""
    sources: dict[str, list[Any]] = {}
    for row in rows:
        sources.setdefault(row["source"], []).append((row["epoch"], row["documents"], row["tokens"]))
    return sources


# ---- other shares


def test_other_shares_that_are_not_accepted_are_refused_and_both_are_named(
    refused: Refused, folder: Path, tiny_world: Path
) -> None:
    message = refused(tiny_run("fit", folder, tiny_world, *RESUME, "--data.ratio.caption=1"))

    assert "from row 12 on the mixture would differ" in message
    assert "shares of rows were from row 12: text 41.7%, caption 41.7%, interleaved 16.7%" in message
    assert "they are from row 12: text 62.5%, caption 12.5%, interleaved 25.0%" in message
    assert last(folder).name == "step=00000003.ckpt"


def test_accepted_shares_hold_from_the_checkpoint_on_and_rows_before_stay(
    begun: Path,
    folder: Path,
    tiny_world: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    more = ["--data.ratio.caption=1", ACCEPT]

    assert main(tiny_run("fit", folder, tiny_world, *RESUME, *more)) == 0

    assert "from row 12 on: shares of rows were from row 12: text 41.7%, " in caplog.text
    assert "they are from row 12: text 62.5%" in caplog.text
    assert last(folder).name == "step=00000006.ckpt"
    read = printed(capsys, tiny_run("rows", folder, tiny_world, *more, "--ckpt_path", str(last(folder)), "--count", "24"))
    straight = printed(capsys, tiny_run("rows", folder, tiny_world, "--count", "24"))
    assert [row["row"] for row in read] == list(range(24))
    # The printed rows are those that were read: checkpoints hold the sum of their digests.
    assert total(read[:12]) == load_checkpoint(last(begun))["rows_digest"]
    assert total(read) == load_checkpoint(last(folder))["rows_digest"]
    assert read[:12] == straight[:12]
    assert read[12:] != straight[12:]
    # Each source goes on behind its last row.
    for source, rows in by_source(read).items():
        expected = by_source(straight)[source]
        assert rows[: len(expected)] == expected[: len(rows)]
    assert {k: len(v) for k, v in by_source(read[12:]).items()} == {"text": 8, "caption": 1, "interleaved": 3}


@pytest.mark.slow
def test_a_changed_run_is_resumed_again_without_a_message(
    folder: Path, tmp_path: Path, tiny_world: Path, caplog: pytest.LogCaptureFixture
) -> None:
    changed = [*RESUME, "--data.ratio.caption=1", "--trainer.val_check_interval=6"]
    shutil.copytree(folder, tmp_path / "straight")
    assert main(tiny_run("fit", tmp_path / "straight", tiny_world, *changed, ACCEPT, "--trainer.max_steps=6")) == 0
    assert main(tiny_run("fit", folder, tiny_world, *changed, ACCEPT, "--trainer.max_steps=4")) == 0
    caplog.clear()

    assert main(tiny_run("fit", folder, tiny_world, *changed, "--trainer.max_steps=6")) == 0

    assert "shares of rows" not in caplog.text
    compared = {c.step: c.is_same() for c in compare(tmp_path / "straight", folder)}
    assert compared[6]


# ---- other sources


def test_a_new_source_must_be_accepted(refused: Refused, folder: Path, tiny_world: Path, extra: list[str]) -> None:
    message = refused(tiny_run("fit", folder, tiny_world, *extra, *RESUME))

    assert "source more is new; shares of rows were from row 12: text 41.7%" in message
    assert "they are from row 12: text 20.8%, caption 41.7%, interleaved 16.7%, more 20.8%" in message


def test_an_accepted_source_is_read_from_its_first_row_on_and_logged(
    folder: Path,
    tiny_world: Path,
    extra: list[str],
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert main(tiny_run("fit", folder, tiny_world, *extra, *RESUME, ACCEPT)) == 0

    assert "from row 12 on: source more is new" in caplog.text
    arguments = tiny_run("rows", folder, tiny_world, *extra, "--ckpt_path", str(last(folder)), "--count", "24")
    read = printed(capsys, arguments)
    assert total(read) == load_checkpoint(last(folder))["rows_digest"]
    counts = Counter(row["source"] for row in read[12:])
    assert counts == {"text": 2, "caption": 5, "interleaved": 2, "more": 3}
    alone = ["--data.ratio.caption=0", "--data.ratio.interleaved=0"]
    expected = by_source(printed(capsys, tiny_run("rows", folder, tiny_world, *extra, *alone, "--count", "6")))["more"]
    assert by_source(read)["more"] == expected[:3]
    mix = [float(read_log(folder)[6][f"mix/{name}"]) for name in ("text", "text/more", "caption")]
    assert mix == pytest.approx([5 / 12, 3 / 12, 5 / 12])


@pytest.mark.slow
def test_a_source_that_is_no_longer_read_is_named_and_the_run_goes_on_without_it(
    folder: Path, tmp_path: Path, tiny_world: Path, extra: list[str], refused: Refused, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(tiny_run("fit", folder, tiny_world, *extra, *RESUME, ACCEPT)) == 0
    shutil.rmtree(tmp_path / "more")

    longer = [*RESUME, "--trainer.max_steps=9"]
    assert "source more is no longer read; shares of rows" in refused(tiny_run("fit", folder, tiny_world, *longer))
    assert main(tiny_run("fit", folder, tiny_world, *longer, ACCEPT)) == 0

    rows = tiny_run("rows", folder, tiny_world, "--ckpt_path", str(last(folder)))
    read = printed(capsys, [*rows, "--start", "24", "--count", "12"])
    assert Counter(row["source"] for row in read) == {"text": 5, "caption": 5, "interleaved": 2}
    message = refused([*rows, "--start", "12", "--count", "12"])
    assert "came from a source that this run's config no longer names" in message


def test_a_source_with_more_files_is_refused_even_if_changes_are_accepted(
    folder: Path, tmp_path: Path, tiny_world: Path, extra: list[str], refused: Refused
) -> None:
    arguments = tiny_run("fit", folder, tiny_world, *extra, *RESUME, ACCEPT)
    assert main(arguments) == 0
    shutil.copy(tmp_path / "more" / "a.jsonl", tmp_path / "more" / "b.jsonl")
    longer = [*arguments, "--trainer.max_steps=9"]

    assert f"{tmp_path}/more/index was prepared differently" in refused(longer)
    shutil.rmtree(tmp_path / "more" / "index")  # a new index does not help either
    message = refused(longer)

    assert "the checkpoint's source more held other documents: documents was 11, is 22" in message
    assert "Put its files and index back" in message
    assert last(folder).name == "step=00000006.ckpt"


# ---- ratios by step


STAGES = [{"from_step": 3, "ratio": {"text": 1, "caption": 7}}, {"from_step": 5, "ratio": {"interleaved": 5}}]


def staged(folder: Path) -> list[str]:
    config = {"data": {"class_path": "datamodules.WorldData", "init_args": {"ratio_stages": STAGES}}}
    (folder / "stages.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    return ["-c", str(folder / "stages.yaml")]


def stream_of(arguments: list[str]) -> Stream:
    return data_of(arguments).stream()


def data_of(arguments: list[str]) -> MixtureData:
    data = DataCLI(arguments[1:]).datamodule
    assert isinstance(data, MixtureData)
    data.prepare_data()
    data.open()
    return data


def test_every_prefix_of_rows_follows_the_ratios_of_its_steps(tmp_path: Path, tiny_world: Path) -> None:
    stream = stream_of(tiny_run("fit", tmp_path, tiny_world, *staged(tmp_path)))
    ratios = [(5, 5, 2)] * 3 + [(1, 7, 2)] * 2 + [(1, 7, 5)] * 96

    ideal, counts = [Fraction(0)] * 3, [0] * 3
    for row in range(len(ratios) * G):
        ratio = ratios[row // G]
        ideal = [i + Fraction(r, sum(ratio)) for i, r in zip(ideal, ratio, strict=True)]
        counts[stream.locate(row)[0].kind] += 1
        assert all(abs(c - i) < 1 for c, i in zip(counts, ideal, strict=True)), row


@pytest.fixture(scope="module")
def staged_run(tmp_path_factory: pytest.TempPathFactory, tiny_world: Path) -> Path:
    folder = tmp_path_factory.mktemp("staged")
    assert main(tiny_run("fit", folder, tiny_world, *staged(folder))) == 0
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("step", [2, 3, 4], ids=["before", "at", "behind"])
def test_a_run_resumed_around_a_border_of_ratios_equals_the_uninterrupted_one(
    staged_run: Path, tmp_path: Path, tiny_world: Path, step: int
) -> None:
    arguments = tiny_run("fit", tmp_path, tiny_world, *staged(tmp_path))
    assert main([*arguments, f"--trainer.max_steps={step}"]) == 0

    assert main([*arguments, *RESUME]) == 0

    assert [c.describe() for c in compare(staged_run, tmp_path) if not c.is_same()] == []
    assert {c.step for c in compare(staged_run, tmp_path)} >= {6}


def test_ratios_of_later_steps_must_be_the_same_too(refused: Refused, staged_run: Path, tiny_world: Path) -> None:
    message = refused(tiny_run("fit", staged_run, tiny_world, *RESUME, "--trainer.max_steps=9"))

    assert "shares of rows were from row 24: text 7.7%, caption 53.8%, interleaved 38.5%" in message


# ---- an end of the data


def test_a_run_ends_before_a_source_is_read_more_often_than_allowed(
    tmp_path: Path, tiny_world: Path, extra: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    limited = more_of(tmp_path, max_epochs=1.5)
    arguments = tiny_run("fit", tmp_path / "run", tiny_world, *limited, "--trainer.val_check_interval=100")
    stream = stream_of(arguments)
    allowed = int(1.5 * stream.by_name["more"].plan.n_rows)

    assert main([*arguments, "--trainer.max_steps=1000"]) == 0

    step = load_checkpoint(last(tmp_path / "run"))["global_step"]
    read = [Counter(stream.locate(row)[0].name for row in range(s * G))["more"] for s in (step, step + 1)]
    assert read[0] <= allowed < read[1]
    message = f"training ends with step {step}, not 1,000: then source more would be read more than 1.5 times (max_epochs)"
    assert caplog.text.count(message) == 1
    assert max(read_log(tmp_path / "run")) == step
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "run" / "checkpoints").iterdir()}
    caplog.clear()

    assert main([*arguments, "--trainer.max_steps=1000", *RESUME]) == 0

    assert caplog.text.count(message) == 1
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "run" / "checkpoints").iterdir()} == before
    assert max(read_log(tmp_path / "run")) == step


def test_the_end_of_a_source_follows_from_the_rows_that_were_read_and_not_from_the_new_shares(
    tmp_path: Path, tiny_world: Path, extra: list[str]
) -> None:
    limited = more_of(tmp_path, max_epochs=0.5)
    arguments = tiny_run("fit", tmp_path / "run", tiny_world, *limited, "--trainer.val_check_interval=100")
    allowed = stream_of(arguments).by_name["more"].plan.n_rows // 2
    assert main([*arguments, "--trainer.max_steps=3"]) == 0
    # With this share from the start, the source would have ended before the step of the checkpoint.
    changed = [*arguments, "--data.ratio.caption=0.1", "--data.ratio.interleaved=0.1", ACCEPT]

    assert main([*changed, *RESUME, "--trainer.max_steps=1000"]) == 0

    step = load_checkpoint(last(tmp_path / "run"))["global_step"]
    data = data_of(changed)
    data.restore_history(load_checkpoint(last(tmp_path / "run"))["WorldData"])
    stream = data.stream()
    read = [Counter(stream.locate(row)[0].name for row in range(s * G))["more"] for s in (step, step + 1)]
    assert step > 3
    assert read[0] <= allowed < read[1]


# ---- the log, and other verbs


@pytest.mark.slow
@pytest.mark.parametrize("unit", ["tokens", "loss_tokens", "documents"])
def test_the_logged_mixture_is_the_configured_one_in_its_unit(tmp_path: Path, tiny_world: Path, unit: str) -> None:
    more = [f"--data.unit={unit}", "--trainer.max_steps=60", "--trainer.val_check_interval=100"]

    assert main(tiny_run("fit", tmp_path, tiny_world, *more)) == 0

    with (tmp_path / "csv" / "version_0" / "metrics.csv").open(encoding="utf-8", newline="") as file:
        end = [row for row in csv.DictReader(file) if row["train/loss"]][-1]
    logged_shares = [float(end[f"mix/{name}"]) for name in CORPORA]
    # 240 rows, of each kind within one row of its share. A row of captions holds some 7 documents, one of text
    # about one: a row of them is 7 of the some 280 documents, or 2.5 %, and rows are not equally full: 2 % more.
    assert logged_shares == pytest.approx([5 / 12, 5 / 12, 2 / 12, 0], abs=1 / 240 if unit == "tokens" else 0.045)


@pytest.mark.parametrize("verb", ["validate", "predict"])
def test_other_data_are_no_obstacle_to_evaluation(
    trained: Path, tmp_path: Path, tiny_world: Path, extra: list[str], verb: str
) -> None:
    other = [*extra, "--data.ratio.text=1", "--data.seed=7", "--data.seq_len=96", "--data.global_batch_rows=6"]

    assert main(tiny_run(verb, tmp_path, tiny_world, *other, "--ckpt_path", str(last(trained)))) == 0
