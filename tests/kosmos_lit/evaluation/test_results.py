"""Results of earlier versions of the project are refused by one message, wherever they are read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kosmos_lit.errors import UserError
from kosmos_lit.evaluation.results import iterate_samples, read_results
from kosmos_lit.evaluation.storage import Store, check_fingerprint
from kosmos_lit.report.comparison import compare
from kosmos_lit.report.evaluation import write_report

MESSAGE = (
    r"results of an earlier version of kosmos-lit, .*: delete the folder or give another --eval\.folder, and run `kosmos-lit"
)
READERS: dict[str, Callable[[Path], Any]] = {
    "a test run": lambda folder: check_fingerprint(folder, {"weights": "a"}),
    "results": read_results,
    "a report": write_report,
    "a comparison": lambda folder: compare([folder], None),
}


@pytest.mark.parametrize("file", ["figures.json", "identity.json"])
@pytest.mark.parametrize("reader", READERS)
def test_files_of_an_earlier_version_are_refused(tmp_path: Path, reader: str, file: str) -> None:
    (tmp_path / file).write_text("{}", encoding="utf-8")

    with pytest.raises(UserError, match=MESSAGE):
        READERS[reader](tmp_path)


@pytest.mark.parametrize("read", [lambda path: list(iterate_samples(path)), lambda path: Store(path.parent).gather()])
def test_samples_of_an_earlier_version_are_refused(tmp_path: Path, read: Callable[[Path], Any]) -> None:
    line = {"key": "7", "requests": [], "said": "red", "right": "blue", "scores": {}, "data": {}, "error": None}
    path = tmp_path / "samples.jsonl"
    path.write_text(json.dumps(line) + "\n", encoding="utf-8")

    with pytest.raises(UserError, match=MESSAGE):
        read(path)


def test_an_evaluation_that_may_replace_results_deletes_those_of_an_earlier_version(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/identity.json").write_text("{}", encoding="utf-8")

    check_fingerprint(tmp_path / "out", {"weights": "a"}, replace=True)

    assert [path.name for path in (tmp_path / "out").iterdir()] == ["fingerprint.json"]
