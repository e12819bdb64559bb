"""Templates: one table as Markdown and HTML, escaped texts, and pages as a browser lays them out."""

from __future__ import annotations

import math
import shutil
import subprocess
import sys
import zipfile
from itertools import pairwise
from pathlib import Path

import pytest

from kosmos_lit.evaluation.statistics import Metric
from kosmos_lit.report.comparison import Comparison
from kosmos_lit.report.evaluation import write_report
from kosmos_lit.report.plot import Plot
from kosmos_lit.report.rendering import _environment, render_markdown
from kosmos_lit.report.table import Cell, Heading, Row, Table
from tests.kosmos_lit.report.result_folders import (
    choice_sample,
    failed_sample,
    task,
    text_sample,
    write_image,
    write_results,
)
from tests.kosmos_lit.report.test_evaluation import Page, page_of

ROOT = Path(__file__).parents[3]
HOSTILE = "<script>document.body.dataset.ran='yes'</script>\"><img src=x onerror=\"document.body.dataset.ran='yes'\"> & 'x'"
LONG = "Donaudampfschifffahrtsgesellschaft" * 9
HEBREW = "חתול יושב על השטיח"
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")

TABLE = Table(
    headings=(
        Heading(text="model", is_number=False),
        Heading(text="metric", is_number=False, is_below=True),
        Heading(text="shots", is_below=True),
        Heading(text="0 shots", group="CIDEr"),
        Heading(text="4 shots", group="CIDEr"),
        Heading(text="interval", is_page_only=True),
        Heading(text="0 shots", group="SPICE"),
    ),
    rows=(
        Row(
            style="ours",
            cells=(
                Cell(text="a|b", detail="<i>"),
                Cell(text="CIDEr"),
                Cell(text="3", alone="3 shots"),
                Cell(text="50.0", detail="[40.0, 60.0]"),
                Cell(text="<b>"),
                Cell(plot=Plot(chance=50.0)),
                Cell(),
            ),
        ),
    ),
)


def hostile_results(folder: Path) -> Path:
    """Write results whose every text is hostile, too long, or from right to left."""
    image = write_image(folder / "images" / "wide.png", size=(601, 307))
    candidates = {HOSTILE: -0.2, LONG: -0.4, HEBREW: -0.9, "b": -1.1}
    tasks = {
        HOSTILE.replace("/", ""): task(
            [
                *(choice_sample(text, candidates, "b", prompt=f"<image>{text}", images=[image]) for text in (HOSTILE, LONG)),
                failed_sample(LONG, "prompt too long", HOSTILE),
            ],
            title=LONG,
        ),
        LONG[:180]: task(
            [
                text_sample(f"{i}", text, [text, "b"], {"cider": i / 3}, images=[image] * 9, prompt="<image>" * 9 + text)
                for i, text in enumerate((HOSTILE, LONG, HEBREW))
            ],
            "cider",
            published="coco_caption",
            title=HOSTILE,
        ),
    }
    return write_results(folder, tasks, model={"checkpoint": LONG, LONG: HOSTILE}, machine=HEBREW)


def chromium(*arguments: str) -> str:
    """Return what headless Chromium prints."""
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout


def test_a_table_is_the_same_in_markdown_and_html_but_for_its_layout() -> None:
    markdown = render_markdown(
        "comparison.md", table=TABLE, comparison=Comparison(names=("a",), rows=(), warnings=()), legend="Points."
    )
    macros = _environment(None).get_template("table.html").module
    page = Page(str(macros.table(TABLE, "a name")))  # type: ignore[attr-defined]

    assert markdown.splitlines()[:3] == [
        "| model | metric | shots | CIDEr, 0 shots | CIDEr, 4 shots | SPICE, 0 shots |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
        "| a&#124;b (&lt;i>) | CIDEr | 3 | 50.0 [40.0, 60.0] | &lt;b> |  |",
    ]
    assert page.text.split() == (
        "model CIDEr SPICE 0 shots 4 shots interval 0 shots a|b <i>, CIDEr, 3 shots 50.0 [40.0, 60.0] <b>".split()
    )


def test_a_table_heads_neighbouring_columns_with_their_group() -> None:
    macros = _environment(None).get_template("table.html").module

    page = Page(str(macros.table(TABLE, "a name")))  # type: ignore[attr-defined]

    # The metric and the shots stand below the model's name; the plot's column has no group.
    assert [head.get("colspan") for head in page.all("th") if head.get("scope") == "colgroup"] == ["2", "1", "1"]
    assert [head.get("scope") for head in page.all("th")].count("col") == 5
    assert len(page.all("td")) == 4


@pytest.mark.parametrize(
    ("plot", "label"),
    [
        (Plot(), "nothing measured"),
        (
            Plot(metric=Metric(50, 40, 60, 3), chance=25.0, paper=84.7),
            "chance 25.0; measured 50.0 [40.0, 60.0]; KOSMOS-1 84.7",
        ),
        (Plot(metric=Metric(50, math.nan, math.nan, 3)), "measured 50.0"),
        (Plot(metric=Metric(math.nan, math.nan, math.nan, 0), paper=22.0), "KOSMOS-1 22.0"),
    ],
)
def test_a_plot_says_in_words_what_it_shows(plot: Plot, label: str) -> None:
    assert plot.label == label


