"""Folders of results as an evaluation writes them, without a model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from kosmos_lit.evaluation.statistics import mean_metric


def write_image(path: Path, colour: tuple[int, int, int] = (200, 40, 40), size: tuple[int, int] = (37, 23)) -> Path:
    """Write an image of one colour."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


def choice_sample(
    key: str,
    candidates: Mapping[str, float],
    target: str,
    *,
    prompt: str = "Which one? Answer:",
    images: Sequence[Path] = (),
) -> dict[str, Any]:
    """Return a sample whose prediction is the likeliest of its candidates, of one token each."""
    prediction = max(candidates, key=candidates.__getitem__)
    request = {
        "prompt": prompt,
        "images": [str(path) for path in images],
        "candidates": list(candidates),
        "log_probs": [[value] for value in candidates.values()],
    }
    scores = {"accuracy": float(prediction == target)}
    return {
        "key": key,
        "requests": [request],
        "prediction": prediction,
        "target": target,
        "scores": scores,
        "data": {},
        "error": None,
    }


def text_sample(
    key: str,
    prediction: str,
    target: Any,
    scores: Mapping[str, float],
    *,
    prompt: str = "<image>An image of",
    images: Sequence[Path] = (),
) -> dict[str, Any]:
    """Return a sample whose prediction is generated text."""
    request = {
        "prompt": prompt,
        "images": [str(p) for p in images],
        "settings": {"n_beams": 5},
        "prediction": prediction,
        "ended": "end",
    }
    return {
        "key": key,
        "requests": [request],
        "prediction": prediction,
        "target": target,
        "scores": dict(scores),
        "data": {},
        "error": None,
    }


def failed_sample(key: str, reason: str, detail: str = "x.jpg") -> dict[str, Any]:
    """Return a sample that failed."""
    return {
        "key": key,
        "requests": [],
        "prediction": "",
        "target": None,
        "scores": {},
        "data": {},
        "error": f"{reason}: {detail}",
    }


def task(samples: Sequence[Mapping[str, Any]], main_metric: str = "accuracy", **more: Any) -> dict[str, Any]:
    """Return a task's entry of metrics.json, its figures the means of the samples' scores, and the samples."""
    answered = [sample for sample in samples if not sample["error"]]
    names = list(dict.fromkeys(name for sample in answered for name in sample["scores"]))
    reasons = [sample["error"].split(":")[0] for sample in samples if sample["error"]]
    entry = {
        "class": "kosmos_lit.tasks.Made",
        "title": "Made",
        "published": None,
        "main_metric": main_metric,
        "chance": 0.5,
        "n_shots": 0,
        "seed": 0,
        "n_samples": len(samples),
        "n_failed": len(reasons),
        "failures": {r: reasons.count(r) for r in reasons},
        "options": {"path": "data/made"},
        "seconds": 1.5,
        "metrics": {name: vars(mean_metric([sample["scores"][name] for sample in answered])) for name in names},
    }
    return {**entry, **more, "samples": list(samples)}


def write_results(folder: Path, tasks: Mapping[str, Mapping[str, Any]], **more: Any) -> Path:
    """Write metrics.json and the samples of each task; return the folder."""
    for name, entry in tasks.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        lines = [json.dumps(sample) + "\n" for sample in entry["samples"]]
        (folder / name / "samples.jsonl").write_text("".join(lines), encoding="utf-8")
    entries = {name: {k: v for k, v in entry.items() if k != "samples"} for name, entry in tasks.items()}
    model = {"checkpoint": "runs/made/last.ckpt", "step": 1234, "parameters": 5_678_901}
    metrics = {
        "model": model,
        "image_control": "true",
        "machine": "a machine",
        "date": "2024-05-06",
        **more,
        "tasks": entries,
    }
    (folder / "metrics.json").write_text(json.dumps(metrics), encoding="utf-8")
    return folder
