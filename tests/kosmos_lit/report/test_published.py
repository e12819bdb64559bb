"""The paper's figures: a list of some, typed from the paper's tables on its own, and what must hold among them."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from kosmos_lit.report.published import LANGUAGE, LANGUAGE_AVERAGE, OURS, PUBLISHED, published

TYPED = [
    ("coco_caption", "KOSMOS-1", "cider", 0, 84.7), ("coco_caption", "KOSMOS-1", "cider", 4, 101.7),
    ("coco_caption", "KOSMOS-1", "spice", 0, 16.8), ("coco_caption", "Flamingo-9B*", "cider", 8, 99.0),
    ("coco_caption", "ZeroCap", "cider", 0, 14.6), ("flickr30k", "KOSMOS-1", "cider", 2, 70.0),
    ("flickr30k", "FewVLM", "spice", 0, 10.0), ("flickr30k", "Flamingo-3B*", "cider", 4, 72.0),
    ("vqav2", "KOSMOS-1", "vqa_accuracy", 0, 51.0), ("vqav2", "Frozen", "vqa_accuracy", 4, 38.2),
    ("vqav2", "KOSMOS-1, no instruction tuning", "vqa_accuracy", 0, 46.7), ("vizwiz", "KOSMOS-1", "vqa_accuracy", 8, 39.0),
    ("raven_iq50", "KOSMOS-1", "accuracy", 0, 22.0), ("raven_iq50", "KOSMOS-1, no instruction tuning", "accuracy", 0, 26.0),
    ("rendered_sst2", "CLIP ViT-L/14", "accuracy", 0, 64.0), ("hateful_memes", "KOSMOS-1", "roc_auc", 0, 63.9),
    ("rendered_sst2_cot", "KOSMOS-1", "accuracy", 0, 72.9), ("websrc", "LLM, text only", "f1", 0, 17.9),
    ("websrc_without_text", "KOSMOS-1", "exact_match", 0, 3.8), ("imagenet", "GIT", "accuracy", 0, 1.9),
    ("imagenet_constrained", "KOSMOS-1", "accuracy", 0, 38.1), ("birds", "KOSMOS-1", "accuracy", 0, 61.7),
    ("birds_with_descriptions", "KOSMOS-1", "accuracy", 0, 90.0), ("boolq", "KOSMOS-1", "accuracy", 4, 59.2),
    ("copa", "LLM, text only", "accuracy", 1, 69.0), ("cb", "Kosmos-2", "accuracy", 0, 30.4),
    ("relative_size", "KOSMOS-1", "accuracy", 0, 94.2), ("memory_color", "VaLM", "accuracy", 0, 58.6),
    ("color_terms", "LLM, text only", "accuracy", 0, 63.4),
]  # fmt: skip


@pytest.mark.parametrize(("key", "model", "metric", "shots", "points"), TYPED)
def test_figures_are_those_of_the_paper(key: str, model: str, metric: str, shots: int, points: float) -> None:
    found = published(key)

    assert found is not None
    assert {row.model: row for row in found.rows}[model].metrics[metric][shots] == points


@pytest.mark.parametrize("row", [0, 1])
@pytest.mark.parametrize("shots", [0, 1, 4])
def test_the_language_tasks_have_the_mean_that_the_paper_prints(row: int, shots: int) -> None:
    mean = sum(PUBLISHED[key].rows[row].metrics["accuracy"][shots] for key in LANGUAGE) / len(LANGUAGE)

    assert LANGUAGE_AVERAGE.rows[row].metrics["accuracy"][shots] == pytest.approx(mean, abs=0.0501)  # printed to 0.1


def test_every_entry_has_one_row_to_compare_with_and_its_models_once() -> None:
    for key, found in PUBLISHED.items():
        models = [row.model for row in found.rows]
        assert models.count(OURS) == 1, key
        assert len(set(models)) == len(models), key


def test_what_is_not_published_has_no_entry() -> None:
    assert published(None) is None
    assert published("made_up") is None


def test_every_task_of_the_papers_suite_has_published_figures_and_measures_them() -> None:
    import kosmos_lit.tasks

    suites = yaml.safe_load((Path(__file__).parents[3] / "configs/eval/paper.yaml").read_text(encoding="utf-8"))["eval"][
        "tasks"
    ]
    tasks = {n: getattr(kosmos_lit.tasks, t["class_path"].rsplit(".", 1)[1])(**t["init_args"]) for n, t in suites.items()}

    for name, task in tasks.items():
        found = published(task.published)
        assert found is not None, name
        assert task.main_metric in {metric for row in found.rows for metric in row.metrics}, name
