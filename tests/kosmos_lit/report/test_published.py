"""The published results: some of them typed from the paper's tables independently, and relations between them."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

import kosmos_lit.report.published as published_module
from kosmos_lit.report.published import OURS, published, published_results, read_published

TYPED = [
    ("coco_caption", "KOSMOS-1", "cider", 0, 84.7),
    ("coco_caption", "KOSMOS-1", "cider", 4, 101.7),
    ("coco_caption", "KOSMOS-1", "spice", 0, 16.8),
    ("coco_caption", "Flamingo-9B*", "cider", 8, 99.0),
    ("coco_caption", "ZeroCap", "cider", 0, 14.6),
    ("flickr30k", "KOSMOS-1", "cider", 2, 70.0),
    ("flickr30k", "FewVLM", "spice", 0, 10.0),
    ("flickr30k", "Flamingo-3B*", "cider", 4, 72.0),
    ("vqav2", "KOSMOS-1", "vqa_accuracy", 0, 51.0),
    ("vqav2", "Frozen", "vqa_accuracy", 4, 38.2),
    ("vqav2", "KOSMOS-1, no instruction tuning", "vqa_accuracy", 0, 46.7),
    ("vizwiz", "KOSMOS-1", "vqa_accuracy", 8, 39.0),
    ("raven_iq50", "KOSMOS-1", "accuracy", 0, 22.0),
    ("raven_iq50", "KOSMOS-1, no instruction tuning", "accuracy", 0, 26.0),
    ("rendered_sst2", "CLIP ViT-L/14", "accuracy", 0, 64.0),
    ("hateful_memes", "KOSMOS-1", "roc_auc", 0, 63.9),
    ("rendered_sst2_cot", "KOSMOS-1", "accuracy", 0, 72.9),
    ("websrc", "LLM, text only", "f1", 0, 17.9),
    ("websrc_without_text", "KOSMOS-1", "exact_match", 0, 3.8),
    ("imagenet", "GIT", "accuracy", 0, 1.9),
    ("imagenet_constrained", "KOSMOS-1", "accuracy", 0, 38.1),
    ("birds", "KOSMOS-1", "accuracy", 0, 61.7),
    ("birds_with_descriptions", "KOSMOS-1", "accuracy", 0, 90.0),
    ("boolq", "KOSMOS-1", "accuracy", 4, 59.2),
    ("copa", "LLM, text only", "accuracy", 1, 69.0),
    ("cb", "Kosmos-2", "accuracy", 0, 30.4),
    ("relative_size", "KOSMOS-1", "accuracy", 0, 94.2),
    ("memory_color", "VaLM", "accuracy", 0, 58.6),
    ("color_terms", "LLM, text only", "accuracy", 0, 63.4),
]


@pytest.mark.parametrize(("key", "model", "metric", "shots", "points"), TYPED)
def test_results_are_those_of_the_paper(key: str, model: str, metric: str, shots: int, points: float) -> None:
    benchmark = published(key)

    assert benchmark is not None
    assert {row.model: row for row in benchmark.rows}[model].metrics[metric][shots] == points


@pytest.mark.parametrize("row", [0, 1])
@pytest.mark.parametrize("shots", [0, 1, 4])
def test_the_language_tasks_have_the_mean_that_the_paper_prints(row: int, shots: int) -> None:
    results = published_results()
    mean = sum(results.benchmarks[key].rows[row].metrics["accuracy"][shots] for key in results.language) / 8

    assert results.language_mean.rows[row].metrics["accuracy"][shots] == pytest.approx(mean, abs=0.0501)  # printed to 0.1


def test_every_entry_has_one_row_to_compare_with_and_its_models_once() -> None:
    for key, benchmark in published_results().benchmarks.items():
        models = [row.model for row in benchmark.rows]
        assert models.count(OURS) == 1, key
        assert len(set(models)) == len(models), key


def test_unpublished_tasks_have_no_entry() -> None:
    assert published(None) is None
    assert published("made_up") is None


def test_every_task_of_the_papers_suite_has_published_results_and_measures_their_metric() -> None:
    import kosmos_lit.tasks

    suites = yaml.safe_load((Path(__file__).parents[3] / "configs/eval/paper.yaml").read_text(encoding="utf-8"))["eval"][
        "tasks"
    ]
    tasks = {n: getattr(kosmos_lit.tasks, t["class_path"].rsplit(".", 1)[1])(**t["init_args"]) for n, t in suites.items()}

    for name, task in tasks.items():
        benchmark = published(task.published)
        assert benchmark is not None, name
        assert task.main_metric in {metric for row in benchmark.rows for metric in row.metrics}, name


def edited(tmp_path: Path, old: str, new: str) -> Path:
    """Return a copy of the file of published results with a text changed once."""
    text = (Path(published_module.__file__).parent / "published.yaml").read_text(encoding="utf-8")
    assert old in text
    path = tmp_path / "published.yaml"
    path.write_text(text.replace(old, new, 1), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("{0: 14.6}", "{0: '14,6'}", r"coco_caption: ZeroCap: cider at 0 shots is '14,6', expected points"),
        ("{0: 14.6}", "{0: 0.146e4}", r"coco_caption: ZeroCap: cider at 0 shots is 1460.0, .* 0 to 200"),
        ("{0: 29.5, 4: 38.2}", "{0: 29.5, 4: 382.0}", r"vqav2: Frozen: vqa_accuracy at 4 shots is 382.0, .* 0 to 100"),
        ("{0: 29.5, 4: 38.2}", "{0: 29.5, four: 38.2}", r"vqav2: Frozen: vqa_accuracy at 'four' shots: .* whole number"),
        ("split: Karpathy test", "spilt: Karpathy test", r"coco_caption: .*unexpected keyword argument 'spilt'"),
        ("    split: Karpathy test\n", "", r"coco_caption: .*missing .*'split'"),
        ("model: ZeroCap", "model: VLKD", r"coco_caption: COCO captions: several rows of VLKD"),
        ("{model: *ours, metrics: {cider: {0: 84.7,", "{model: ours, metrics: {cider: {0: 84.7,", "no row of KOSMOS-1"),
        ("tables: [2, 3, 14]", "tables: [2, 3, 15]", r"coco_caption: sources.kosmos1.tables does not say .* 15 holds"),
        ("source: kosmos2,", "source: kosmos3,", r"flickr30k: no source 'kosmos3'; there are kosmos1, kosmos2"),
        ("of: [story_cloze,", "of: [storycloze,", r"language_mean: no benchmark 'storycloze'"),
    ],
)
def test_a_mistake_in_the_file_is_named_with_its_entry(tmp_path: Path, old: str, new: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_published(edited(tmp_path, old, new))


def test_an_entry_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(yaml.YAMLError, match="duplicate key flickr30k"):
        read_published(edited(tmp_path, "\n  vqav2:", "\n  flickr30k: {}\n  vqav2:"))


def test_every_row_says_where_its_values_are_from() -> None:
    results = published_results()

    for key, benchmark in results.benchmarks.items():
        assert benchmark.source.startswith("KOSMOS-1 paper, table"), key
        for row in benchmark.rows:
            assert row.model.startswith("Kosmos-2") == (row.source != "kosmos1"), (key, row.model)
            # A source other than the benchmark's own is said beside the row.
            assert row.source == "kosmos1" or row.note.startswith(results.sources[row.source].name), (key, row.model)


def test_no_entry_and_no_value_got_lost() -> None:
    results = published_results()
    benchmarks = [*results.benchmarks.values(), results.language_mean]

    counts = [len(by_shots) for b in benchmarks for row in b.rows for by_shots in row.metrics.values()]

    assert (len(results.benchmarks), sum(counts)) == (25, 162)
