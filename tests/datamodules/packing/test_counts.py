"""Counts of blocks that are stored beside an index."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from datamodules.corpus import IndexedCorpus
from datamodules.packing import counts
from datamodules.packing.row_plan import COUNTS, Blocks, RowLayout, RowPlan
from datamodules.packing.split import Split
from tests.datamodules.packing.offsets import Case, Offsets

LAYOUT = RowLayout(seq_len=23, n_latents=3, seed=5, block_documents=11, run_documents=3)
N = 997


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return Case(Offsets(["t" * (1 + k * 7919 % 13) for k in range(N)], folder=tmp_path), LAYOUT, val_share=0.1)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's cache."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


def without_locks(*_: object) -> None:
    raise OSError(errno.ENOLCK, "No locks available")


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The blocks in the order in which they are counted."""
    blocks: list[int] = []
    original = Blocks.count
    monkeypatch.setattr(Blocks, "count", lambda self, block: blocks.append(block) or original(self, block))
    return blocks


def stored(case: Case) -> Path:
    (path,) = (case.corpus.folder / "plans").glob("*.npz")
    return path


def test_stored_counts_equal_computed_counts(case):
    blocks = case.plan().blocks
    with np.load(stored(case)) as file:
        counts_in_file = file["counts"]
    again = np.concatenate([blocks.count(block)[0] for block in range(blocks.n_blocks)])
    assert counts_in_file.dtype == again.dtype == COUNTS
    assert counts_in_file.tobytes() == again.tobytes()


def test_a_second_start_packs_nothing(case, counted):
    first = case.plan()
    del counted[:]
    assert case.plan().totals == first.totals
    assert counted == []


def test_a_corpus_of_one_block_stores_nothing(case):
    Case(case.corpus, RowLayout(seq_len=23, n_latents=3, seed=5)).plan()
    assert list(case.corpus.folder.iterdir()) == []


@pytest.mark.parametrize(
    "changes", [{"seed": 7}, {"seq_len": 29}, {"n_latents": 2}, {"block_documents": 13}, {"run_documents": 2}]
)
def test_counts_of_another_layout_are_not_used(case, counted, changes):
    case.plan()
    del counted[:]
    Case(case.corpus, replace(LAYOUT, **changes), val_share=0.1).plan()
    assert counted


@pytest.mark.parametrize("changes", [{"val_share": 0.2}, {"val_input": ["1.tar"]}])
def test_counts_of_another_split_are_not_used(case, counted, changes):
    case.plan()
    del counted[:]
    Case(case.corpus, LAYOUT, **changes).plan()
    assert counted


def test_counts_of_training_are_not_those_of_validation(case):
    assert case.plan("train").totals.documents + case.plan("val").totals.documents == N


def test_counts_of_another_index_in_the_folder_are_not_used(case):
    case.plan()
    other = Offsets(["t" * 5] * N, folder=case.corpus.folder)
    assert Case(other, LAYOUT).plan().totals.targets == N * 6


