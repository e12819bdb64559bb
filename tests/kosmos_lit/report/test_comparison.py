"""Comparison of evaluations: differences over common samples, and warnings where samples or options differ."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kosmos_lit.cli import main
from kosmos_lit.errors import UserError
from kosmos_lit.report.comparison import compare, comparison_markdown
from tests.kosmos_lit.report.result_folders import failed_sample, task, text_sample, write_image, write_results
from tests.kosmos_lit.report.test_evaluation import Page


def samples(tmp_path: Path, correct: list[bool], prefix: str = "") -> list[dict[str, Any]]:
    """Return samples with an image, correct or not."""
    image = write_image(tmp_path / "image.png")
    return [text_sample(f"{prefix}{i:03d}", "x", "y", {"accuracy": float(r)}, images=[image]) for i, r in enumerate(correct)]


def test_a_paired_difference_sees_what_two_intervals_do_not(tmp_path: Path) -> None:
    # 54 against 46 of 101: intervals of ±10 points overlap, but no sample got worse
    one = write_results(tmp_path / "one", {"t": task(samples(tmp_path, [i < 54 for i in range(101)]))})
    other = write_results(tmp_path / "other", {"t": task(samples(tmp_path, [i < 46 for i in range(101)]))})

    (row,) = compare([one, other]).rows
    (difference,) = row.differences

    assert row.metrics[0]
    assert row.metrics[1]
    assert row.metrics[0].low < row.metrics[1].high
    assert difference
    assert difference.paired
    assert difference.is_better
    assert difference.metric.value == pytest.approx(800 / 101)


def test_the_summary_names_the_tasks_that_do_not_beat_all(tmp_path: Path) -> None:
    def folder(name: str, better: int, same: int) -> Path:
        tasks = {
            "better": task(samples(tmp_path, [i < better for i in range(31)])),
            "same": task(samples(tmp_path, [i < same for i in range(31)])),
        }
        return write_results(tmp_path / name, tasks)

    comparison = compare([folder("model", 29, 11), folder("blind", 9, 11), folder("shuffled", 11, 3)])

    assert comparison.summary == "model beats blind and shuffled beyond the interval in 1 of 2 tasks; not: same."
    assert [row.beats_all for row in comparison.rows] == [True, False]


def test_the_summary_leaves_out_tasks_without_images(tmp_path: Path) -> None:
    text = [text_sample(f"{i}", "x", "y", {"accuracy": i % 2}, prompt="Words.") for i in range(7)]
    folders = [write_results(tmp_path / n, {"text": task(text), "t": task(samples(tmp_path, [True] * 7))}) for n in "ab"]

    comparison = compare(folders)

    assert comparison.summary == "a beats b beyond the interval in 0 of 1 tasks; not: t."
    assert "| no images |" in comparison_markdown(comparison)


def test_a_metric_that_is_no_mean_of_scores_combines_both_intervals(tmp_path: Path) -> None:
    def folder(name: str, value: float) -> Path:
        metrics = {"roc_auc": {"value": value, "low": value - 0.03, "high": value + 0.04, "n": 7}}
        return write_results(tmp_path / name, {"t": task(samples(tmp_path, [True] * 7), "roc_auc", metrics=metrics)})

    (row,) = compare([folder("a", 0.7), folder("b", 0.6)]).rows
    (difference,) = row.differences

    # below: 3 points of ours and 4 of theirs make 5; above: 4 and 3 make 5
    assert difference
    assert not difference.paired
    assert [difference.metric.low, difference.metric.value, difference.metric.high] == pytest.approx([5.0, 10.0, 15.0])


def test_other_samples_and_other_options_are_warned_of_and_left_out(tmp_path: Path) -> None:
    one = [*samples(tmp_path, [True] * 5), failed_sample("900", "no such image")]
    other = [
        *samples(tmp_path, [False] * 3),
        *samples(tmp_path, [True] * 2, prefix="x"),
        failed_sample("900", "no such image"),
    ]
    folders = [
        write_results(tmp_path / "one", {"t": task(one, options={"path": "a", "prompt": "p"})}),
        write_results(tmp_path / "other", {"t": task(other, options={"path": "b", "prompt": "q"})}),
    ]

    comparison = compare(folders, ["A", "B"])

    assert comparison.warnings == (
        "t: 4 samples were answered only in A or only in B; differences are over the 3 in both.",
        "t: prompt is 'p' in A and 'q' in B.",
    )
    assert comparison.rows[0].differences[0]
    assert comparison.rows[0].differences[0].metric.value == 100


def test_a_task_that_one_did_not_evaluate_is_warned_of(tmp_path: Path) -> None:
    correct = samples(tmp_path, [True] * 3)
    one = write_results(tmp_path / "one", {"t": task(correct), "u": task(correct)})
    other = write_results(tmp_path / "other", {"t": task(correct)})

    comparison = compare([one, other])

    assert comparison.warnings == ("u: other did not evaluate it.",)
    assert comparison.rows[1].differences == (None,)
    assert comparison.rows[1].beats_all is None


@pytest.mark.parametrize(("names", "message"), [(["a"], "2 folders need as many"), (["a", "a"], "different names")])
def test_names_must_fit(tmp_path: Path, names: list[str], message: str) -> None:
    folders = [write_results(tmp_path / n, {"t": task(samples(tmp_path, [True]))}) for n in ("x", "y")]

    with pytest.raises(UserError, match=message):
        compare(folders, names)


def test_evaluations_without_a_common_task_are_refused(tmp_path: Path) -> None:
    folders = [write_results(tmp_path / n, {n: task(samples(tmp_path, [True]))}) for n in ("x", "y")]

    with pytest.raises(UserError, match="x and y have no task in common: x; y"):
        compare(folders)


def test_a_folder_given_twice_is_refused(tmp_path: Path) -> None:
    folder = write_results(tmp_path / "x", {"t": task(samples(tmp_path, [True]))})

    with pytest.raises(UserError, match="given twice"):
        compare([folder, folder])


def test_the_verb_prints_and_writes_what_it_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [
        write_results(tmp_path / n, {"t": task(samples(tmp_path, [i < k for i in range(31)]), title="<b>")}, image_control=c)
        for n, k, c in (("run/eval", 23, "true"), ("control/eval", 5, "shuffled"))
    ]

    code = main(["report", "eval", *map(str, folders), "--names", "model,<i>blind</i>", "--output", str(tmp_path / "out")])

    out = capsys.readouterr().out
    comparison = json.loads((tmp_path / "out" / "comparison.json").read_text(encoding="utf-8"))
    page = Page((tmp_path / "out" / "comparison.html").read_text(encoding="utf-8"))
    assert code == 0
    assert "model beats &lt;i>blind&lt;/i> beyond the interval in 1 of 1 tasks." in out
    assert comparison["rows"][0]["beats_all"] is True
    assert comparison["names"] == ["model", "<i>blind</i>"]
    assert comparison["rows"][0]["differences"][0]["metric"]["value"] == pytest.approx(1800 / 31)
    assert not page.all("i")
    assert "image_control: shuffled" in page.text
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"comparison.html", "comparison.json", "comparison.md"}


def test_the_verb_writes_a_report_of_one_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_results(tmp_path / "eval", {"t": task(samples(tmp_path, [True, False]))})

    assert main(["report", "eval", str(folder)]) == 0

    assert "| t | accuracy, 0 shots | 50.0 | 50.0 [0.0, 100.0] | – |" in capsys.readouterr().out
    assert (folder / "report.html").is_file()
    assert (folder / "report.md").is_file()


def test_the_verb_refuses_a_folder_without_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "eval", str(tmp_path)]) == 2

    assert "no metrics.json" in capsys.readouterr().err
