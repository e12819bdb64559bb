"""Datasets of images in their authors' files, a few samples each; numbers of samples are prime."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

COLOURS = ("red", "blue", "green", "black", "grey", "orange", "purple")


def draw(path: Path, text: str, colour: str = "red") -> str:
    """Draw an image with a text on it; return its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("RGB", (23, 19), "white")
    ImageDraw.Draw(image).rectangle((2, 2, 11, 11), fill=colour)
    ImageDraw.Draw(image).text((3, 7), text, fill="black")
    image.save(path)
    return path.name


def write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def karpathy(folder: Path, dataset: str = "coco") -> Path:
    """Five images of test, three of train and two of restval, with two captions each."""
    images = []
    for i, split in enumerate(["test"] * 5 + ["train"] * 3 + ["restval"] * 2 + ["val"]):
        at = {"filepath": "train2014" if split == "train" else "val2014"} if dataset == "coco" else {}
        name = f"{dataset}_{i}.jpg"
        draw(folder / at.get("filepath", "flickr30k-images") / name, str(i), COLOURS[i % 7])
        captions = [f"A {COLOURS[i % 7]} square. ", f"the square {i} is {COLOURS[i % 7]}"]
        images.append({**at, "filename": name, "split": split, "imgid": i, "sentences": [{"raw": c} for c in captions]})
    for needed in ("train2014", "val2014") if dataset == "coco" else ("flickr30k-images",):
        (folder / needed).mkdir(parents=True, exist_ok=True)
    write(folder / f"dataset_{dataset}.json", {"images": images, "dataset": dataset})
    return folder


def vqav2(folder: Path, split: str = "val2014", n: int = 5, answered: bool = True) -> Path:
    """Questions 10, 11, ... about images 7, 8, ...; people say the colour eight times, "none" and "teal" once each."""
    images = split.replace("-dev", "")
    questions, annotations = [], []
    for i in range(n):
        draw(folder / images / f"COCO_{images}_{7 + i:012d}.jpg", "", COLOURS[i])
        questions.append({"image_id": 7 + i, "question": f"What colour is number {i}?", "question_id": 10 + i})
        prediction = [COLOURS[i]] * 8 + ["none", "teal"]
        annotations.append({"question_id": 10 + i, "image_id": 7 + i, "answers": [{"answer": a} for a in prediction]})
    write(folder / f"v2_OpenEnded_mscoco_{split}_questions.json", {"questions": questions, "data_subtype": split})
    if answered:
        write(folder / f"v2_mscoco_{split}_annotations.json", {"annotations": annotations})
    return folder


def vizwiz(folder: Path, split: str = "val", n: int = 3, answered: bool = True) -> Path:
    """Images with a question each, all ten answers `unanswerable`."""
    rows = []
    for i in range(n):
        name = draw(folder / split / f"VizWiz_{split}_{i:08d}.jpg", "?")
        answers = {"answers": [{"answer": "unanswerable", "answer_confidence": "yes"}] * 10} if answered else {}
        rows.append({"image": name, "question": f"What is this {i}?", **answers})
    write(folder / f"{split}.json", rows)
    return folder


def raven(folder: Path, givens: Sequence[int] = (3, 4, 8)) -> Path:
    """A matrix for each number of given images, with six candidates, the right one at the matrix's number."""
    rows = []
    for i, n in enumerate(givens):
        names = [f"{i}/{j}.png" for j in range(n + 6)]
        for j, name in enumerate(names):
            draw(folder / name, str(j), COLOURS[j % 7])
        rows.append({"id": str(i), "given": names[:n], "candidates": names[n:], "answer": i, "rule": "number"})
    write(folder / "items.json", rows)
    return folder


def rendered(folder: Path, splits: Sequence[str] = ("test", "train")) -> Path:
    """Three positive and two negative opinions a split."""
    for split in splits:
        for label, n in (("positive", 3), ("negative", 2)):
            for i in range(n):
                draw(folder / split / label / f"{i:04d}.png", label[:3])
    return folder


def memes(folder: Path, names: Sequence[str] = ("dev_seen", "train")) -> Path:
    """Five memes a list, the second and fourth of them hateful."""
    for name in names:
        rows = [{"id": i, "img": f"img/{name}{i}.png", "label": i % 2, "text": "words"} for i in range(5)]
        for row in rows:
            draw(folder / str(row["img"]), "lol")
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    return folder


def websrc(folder: Path) -> Path:
    """Two sites of two domains, one of them of dev, with three and two questions; a page has a script and a comment."""
    for domain, site, n in (("auto", "01", 3), ("book", "07", 2)):
        pages = folder / domain / site / "processed_data"
        rows = []
        for i in range(n):
            page = f"{site}0000{i}"
            draw(pages / f"{page}.png", "web")
            text = f"<html><head><title>T</title></head><body><h1>Car\n {i}</h1><script>no()</script><!-- no -->"
            (pages / f"{page}.html").write_text(text + "<p>It costs <b>$5,000</b>.</p></body></html>", encoding="utf-8")
            rows.append(["How much is it?", "$5,000", 1, 0, f"{domain[:2]}{page}{i:05d}"])
        with (folder / domain / site / "dataset.csv").open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([["question", "answer", "element_id", "answer_start", "id"], *rows])
    write(folder / "dataset_split.json", {"dev": ["au01"], "test": []})
    return folder


def imagenet(folder: Path, flat: bool = False) -> Path:
    """Three classes, with three, two and two images; the middle one has no name of its own."""
    listed = []
    for synset, n in (("n01440764", 3), ("n02510455", 2), ("n09999999", 2)):
        for _ in range(n):
            name = f"ILSVRC2012_val_{len(listed):08d}.JPEG"
            listed.append([name.removesuffix(".JPEG"), f"{synset} 1 2 3 4"])
            draw(folder / "val" / ("" if flat else synset) / name, "x")
    if flat:
        with (folder / "LOC_val_solution.csv").open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([["ImageId", "PredictionString"], *listed])
    names = "n01440764 tench, Tinca tinca\nn02510455 giant panda, panda\nn09999999 tench\n"
    (folder / "names.txt").write_text(names, encoding="utf-8")
    return folder


def birds(folder: Path) -> Path:
    """One pair, with three and two images."""
    described = [
        ("three toed", "It has black and white stripes throughout the body and a yellow crown."),
        ("downy", "It has white spots on its black wings and some red on its crown."),
    ]
    classes = []
    for (name, description), n in zip(described, (3, 2), strict=True):
        images = name.replace(" ", "_")
        for i in range(n):
            draw(folder / images / f"{i}.png", "b")
        classes.append({"name": name, "description": description, "images": f"{images}/"})
    write(folder / "birds.json", [{"category": "woodpecker", "classes": classes}])
    return folder