def test_values_beyond_a_plots_line_stand_at_its_ends() -> None:
    plot = Plot(top=150.0)

    # 176 pixels with a margin of 6 at each end
    assert [plot.x(points) for points in (-5.0, 0.0, 75.0, 150.0, 163.0)] == [6.0, 6.0, 88.0, 170.0, 170.0]


def test_every_text_that_a_page_shows_is_escaped(tmp_path: Path) -> None:
    folder = hostile_results(tmp_path)

    page = page_of(folder)

    assert not page.all("script")
    assert {str(image["src"])[:11] for image in page.all("img")} == {"data:image/"}
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert page.text.count("<script>document.body") >= 8
    assert "<script" not in (folder / "report.md").read_text(encoding="utf-8")


def test_a_page_forbids_scripts_and_external_files(tmp_path: Path) -> None:
    page = page_of(hostile_results(tmp_path))

    (policy,) = [meta["content"] for meta in page.all("meta") if meta.get("http-equiv") == "Content-Security-Policy"]

    assert policy
    assert {"default-src 'none'", "img-src data:"} <= set(policy.split("; "))
    assert "script-src" not in policy


def test_texts_from_right_to_left_keep_to_their_own_element(tmp_path: Path) -> None:
    sample = text_sample("1", HEBREW, [HEBREW], {"accuracy": 1.0}, prompt=HEBREW)
    write_report(write_results(tmp_path, {"t": task([sample])}))

    text = (tmp_path / "report.html").read_text(encoding="utf-8")

    assert f'<div class="prompt" dir="auto">{HEBREW}</div>' in text
    assert f'<dd class="prediction" dir="auto">{HEBREW}</dd>' in text


def test_half_of_a_surrogate_pair_does_not_stop_a_report(tmp_path: Path) -> None:
    sample = text_sample("1", "a\ud83db", ["c"], {"accuracy": 0.0})

    assert "a?b" in page_of(write_results(tmp_path, {"t": task([sample])})).text


def test_headings_have_levels_without_gaps_and_tables_have_names(tmp_path: Path) -> None:
    page = page_of(hostile_results(tmp_path))

    levels = [int(tag[1]) for tag, _ in page.tags if tag in ("h1", "h2", "h3", "h4")]
    regions = [attributes for attributes in page.all("div") if attributes.get("class") == "scroll"]

    assert levels[:2] == [1, 2]
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
    assert len(regions) == len(page.all("table")) == 3
    assert all(r["role"] == "region" and r["aria-label"] and r["tabindex"] == "0" for r in regions)


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium: `apt-get install chromium`")
@pytest.mark.parametrize("width", [390, 1400])
def test_a_browser_lays_a_page_out_within_its_screen_and_runs_nothing(tmp_path: Path, width: int) -> None:
    folder = hostile_results(tmp_path)
    write_report(folder)
    # A frame has any width, a window of Chromium has 500 pixels at least. Its own script measures: the page may have none.
    (folder / "frame.html").write_text(
        f'<iframe src="report.html" width="{width}" height="800"></iframe><script>onload = () => {{'
        "const page = document.querySelector('iframe').contentDocument, root = page.documentElement;"
        "const tables = [...page.querySelectorAll('.scroll')].filter(e => e.scrollWidth > e.clientWidth).length;"
        "const articles = page.querySelectorAll('article').length;"
        "document.title = [root.scrollWidth, tables, page.body.dataset.ran, articles].join(' ');"
        "}</script>",
        encoding="utf-8",
    )

    text = chromium(
        "--allow-file-access-from-files",
        "--window-size=1600,900",
        "--virtual-time-budget=5000",
        "--dump-dom",
        (folder / "frame.html").as_uri(),
    )
    scroll_width, n_scrolling, ran, n_articles = text.partition("<title>")[2].partition("</title>")[0].split(" ")

    assert int(scroll_width) <= width
    assert (int(n_scrolling) > 0) == (width == 390)  # there tables scroll by themselves
    assert ran == ""
    assert n_articles == "5"


@pytest.mark.slow  # builds a wheel: 10 s
def test_a_wheel_has_the_templates_and_the_published_results_and_renders_a_report(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", minversion="77")
    source, wheels, installed = tmp_path / "source", tmp_path / "wheels", tmp_path / "installed"
    source.mkdir()
    for name in ("kosmos_lit", "datamodules", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    wheels.mkdir()
    build = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, str(wheels)], cwd=source, check=True, capture_output=True)
    (wheel,) = wheels.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(installed)
    folder = write_results(
        tmp_path / "eval", {"t": task([text_sample("1", "a", ["a"], {"cider": 1.0})], "cider", published="coco_caption")}
    )

    # -I: neither this folder nor the checkout is on the path.
    report = (
        "import sys; sys.path.insert(0, sys.argv[1]); from pathlib import Path; import kosmos_lit.report.evaluation as e; "
        "assert e.__file__.startswith(sys.argv[1]), e.__file__; e.write_report(Path(sys.argv[2]))"
    )
    subprocess.run([sys.executable, "-I", "-c", report, str(installed), str(folder)], cwd=tmp_path, check=True)

    assert "| KOSMOS-1 | 84.7 | 99.6 | 101.7 | 96.7 | 16.8 |" in (folder / "report.md").read_text(encoding="utf-8")
    assert (folder / "report.html").is_file()
