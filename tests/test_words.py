"""Names and prose keep to docs/glossary.md: one word, one meaning, the field's word."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache

import pytest

from tests.cli_runs import ROOT

FILES = sorted(path for name in ("kosmos_lit", "datamodules", "tests", "benchmarks") for path in (ROOT / name).rglob("*.py"))
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
PROSE = [str(path.relative_to(ROOT)) for path in [*FILES, *PAGES]]

BANNED = {"found", "wanted", "given", "there", "here", "said", "told", "picture", "pictures", "sight"}
"""Names that do not say what the value is."""
ALLOWED_NAMES = {"kosmos_lit/nonfinite.py: found_inf": "torch's name, which its optimizers read"}
"""Exceptions as `path: name`, and why."""
ALLOWED_WORDS = {
    "picture": {
        "datamodules/world/creatures.py": "a prompt of the paper",
        "datamodules/world/language.py": "texts of the world",
        "datamodules/world/rendered_text.py": "a prompt of the paper, and texts of the world",
        "docs/evaluation.md": "prompts of the paper",
        "docs/glossary.md": "names the word",
        "docs/world.md": "a prompt of the paper",
        "kosmos_lit/cli/renamed.py": "a key of an earlier version",
        "kosmos_lit/evaluation/image_control.py": "a seed string",
        "kosmos_lit/tasks/birds.py": "prompts of the paper",
        "kosmos_lit/tasks/hateful_memes.py": "a prompt of the paper",
        "kosmos_lit/tasks/rendered_sst2.py": "a prompt of the paper",
        "tests/datamodules/world/test_language.py": "texts of the world",
        "tests/kosmos_lit/cli/test_parsing.py": "a key of an earlier version",
        "tests/kosmos_lit/tasks/language_datasets.py": "fields of a dataset",
        "tests/kosmos_lit/tasks/test_image_end_to_end.py": "a prompt of the paper",
        "tests/kosmos_lit/tasks/test_image_prompts.py": "prompts of the paper",
        "tests/test_words.py": "names the word",
    },
    "whoever": {"datamodules/world/language.py": "a text of the world", "tests/test_words.py": "names the word"},
}
"""Words that prose does not use, with the files that may have them, and why."""


pytestmark = pytest.mark.xdist_group("words")  # one worker: the files are parsed once

Defined = ast.Module | ast.ClassDef | ast.FunctionDef


@cache
def nodes() -> list[tuple[str, ast.AST]]:
    """Return what defines a name or has a docstring, with its file."""
    kinds = (ast.Name, ast.Attribute, ast.arg, ast.Module, ast.ClassDef, ast.FunctionDef)
    trees = ((str(path.relative_to(ROOT)), ast.parse(path.read_text(encoding="utf-8"))) for path in FILES)
    return [(path, node) for path, tree in trees for node in ast.walk(tree) if isinstance(node, kinds)]


def names() -> Iterator[tuple[str, str, int]]:
    """Yield file, name and line of variables, parameters, attributes, functions and classes; tests' names are prose."""
    for path, node in nodes():
        match node:
            case ast.Name(id=name, ctx=ast.Store()) | ast.Attribute(attr=name, ctx=ast.Store()) | ast.arg(arg=name):
                yield path, name, node.lineno
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name) if not name.startswith("test_"):
                yield path, name, node.lineno


def test_names_say_what_a_value_is() -> None:
    banned = [
        f"{path}:{line}: {name}"
        for path, name, line in names()
        if BANNED & set(name.lower().split("_")) and f"{path}: {name}" not in ALLOWED_NAMES
    ]

    assert banned == []


def test_docstrings_begin_with_their_subject() -> None:
    inverted = [
        f"{path}: {docstring.splitlines()[0]}"
        for path, node in nodes()
        if isinstance(node, Defined)
        if (docstring := ast.get_docstring(node)) and docstring.startswith(("Who ", "Whom "))
    ]

    assert inverted == []


@pytest.mark.parametrize("word", ALLOWED_WORDS)
def test_files_use_the_fields_word(word: str) -> None:
    users = {path for path in PROSE if word in (ROOT / path).read_text(encoding="utf-8").lower()}

    assert users == set(ALLOWED_WORDS[word])


def test_exceptions_of_names_are_still_needed() -> None:
    assert set(ALLOWED_NAMES) <= {f"{path}: {name}" for path, name, _ in names()}