@pytest.mark.parametrize("damage", [b"", b"PK", b"no archive", None])
def test_a_damaged_file_is_computed_again(case, damage):
    first = case.plan()
    data = stored(case).read_bytes()
    stored(case).write_bytes(data[: len(data) // 2] + b"\0\xff" + data[len(data) // 2 + 2 :] if damage is None else damage)
    assert case.plan().totals == first.totals
    assert stored(case).read_bytes() == data


def test_counts_of_an_index_that_cannot_be_written_are_stored_in_the_users_cache(case, counted, cache, capsys):
    (case.corpus.folder / "plans").write_text("in the way of a folder")
    first, again = case.plan(), case.plan()
    assert first.totals == again.totals
    assert counted == [*range(first.blocks.n_blocks)]
    (place,) = (cache / "kosmos-lit/plans").iterdir()
    assert capsys.readouterr().err.count(f"its row counts are stored in {place}\n") == 1


def test_indexes_that_cannot_be_written_share_nothing(case, counted, tmp_path_factory):
    folders = [case.corpus.folder, tmp_path_factory.mktemp("another")]
    for folder in folders:
        (folder / "plans").write_text("in the way of a folder")
        plan = replace(case, corpus=replace(case.corpus, folder=folder)).plan()
    assert counted == [*range(plan.blocks.n_blocks)] * 2


def test_without_locks_counts_are_computed_every_time(case, counted, cache, monkeypatch):
    monkeypatch.setattr(fcntl, "lockf", without_locks)
    first, again = case.plan(), case.plan()
    assert first.totals == again.totals
    assert counted == [*range(first.blocks.n_blocks)] * 2
    assert [*case.corpus.folder.rglob("*.npz"), *cache.rglob("*.npz")] == []


def test_counts_of_the_process_that_held_the_lock_are_used(case, counted, tmp_path):
    first = case.plan()
    stored(case).rename(tmp_path / "counts")
    del counted[:]
    other = """
import shutil, sys, time
from pathlib import Path
from datamodules.io.locks import locked
with locked(Path(sys.argv[2]).parent):
    print("held", flush=True)
    time.sleep(1)
    shutil.move(sys.argv[1], sys.argv[2])
"""
    place = case.corpus.folder / "plans" / f"{first.blocks.key}.npz"
    command = [sys.executable, "-c", other, str(tmp_path / "counts"), str(place)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(counts.__file__).parents[2]) as process:
        assert process.stdout.readline() == "held\n"
        assert case.plan().totals == first.totals
    assert counted == []


@pytest.mark.parametrize("place", ["a file", "relative/cache"])
def test_where_nothing_can_be_stored_counts_are_computed_every_time(case, counted, tmp_path_factory, monkeypatch, place):
    (case.corpus.folder / "plans").write_text("in the way of a folder")
    monkeypatch.chdir(tmp_path_factory.mktemp("cwd"))
    Path("a file").write_text("in the way of a folder")
    monkeypatch.setenv("XDG_CACHE_HOME", os.path.abspath(place) if place == "a file" else place)
    first, again = case.plan(), case.plan()
    assert first.totals == again.totals
    assert counted == [*range(first.blocks.n_blocks)] * 2


def test_an_interrupted_count_goes_on_where_it_was(case, monkeypatch):
    monkeypatch.setattr(counts, "PART", 7)
    counted_blocks: list[int] = []
    original = Blocks.count

    def count(self: Blocks, block: int):
        if block == 30 and 30 not in counted_blocks:
            counted_blocks.append(block)
            raise KeyboardInterrupt
        counted_blocks.append(block)
        return original(self, block)

    monkeypatch.setattr(Blocks, "count", count)
    with pytest.raises(KeyboardInterrupt):
        case.plan()
    del counted_blocks[:-1]
    plan = case.plan()
    assert counted_blocks == [30, *range(28, plan.blocks.n_blocks)]  # those before belong to stored parts
    assert [p.name for p in (case.corpus.folder / "plans").iterdir() if p.is_dir()] == []


def test_processes_count_what_one_process_counts(case, monkeypatch):
    monkeypatch.setattr(counts, "PART", 41)
    alone = case.plan()
    stored(case).unlink()
    together = RowPlan("drawn", case.corpus, case.split, "train", LAYOUT, workers=2)  # type: ignore[arg-type]
    assert together.totals == alone.totals
    assert together._n_rows.tolist() == alone._n_rows.tolist()


def test_an_index_is_planned_from_its_own_folder(corpora, tmp_path):
    corpus = corpora["caption"]
    for file in Path(corpus.folder).iterdir():
        (tmp_path / file.name).symlink_to(file)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    copy = IndexedCorpus(tmp_path)
    layout = RowLayout(seq_len=101, n_latents=3, seed=7, block_documents=5, run_documents=2)
    plan = RowPlan("caption", copy, Split(copy, 0.1, None), "train", layout, workers=2)
    assert plan.totals.images == plan.totals.documents == plan.totals.begun < manifest["documents"]
    assert len(list((tmp_path / "plans").glob("*.npz"))) == 1
