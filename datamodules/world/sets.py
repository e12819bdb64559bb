"""The world's evaluation sets, in the file formats in which the authors of the tasks distribute theirs.

Each set is held out by combination: no training document contains what its questions are about. Demonstrations are of
combinations that may be trained on.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random

from datamodules.io.hashing import hash_key
from datamodules.world import text_tasks
from datamodules.world.creatures import (
    CATEGORY,
    NICKNAMES,
    description,
    draw_pair,
    is_asked_in_training,
    named,
    paint_creature,
    size_pair,
)
from datamodules.world.example import any_scene
from datamodules.world.language import canonical_caption
from datamodules.world.matrices import DRAWINGS, Matrix, held_out_matrix, paint_panel
from datamodules.world.rendered_text import (
    SENTIMENTS,
    draw_opinion,
    held_out_site,
    paint_opinion,
    paint_site,
    site_question,
)
from datamodules.world.scene import Holdout, Scene, encode_jpeg, encode_png, paint_jpeg
from datamodules.world.scene_tasks import ASPECTS, CLASSES, WHAT, aspect_of, class_of, questions
from datamodules.world.write import WorldConfig, is_drawn
from kosmos_lit.files import atomic_folder

IDENTITY = "eval.json"
N_DEMONSTRATIONS = 40
"""Samples from which demonstrations are taken."""


@dataclass(frozen=True, kw_only=True)
class SetsConfig:
    """Sizes of the evaluation sets."""

    n: int = 300
    """Approximate number of questions of a set."""
    n_matrices: int = 1_000
    """Matrices of the large set; the small one has 50, like the paper's."""


def write_sets(config: SetsConfig, world: WorldConfig) -> None:
    """Draw the evaluation sets into the world's folder, unless they are already there.

    Raises: UserError if the folder holds others.
    """
    folder = Path(world.path) / "eval"
    identity = asdict(config) | {"world": world.seed, "held_out": world.held_out}
    if is_drawn(folder / IDENTITY, identity, "world"):
        return
    with atomic_folder(folder) as temporary:
        for name, write in SETS.items():
            set_folder = temporary / name
            set_folder.mkdir()
            write(set_folder, Random(hash_key("set", world.seed, name)), Holdout(world.seed, world.held_out), config)
        (temporary / IDENTITY).write_text(json.dumps(identity), encoding="utf-8")


def _write_captions(folder: Path, random: Random, holdout: Holdout, config: SetsConfig) -> None:
    """Write captions in the JSON format of Karpathy's splits."""
    images: list[dict[str, object]] = []
    for split, folder_name, n in (("test", "val2014", config.n), ("train", "train2014", N_DEMONSTRATIONS)):
        (folder / folder_name).mkdir()
        for i in range(n):
            kind = ("object", "count", "pair")[i % 3]
            scene = any_scene(random, kind, holdout, held_out=split == "test")
            name = f"COCO_{folder_name}_{i:012d}.jpg"
            (folder / folder_name / name).write_bytes(paint_jpeg(scene, random))
            images.append(
                {
                    "filepath": folder_name,
                    "filename": name,
                    "imgid": len(images),
                    "cocoid": i,
                    "split": split,
                    "sentences": [{"raw": canonical_caption(scene), "tokens": canonical_caption(scene).split()}],
                }
            )
    (folder / "dataset_coco.json").write_text(json.dumps({"images": images, "dataset": "coco"}), encoding="utf-8")


def _write_vqa(folder: Path, split: str, samples: Sequence[tuple[bytes, str, str]]) -> None:
    """Write samples of image, question and answer as VQAv2's JSON files."""
    (folder / split).mkdir()
    questions, annotations = [], []
    for i, (image, question, answer) in enumerate(samples):
        (folder / split / f"COCO_{split}_{i:012d}.jpg").write_bytes(image)
        questions.append({"image_id": i, "question": question, "question_id": i})
        answers = [{"answer": answer, "answer_confidence": "yes", "answer_id": k} for k in range(1, 11)]
        annotations.append({"question_id": i, "image_id": i, "answers": answers, "multiple_choice_answer": answer})
    for name, value in (
        (f"v2_OpenEnded_mscoco_{split}_questions.json", {"questions": questions}),
        (f"v2_mscoco_{split}_annotations.json", {"annotations": annotations}),
    ):
        (folder / name).write_text(json.dumps(value), encoding="utf-8")


