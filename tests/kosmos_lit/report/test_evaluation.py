"""Reports: table rows, selected samples, and escaped text."""

from __future__ import annotations

import json
import math
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from kosmos_lit.errors import UserError
from kosmos_lit.report.evaluation import write_report
from kosmos_lit.report.samples import candidate_shares, select_samples
from tests.kosmos_lit.report.result_folders import (
    choice_sample,
    failed_sample,
    task,
    text_sample,
    write_image,
    write_results,
)

VOID = {"meta", "br", "wbr", "img", "line", "circle", "polygon"}


class Page(HTMLParser):
    """The tags and the text of a page; every tag must be closed where it has to be."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open[-1:] == [tag], f"</{tag}> closes {self.open}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.words)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def page_of(folder: Path) -> Page:
    write_report(folder)
    return Page((folder / "report.html").read_text(encoding="utf-8"))


def markdown_of(folder: Path) -> list[str]:
    write_report(folder)
    return (folder / "report.md").read_text(encoding="utf-8").splitlines()


def metric(value: float | None, low: float | None = None, high: float | None = None) -> dict[str, Any]:
    return {"value": value, "low": low, "high": high, "n": 3}


def answers(n: int, n_right: int, candidates: tuple[str, str] = ("yes", "no")) -> list[dict[str, Any]]:
    """Return samples, the first `n_right` correct, with a confidence that grows from sample to sample."""
    likely = [
        {candidates[0]: math.log(0.5 + 0.4 * (i + 1) / n), candidates[1]: math.log(0.5 - 0.4 * (i + 1) / n)}
        for i in range(n)
    ]
    return [choice_sample(f"{i:03d}", p, candidates[0] if i < n_right else candidates[1]) for i, p in enumerate(likely)]


def test_our_row_stands_above_the_published_ones_with_shots_as_columns(tmp_path: Path) -> None:
    samples = [text_sample("1", "a dog", ["a dog"], {"cider": 1.0})]
    tasks = {
        f"coco_{k}": task(
            samples,
            "cider",
            published="coco_caption",
            n_shots=k,
            options={"path": "coco", "n_shots": k},
            metrics={"cider": metric(0.5 + k / 100, 0.4, 0.61)},
        )
        for k in (4, 0)
    }

    lines = markdown_of(write_results(tmp_path, tasks))

    at = lines.index("| model | CIDEr, 0 shots | CIDEr, 2 shots | CIDEr, 4 shots | CIDEr, 8 shots | SPICE, 0 shots |")
    assert lines[at + 2] == "| this model | 50.0 [40.0, 61.0] |  | 54.0 [40.0, 61.0] |  |  |"
    assert lines[at + 3] == "| ZeroCap | 14.6 |  |  |  | 5.5 |"
    assert "| KOSMOS-1 | 84.7 | 99.6 | 101.7 | 96.7 | 16.8 |" in lines
    assert "- Not measured: SPICE." in lines
    assert "- coco_0, coco_4: 1 samples; 5,000 in the paper." in lines


def test_tasks_with_other_options_have_rows_of_their_own(tmp_path: Path) -> None:
    tasks = {
        name: task(answers(3, 2), published="boolq", options={"path": "boolq", "prompt": name})
        for name in ("one", "another")
    }

    lines = markdown_of(write_results(tmp_path, tasks))

    assert sum(line.startswith(("| this model: one |", "| this model: another |")) for line in lines) == 2


def test_a_metric_that_is_not_the_papers_keeps_its_name_and_its_column(tmp_path: Path) -> None:
    samples = [text_sample("1", "a dog", ["a dog"], {"cider_plain": 1.0})]

    lines = markdown_of(write_results(tmp_path, {"coco": task(samples, "cider_plain", published="coco_caption")}))

    (header,) = [line for line in lines if line.startswith("| model | CIDEr, 0 shots |")]
    assert header.endswith("| CIDEr of plain words, 0 shots |")
    assert "- Not in the paper: CIDEr of plain words." in lines


def test_other_data_in_the_same_format_have_no_published_rows(tmp_path: Path) -> None:
    lines = markdown_of(write_results(tmp_path, {"counts": task(answers(3, 2), title="Counts", chance=0.25)}))

    assert "## Counts (counts)" in lines
    assert not any("KOSMOS-1 paper" in line for line in lines)
    assert "| chance | 25.0 |" in lines


def test_the_mean_of_the_language_tasks_needs_all_of_them(tmp_path: Path) -> None:
    names = ("story_cloze", "hellaswag", "winograd", "winogrande", "piqa", "boolq", "cb", "copa")
    tasks = {
        name: task(answers(2, 1), published=name, metrics={"accuracy": metric(i / 10, i / 10 - 0.08, i / 10 + 0.08)})
        for i, name in enumerate(names)
    }

    lines = markdown_of(write_results(tmp_path, tasks))
    at = lines.index("## Mean of the eight language tasks")

    # mean of 0, 10, ... 70 is 35; eight intervals of ±8 give ±8 / sqrt(8) = ±2.83
    assert "| this model | 35.0 [32.2, 37.8] |  |  |" in lines[at:]


def test_what_failed_is_counted_by_reason_and_listed(tmp_path: Path) -> None:
    samples = [
        *answers(3, 1),
        failed_sample("7", "no such image", "gone.jpg"),
        failed_sample("8", "no such image"),
        failed_sample("9", "prompt too long"),
    ]

    page = page_of(write_results(tmp_path, {"t": task(samples)}))

    assert "6 samples, 3 of them failed and in no metric (2 no such image, 1 prompt too long)" in page.text
    assert "7: no such image: gone.jpg" in page.text


def test_an_undefined_metric_is_a_dash(tmp_path: Path) -> None:
    nan = float("nan")
    tasks = {
        "null": task([failed_sample("1", "prompt too long")], metrics={"accuracy": metric(None)}),
        "not a number": task([failed_sample("1", "prompt too long")], metrics={"accuracy": metric(nan, nan, nan)}),
        "absent": task([failed_sample("1", "prompt too long")], metrics={}),
    }

    folder = write_results(tmp_path, tasks)

    assert sum(" | – | – | 1 | 1 |" in line for line in markdown_of(folder)) == 3
    assert "nan" not in page_of(folder).text


def test_texts_of_datasets_and_models_never_become_markup(tmp_path: Path) -> None:
    bad = "<script>alert('&')</script>\"><img src=x onerror=y>"
    sample = choice_sample(bad, {bad: -0.1, "b": -2.0}, "b", prompt=bad, images=[tmp_path / f"{bad.replace('/', '')}.png"])
    tasks = {
        "t": task(
            [sample, failed_sample(bad, bad, bad)],
            title=bad,
            main_metric="accuracy",
            options={"path": bad},
            failures={bad: 1},
        )
    }

    page = page_of(write_results(tmp_path, tasks, model={"checkpoint": bad, bad: bad}, machine=bad, date=bad))

    assert not page.all("script")
    assert not page.all("img")
    assert page.text.count("<script>alert('&')") >= 8
    assert "<script" not in (tmp_path / "report.md").read_text(encoding="utf-8")


def test_a_page_loads_no_files_and_describes_its_images(tmp_path: Path) -> None:
    sample = text_sample("1", "dog", ["dog"], {"accuracy": 1.0}, images=[write_image(tmp_path / "dog.png", size=(601, 307))])

    page = page_of(write_results(tmp_path, {"t": task([sample])}))

    (image,) = page.all("img")
    assert str(image["src"]).startswith("data:image/jpeg;base64,")
    assert (image["width"], image["height"], image["alt"]) == ("208", "106", "Image in the prompt: dog.png")
    assert not [a for tag in ("a", "link", "script") for a in page.all(tag) if not str(a.get("href", "")).startswith("#")]


@pytest.mark.parametrize("data", [None, b"no image"])
def test_a_missing_or_broken_image_is_reported(tmp_path: Path, data: bytes | None) -> None:
    if data:
        (tmp_path / "a.png").write_bytes(data)
    sample = text_sample("1", "dog", ["dog"], {"accuracy": 1.0}, images=[tmp_path / "a.png"])

    page = page_of(write_results(tmp_path, {"t": task([sample])}))

    assert not page.all("img")
    assert ("a.png: the image file is missing" if data is None else "a.png: ") in page.text


def test_images_stand_at_their_marks(tmp_path: Path) -> None:
    images = [write_image(tmp_path / f"{i}.png") for i in range(2)]
    sample = text_sample("1", "dog", "dog", {"accuracy": 1.0}, prompt="<image>one<image>two", images=images)
    write_report(write_results(tmp_path, {"t": task([sample])}))

    text = (tmp_path / "report.html").read_text(encoding="utf-8")

    positions = [
        text.index(part) for part in ('alt="Image in the prompt: 0.png">one', 'alt="Image in the prompt: 1.png">two')
    ]
    assert positions == sorted(positions)


def test_a_mark_in_the_text_adds_no_image(tmp_path: Path) -> None:
    sample = text_sample(
        "1", "x", "x", {"accuracy": 1.0}, prompt="<image>what does <image> mean?", images=[write_image(tmp_path / "a.png")]
    )

    page = page_of(write_results(tmp_path, {"t": task([sample])}))

    assert len(page.all("img")) == 1
    assert "<image>what does <image> mean?" in page.text


def test_long_demonstrations_are_folded_up(tmp_path: Path) -> None:
    images = [write_image(tmp_path / f"{i}.png") for i in range(9)]
    prompt = "".join(f"<image>demonstration {i}." for i in range(8)) + "<image>the question"
    sample = text_sample("1", "x", "x", {"accuracy": 1.0}, prompt=prompt, images=images)

    page = page_of(write_results(tmp_path, {"t": task([sample])}))

    assert len(page.all("img")) == 3
    assert len(page.all("details")) == 1
    assert "<image>demonstration 0." in page.text


def test_a_control_with_grey_images_shows_none(tmp_path: Path) -> None:
    sample = text_sample("1", "x", "x", {"accuracy": 1.0}, images=[write_image(tmp_path / "a.png")])

    page = page_of(write_results(tmp_path, {"t": task([sample])}, image_control="blank"))

    assert not page.all("img")
    assert "even grey stands in the place of every image" in page.text


def test_errors_of_highest_confidence_come_first_in_any_order_of_lines(tmp_path: Path) -> None:
    samples = answers(41, 11)
    one = write_results(tmp_path / "one", {"t": task(samples)})
    other = write_results(tmp_path / "other", {"t": task(samples[::-1])})

    selection, again = (select_samples(folder / "t" / "samples.jsonl", "accuracy") for folder in (one, other))

    assert [c.sample["key"] for c in selection.failures[:3]] == ["040", "039", "038"]
    assert [c.sample["key"] for c in selection.successes[:1]] == ["000"]
    assert [c.why for c in selection.failures[3:]] == ["random"] * 2
    assert (selection.n_failures, selection.n_successes) == (30, 11)
    assert selection == again
    assert select_samples(one / "t" / "samples.jsonl", "accuracy", seed=1).failures[3:] != selection.failures[3:]


def test_without_candidates_the_lowest_scores_come_first(tmp_path: Path) -> None:
    samples = [text_sample(f"{i:02d}", "x", ["y"], {"cider": i / 7}) for i in range(23)]
    folder = write_results(tmp_path, {"t": task(samples, "cider")})

    selection = select_samples(folder / "t" / "samples.jsonl", "cider")

    assert [c.sample["key"] for c in selection.failures[:3]] == ["00", "01", "02"]
    assert selection.successes[0].sample["key"] == "22"


def test_candidates_of_separate_requests_are_compared() -> None:
    requests = [{"prompt": "p", "images": [], "candidates": ["Yes"], "log_probs": [[math.log(p)]]} for p in (0.2, 0.6)]

    shares = candidate_shares({"requests": requests})

    assert [name for name, _ in shares] == ["0", "1"]  # as Raven's predictions are
    assert [share for _, share in shares] == pytest.approx([0.25, 0.75])


def test_a_tasks_own_probabilities_come_first() -> None:
    request = {"prompt": "p", "images": [], "candidates": ["no", "yes"], "log_probs": [[-0.1], [-3.0]]}

    shares = candidate_shares({"requests": [request], "data": {"probabilities": {"no": 0.25, "yes": 0.75}}})

    assert shares == [("no", 0.25), ("yes", 0.75)]


def test_a_line_that_an_interruption_cut_off_is_left_out(tmp_path: Path) -> None:
    folder = write_results(tmp_path, {"t": task(answers(3, 1))})
    with (folder / "t" / "samples.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"key": "cut')

    selection = select_samples(folder / "t" / "samples.jsonl", "accuracy")

    assert selection.n_failures + selection.n_successes == 3


def test_a_line_that_is_no_sample_is_named(tmp_path: Path) -> None:
    folder = write_results(tmp_path, {"t": task(answers(3, 1))})
    with (folder / "t" / "samples.jsonl").open("a", encoding="utf-8") as file:
        file.write("{broken}\n")

    with pytest.raises(UserError, match=r"samples\.jsonl, line 4: not a sample"):
        write_report(folder)


def test_a_task_without_its_samples_keeps_its_metrics(tmp_path: Path) -> None:
    folder = write_results(tmp_path, {"t": task(answers(3, 3))})
    (folder / "t" / "samples.jsonl").unlink()

    assert "100.0" in page_of(folder).text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no metrics.json"),
        ("[1]", "not the metrics"),
        ('{"tasks": {}}', "no tasks"),
        ('{"tasks": {"t": 1}}', "not the metrics"),
    ],
)
def test_a_folder_without_results_is_refused(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "metrics.json").write_text(text, encoding="utf-8")

    with pytest.raises(UserError, match=message):
        write_report(tmp_path)


def test_of_many_samples_few_are_in_the_page(tmp_path: Path) -> None:
    folder = write_results(tmp_path, {"t": task(answers(2003, 1001))})

    page = page_of(folder)

    assert len(page.all("article")) == 8
    assert "5 of 1,002 failures" in page.text


def test_reports_need_no_fields_that_an_older_evaluation_lacks(tmp_path: Path) -> None:
    folder = write_results(tmp_path, {"t": task(answers(3, 1))})
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    entry = metrics["tasks"]["t"]
    required = {key: entry[key] for key in ("title", "main_metric", "n_samples", "metrics")}
    (folder / "metrics.json").write_text(json.dumps({"tasks": {"t": required}}), encoding="utf-8")

    assert page_of(folder).text.count("33.3") >= 2
