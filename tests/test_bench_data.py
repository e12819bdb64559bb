"""The parts of benchmarks/data.py run on a handful of pairs; webdataset and energon may be missing."""

from __future__ import annotations

import itertools

import pytest

from benchmarks import data as benchmark
from benchmarks.data_inputs import Inputs, make
from benchmarks.data_pipelines import MissingError

pytestmark = pytest.mark.xdist_group("bench_data")  # one worker: its inputs are made once


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return make(tmp_path_factory.mktemp("bench"), n_pairs=2, n_texts=61, n_documents=256, vocab_size=311)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # webdataset leaves its files open
def test_the_pipelines_read_synthetic_pairs(inputs: Inputs) -> None:
    own, *others = benchmark.compare(inputs, "256 px", workers=0, n_batches=2, n_rounds=1)

    assert own["pipeline"] == "ours"
    assert float(str(own["images/s"])) > float(str(own["rows/s"])) > 0
    assert all(line.get("ours over it") or "not installed" in str(line["skipped"]) for line in others)


def test_texts_are_measured_without_images(inputs: Inputs) -> None:
    assert float(str(benchmark.texts(inputs, n_rounds=1)["rows/s"])) > 0


def test_pipelines_take_turns_and_a_missing_one_is_named() -> None:
    turns: list[str] = []

    def pipeline(name: str, images: int):
        for _ in itertools.count():
            turns.append(name)
            yield images, 1

    def missing():
        raise MissingError("no such library")
        yield

    pipelines = {"a": lambda: pipeline("a", 7), "b": missing, "c": lambda: pipeline("c", 5)}
    rates, reasons = benchmark.rates(pipelines, n_batches=3, n_rounds=2, workers=0)

    assert "".join(turns) == "aaaaccccaaacccaaaccc"  # the first round reads one batch more
    assert reasons == {"b": "no such library"}
    assert [round(images / rows, 9) for images, rows in rates["a"] + rates["c"]] == [7, 7, 5, 5]


def test_the_table_shows_reasons_instead_of_rates(capsys: pytest.CaptureFixture[str]) -> None:
    benchmark.show([{"pipeline": "a", "rows/s": 3}, {"pipeline": "b", "skipped": "not here"}])

    assert capsys.readouterr().out.splitlines()[-2].split() == ["b", "not", "here"]