def _write_questions(folder: Path, random: Random, holdout: Holdout, config: SetsConfig) -> None:
    for split, n, held_out in (("val2014", config.n * 3 // 2, True), ("train2014", N_DEMONSTRATIONS, False)):
        samples = []
        for i in range(n):
            scene = any_scene(random, ("object", "count", "pair")[i % 3], holdout, held_out=held_out)
            question, answer = random.choice(list(questions(scene, random).values()))
            samples.append((paint_jpeg(scene, random), question, answer))
        _write_vqa(folder, split, samples)


def _few_shot(aspect: str) -> Callable[[Path, Random, Holdout, SetsConfig], None]:
    def write(folder: Path, random: Random, holdout: Holdout, config: SetsConfig) -> None:
        for split, n, held_out in (("val2014", config.n // 3, True), ("train2014", N_DEMONSTRATIONS, False)):
            scenes = [any_scene(random, "object", holdout, held_out=held_out) for _ in range(n)]
            _write_vqa(folder, split, [(paint_jpeg(scene, random), WHAT, aspect_of(scene, aspect)) for scene in scenes])

    return write


def _matrices(small: bool) -> Callable[[Path, Random, Holdout, SetsConfig], None]:
    def write(folder: Path, random: Random, holdout: Holdout, config: SetsConfig) -> None:
        (folder / "images").mkdir()
        n = min(50, config.n_matrices) if small else config.n_matrices
        matrices = [held_out_matrix(random, holdout, 8, 1 + i % 3) for i in range(n)]
        items = [_item(folder, str(i), matrix, random) for i, matrix in enumerate(matrices)]
        (folder / "items.json").write_text(json.dumps(items), encoding="utf-8")

    return write


def _item(folder: Path, number: str, matrix: Matrix, random: Random) -> dict[str, object]:
    def image(name: str, data: bytes) -> str:
        (folder / "images" / name).write_bytes(data)
        return f"images/{name}"

    context, candidates = (
        [image(f"{number}-{kind}{i}.jpg", paint_panel(p, random.randrange(DRAWINGS))) for i, p in enumerate(panels)]
        for kind, panels in (("g", matrix.context), ("c", matrix.candidates))
    )
    return {"id": number, "given": context, "candidates": candidates, "answer": matrix.target, "ways": dict(matrix.rules)}


def _write_opinions(folder: Path, random: Random, holdout: Holdout, config: SetsConfig) -> None:
    """Write images in Rendered SST-2's folders, half of each split negative and half positive."""
    for split, n, held_out in (("test", config.n, True), ("train", N_DEMONSTRATIONS, False)):
        n_missing = dict.fromkeys(SENTIMENTS, n // 2)
        for sentiment in SENTIMENTS:
            (folder / split / sentiment).mkdir(parents=True)
        while any(n_missing.values()):
            opinion = draw_opinion(random, holdout, held_out=held_out)
            if n_missing[opinion.sentiment]:
                n_missing[opinion.sentiment] -= 1
                name = folder / split / opinion.sentiment / f"{n_missing[opinion.sentiment]}.png"
                name.write_bytes(encode_png(paint_opinion(opinion, random)))


def _write_sites(folder: Path, random: Random, holdout: Holdout, config: SetsConfig) -> None:
    """Write pages in WebSRC's folders of a domain and a site."""
    pages = folder / "world" / "01" / "processed_data"
    pages.mkdir(parents=True)
    rows = []
    for i in range(config.n):
        site, row = held_out_site(random, holdout)
        page = f"01{i:05d}"
        (pages / f"{page}.png").write_bytes(encode_png(paint_site(site, random)))
        body = "".join(f"<tr><td>{label}</td><td>{value}</td></tr>" for label, value in site.rows)
        html = f"<!DOCTYPE html><html><head><title>Page {i}</title></head><body><table>{body}</table></body></html>"
        (pages / f"{page}.html").write_text(html, encoding="utf-8")
        label, value = site.rows[row]
        question = {"question": site_question(label), "id": f"wo{page}00001", "element_id": row, "answer_start": 0}
        rows.append(question | {"answer": value})
    with (pages.parent / "dataset.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    (folder / "dataset_split.json").write_text(json.dumps({"train": [], "dev": ["wo01"], "test": []}), encoding="utf-8")


def _write_classes(folder: Path, random: Random, holdout: Holdout, config: SetsConfig) -> None:
    """Write images in ImageNet's folders, and the class names in their order."""
    for split, n, held_out in (("val", config.n, True), ("train", len(CLASSES), False)):
        scenes_of: dict[str, list[Scene]] = {name: [] for name in CLASSES}
        while any(len(scenes) < max(1, n // len(CLASSES)) for scenes in scenes_of.values()):
            scene = any_scene(random, "object", holdout, held_out=held_out)
            scenes_of[class_of(scene)].append(scene)
        for number, scenes in enumerate(scenes_of.values()):
            synset = folder / split / f"n{number:08d}"
            synset.mkdir(parents=True)
            for i, scene in enumerate(scenes[: max(1, n // len(CLASSES))]):
                (synset / f"{synset.name}_{i}.JPEG").write_bytes(paint_jpeg(scene, random))
    (folder / "names.txt").write_text("".join(f"{name}\n" for name in CLASSES), encoding="utf-8")


def _write_creatures(folder: Path, random: Random, holdout: Holdout, config: SetsConfig) -> None:
    """Write pairs of classes with descriptions and 20 images each."""
    groups = []
    for i in range(max(1, config.n // 40)):
        pair, names = draw_pair(random, holdout, held_out=True), random.sample(NICKNAMES, 2)
        classes = []
        for name, creature in zip(names, pair, strict=True):
            images = folder / f"{i}_{name}"
            images.mkdir()
            for k in range(20):
                (images / f"{k}.jpg").write_bytes(encode_jpeg(paint_creature(creature, random)))
            classes.append({"name": name, "description": description(creature), "images": f"{images.name}/"})
        groups.append({"category": CATEGORY, "classes": classes})
    (folder / "birds.json").write_text(json.dumps(groups), encoding="utf-8")


def _write_facts(folder: Path, random: Random, holdout: Holdout, config: SetsConfig) -> None:
    """Write Memory Colors' and RelativeSize's files, about the names that training does not ask about."""
    by_name = {name: creature for name, creature in named(holdout).items() if not is_asked_in_training(name, holdout)}
    rows = [{"descriptor": "", "item": name, "label": creature.colour} for name, creature in by_name.items()]
    _write_lines(folder / "memory_colors.jsonl", rows)
    pairs = {tuple(sorted(size_pair(random, by_name), key=lambda name: by_name[name].bulk)) for _ in range(config.n // 2)}
    text = "".join(f"{large} {small}\n" for large, small in sorted(pairs))
    (folder / "sizePairsFull.txt").write_text(text, encoding="utf-8")


def _write_copa(folder: Path, random: Random, holdout: Holdout, config: SetsConfig) -> None:
    for split, n, held_out in (("val", config.n, True), ("train", N_DEMONSTRATIONS, False)):
        rows = []
        for i in range(n):
            item = text_tasks.copa(random, *text_tasks.draw_look(random, holdout, "copa", held_out=held_out))
            choices = _in_order(item["target"], item["wrong"], i % 2)
            rows.append(
                {
                    "premise": item["premise"],
                    "choice1": choices[0],
                    "choice2": choices[1],
                    "question": item["question"],
                    "label": i % 2,
                    "idx": i,
                }
            )
        _write_lines(folder / f"{split}.jsonl", rows)


def _write_piqa(folder: Path, random: Random, holdout: Holdout, config: SetsConfig) -> None:
    for split, n, held_out in (("valid", config.n, True), ("train", N_DEMONSTRATIONS, False)):
        rows = []
        for i in range(n):
            item = text_tasks.piqa(random, *text_tasks.draw_look(random, holdout, "piqa", held_out=held_out))
            first, second = _in_order(item["target"], item["wrong"], i % 2)
            rows.append({"goal": item["goal"], "sol1": first, "sol2": second})
        _write_lines(folder / f"{split}.jsonl", rows)
        (folder / f"{split}-labels.lst").write_text("".join(f"{i % 2}\n" for i in range(n)), encoding="utf-8")


def _write_stories(folder: Path, random: Random, holdout: Holdout, config: SetsConfig) -> None:
    for split, n, held_out in (("test_test", config.n, True), ("test_val", N_DEMONSTRATIONS, False)):
        rows = []
        for i in range(n):
            sentences, target, wrong = text_tasks.story(
                random, *text_tasks.draw_look(random, holdout, "story", held_out=held_out)
            )
            first, second = _in_order(target, wrong, i % 2)
            rows.append(
                {"InputStoryid": f"{split}-{i}"}
                | {f"InputSentence{k}": sentence for k, sentence in enumerate(sentences, start=1)}
                | {"RandomFifthSentenceQuiz1": first, "RandomFifthSentenceQuiz2": second, "AnswerRightEnding": i % 2 + 1}
            )
        with (folder / f"cloze_{split}__spring2016.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


def _in_order(target: str, wrong: str, place: int) -> tuple[str, str]:
    """Return both choices, the target at `place`."""
    return (target, wrong) if place == 0 else (wrong, target)


def _write_lines(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


SETS: dict[str, Callable[[Path, Random, Holdout, SetsConfig], None]] = {
    "captions": _write_captions,
    "questions": _write_questions,
    **{f"what_{aspect}": _few_shot(aspect) for aspect in ASPECTS},
    "matrices_50": _matrices(small=True),
    "matrices_1000": _matrices(small=False),
    "opinions": _write_opinions,
    "sites": _write_sites,
    "classes": _write_classes,
    "creatures": _write_creatures,
    "facts": _write_facts,
    "copa": _write_copa,
    "piqa": _write_piqa,
    "stories": _write_stories,
}
