"""Fixtures of both packages' tests: a small tokenizer, small raw files, and the corpora prepared from them."""

from __future__ import annotations

import gc
import os
from functools import cache
from pathlib import Path

import docstring_parser
import pytest
import torch

from datamodules.corpus import IndexedCorpus
from datamodules.prepare.index import prepare_corpus
from datamodules.prepare.tokenizer import train_tokenizer
from kosmos_lit.cli import main
from kosmos_lit.tokenizer import Tokenizer
from tests.cli_runs import tiny_run
from tests.datamodules import sample_data


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--regenerate-golden", action="store_true", help="record tests/golden anew; see `make golden`")


def pytest_configure() -> None:
    """Collect no garbage while modules are imported and tests collected: none of that becomes garbage."""
    gc.disable()


def pytest_collection_finish() -> None:
    """Leave modules and tests out of all later garbage collections, which would spend most of their time on them."""
    gc.freeze()
    gc.enable()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # nanobind, at the end, takes what nobody collected for leaks


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Tensors here are too small for threads to help, and test processes run side by side."""
    # Lightning's launchers take every core for a process whose environment names no number, and sums round otherwise then.
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _parse_docstrings_once() -> None:
    """Every command builds its parser anew, and parsing the same docstrings again would be half of that time."""
    docstring_parser.parse_from_object = cache(docstring_parser.parse_from_object)


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece tokenizer of 211 pieces."""
    folder = tmp_path_factory.mktemp("tokenizer")
    sample_data.write_jsonl(folder / "sentences.jsonl", sample_data.sentences(307))
    train_tokenizer([str(folder / "sentences.jsonl")], 211, folder / "tokenizer")
    return folder / "tokenizer"


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder: Path) -> Tokenizer:
    return Tokenizer.load(tokenizer_folder)


@pytest.fixture(scope="session")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Valid raw files of every format; see `sample_data.write_raw`."""
    folder = tmp_path_factory.mktemp("raw")
    sample_data.write_raw(folder)
    return folder


@pytest.fixture(scope="session")
def corpora(raw: Path, tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, IndexedCorpus]:
    """The three corpora of documents in `raw`, by their names in CORPORA."""
    folder = tmp_path_factory.mktemp("corpora")
    return {
        name: prepare_corpus(format=format_, inputs=[str(raw / p)], tokenizer=tokenizer_folder, output=folder / name)
        for name, (format_, p) in sample_data.INPUTS.items()
    }


@pytest.fixture(scope="session")
def examples(raw: Path, tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> IndexedCorpus:
    """The instruction data of `raw`."""
    folder = tmp_path_factory.mktemp("examples") / "index"
    inputs = [str(raw / "tuning/*.jsonl*")]
    return prepare_corpus(format="instruct", inputs=inputs, tokenizer=tokenizer_folder, output=folder)


@pytest.fixture(scope="session")
def tiny_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The drawn world of configs/tiny.yaml, with its tokenizer and indexes."""
    folder = tmp_path_factory.mktemp("tiny")
    assert main(tiny_run("rows", folder / "unused", folder / "world", "--count", "0")) == 0
    return folder / "world"


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_world: Path) -> Path:
    """The folder of a run of six steps, shared by tests, which must not change it."""
    folder = tmp_path_factory.mktemp("trained")
    assert main(tiny_run("fit", folder, tiny_world)) == 0
    return folder
