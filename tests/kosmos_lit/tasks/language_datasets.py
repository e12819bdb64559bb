"""Small datasets in the files that the authors of the language tasks distribute."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

WSC = """<?xml version="1.0" encoding="UTF-8"?>
<collection>
{}</collection>
"""
SCHEMA = """  <schema>
    <text>
      <txt1>{}</txt1>
      <pron> {} </pron>
      <txt2>{}
      </txt2>
    </text>
    <quote><quote1></quote1><pron>{}</pron><quote2>feared violence.</quote2></quote>
    <answers>
      <answer>{} </answer>
      <answer>{}</answer>
    </answers>
    <correctAnswer>{}</correctAnswer>
    <source>made for a test</source>
  </schema>
"""
SCHEMAS = [
    ("The cat would not sit on the mat because", "it", "was red.", "The cat", "The mat", "B."),
    ("The fox kept the box from the dog while", "he", "was away.", "The fox", "The dog", "A"),
    ("A blue circle hid a red square because", "its", "side was big,\n   so big.", "circle's", "square's", "A."),
    ("Jackdaws met my big sphinx and sat on", "it", ".", "jackdaws", "sphinx", "  B "),
    ("My cat fears a dog because", "it", "'s big.", "my cat", "a dog", "B"),
]


def write_lines(path: Path, rows: Sequence[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows), encoding="utf-8")


def story_cloze(folder: Path) -> None:
    header = "InputStoryid,InputSentence1,InputSentence2,InputSentence3,InputSentence4".split(",")
    header += "RandomFifthSentenceQuiz1,RandomFifthSentenceQuiz2,AnswerRightEnding".split(",")
    story = ["A cat sat down.", 'It said "my mat, big!"', "A dog sat too.", "Why?"]
    for split, n in (("test", 3), ("val", 7)):
        with (folder / f"cloze_test_{split}__spring2016 - cloze_test_ALL_{split}.csv").open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(header)
            for i in range(n):
                rows.writerow([f"{split}-{i}", *story[:3], f"Why {i}?", "The mat is red.", "The dog sat on it.", 1 + i % 2])


def hellaswag(folder: Path) -> None:
    for split, n in (("val", 3), ("train", 7)):
        rows = [
            {
                "ind": 24 + i,
                "activity_label": "Sitting on a mat",
                "ctx_a": "A cat is on a mat.",
                "ctx_b": "a dog",
                "ctx": f"A cat is on mat {i}. a dog",
                "split": split,
                "split_type": "indomain",
                "label": i % 4,
                "endings": ["sat on it.", "said how.", "is red\u2028 and blue.", "fix the quartz."],
                "source_id": f"made~{i}",
            }
            for i in range(n)
        ]
        path = folder / f"hellaswag_{split}.jsonl"
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def winograd(folder: Path) -> None:
    schemas = "".join(SCHEMA.format(a, pron, b, pron, one, other, target) for a, pron, b, one, other, target in SCHEMAS)
    (folder / "WSCollection.xml").write_text(WSC.format(schemas), encoding="utf-8")


def winogrande(folder: Path) -> None:
    ends = [" was too big.", "'s side was too red.", "."]
    for split, n in (("dev", 3), ("train_xl", 7)):
        rows = [
            {
                "qID": f"{split}{i}-1",
                "sentence": f"The cat did not fit on mat {i} because the _{ends[i % 3]}",
                "option1": "cat",
                "option2": "mat",
            }
            for i in range(n)
        ]
        write_lines(folder / f"{split}.jsonl", rows)
        write_lines(folder / f"{split}-labels.lst", [str(1 + i % 2) for i in range(n)])


def piqa(folder: Path) -> None:
    for split, n in (("valid", 3), ("train", 7)):
        rows = [{"goal": f"How to fix mat {i}?", "sol1": "Sit on it.", "sol2": "Use quartz, big quartz."} for i in range(n)]
        write_lines(folder / f"{split}.jsonl", rows)
        write_lines(folder / f"{split}-labels.lst", [str(i % 2) for i in range(n)])


def boolq(folder: Path) -> None:
    for split, n in (("val", 3), ("train", 7)):
        rows = [
            {"question": f"is mat {i} red", "passage": "Mat -- A mat is a big red thing.", "idx": i, "label": i % 2 == 0}
            for i in range(n)
        ]
        write_lines(folder / f"{split}.jsonl", rows)


def cb(folder: Path) -> None:
    labels = ["contradiction", "neutral", "entailment"]
    for split, n in (("val", 5), ("train", 7)):
        rows = [
            {"premise": f"A cat is on mat {i}.", "hypothesis": "the mat is red.", "label": labels[i % 3], "idx": i}
            for i in range(n)
        ]
        write_lines(folder / f"{split}.jsonl", rows)


def copa(folder: Path) -> None:
    for split, n in (("val", 3), ("train", 7)):
        rows = [
            {
                "premise": f"The cat sat on mat {i}.",
                "choice1": "It was big.",
                "choice2": "I fix it.",
                "question": ["cause", "effect"][i % 2],
                "label": i % 2,
                "idx": i,
            }
            for i in range(n)
        ]
        write_lines(folder / f"{split}.jsonl", rows)


def relative_size(folder: Path) -> None:
    write_lines(folder / "sizePairsFull.txt", ["sphinx cat", "dog mat ", "cat quartz"])


def memory_color(folder: Path) -> None:
    things = [("the inside of a", "pineapple", "yellow"), ("", "grass", "green"), ("an", "elephant", "grey")]
    things += [("", "snow", "white"), ("a", "rose", "red")]
    rows = [
        {"descriptor": what, "item": item, "label": color, "picture": "https://...", "picture_path": f"pictures/{item}"}
        for what, item, color in things
    ]
    write_lines(folder / "memory_colors.jsonl", rows)


def color_terms(folder: Path) -> None:
    things = ["grass,green", "elephant,gray", "snow, white", "rose,red", "crow,black"]
    write_lines(folder / "color-concrete-objects.csv", ["object,color", *things])


DATASETS = {
    "StoryCloze": story_cloze,
    "HellaSwag": hellaswag,
    "Winograd": winograd,
    "Winogrande": winogrande,
    "Piqa": piqa,
    "BoolQ": boolq,
    "CommitmentBank": cb,
    "Copa": copa,
    "RelativeSize": relative_size,
    "MemoryColor": memory_color,
    "ColorTerms": color_terms,
}
"""What writes each task's dataset into a folder, by the task's class."""
