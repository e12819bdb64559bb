"""Fixtures that the tests of both packages share: a small tokenizer, small raw files, and what is prepared from them."""

from __future__ import annotations

from pathlib import Path

import pytest

from datamodules.corpus import IndexedCorpus
from datamodules.prepare.index import prepare_corpus
from datamodules.prepare.tokenizer import train_tokenizer
from kosmos_lit.tokens import Tokenizer
from tests.datamodules import made


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece tokenizer of 211 pieces."""
    folder = tmp_path_factory.mktemp("tokenizer")
    made.write_jsonl(folder / "sentences.jsonl", made.sentences(307))
    train_tokenizer([str(folder / "sentences.jsonl")], 211, folder / "tokenizer")
    return folder / "tokenizer"


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder: Path) -> Tokenizer:
    return Tokenizer.load(tokenizer_folder)


@pytest.fixture(scope="session")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Raw files of every format, all of them sound; `made.write_raw` says what there is."""
    folder = tmp_path_factory.mktemp("raw")
    made.write_raw(folder)
    return folder


@pytest.fixture(scope="session")
def corpora(raw: Path, tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, IndexedCorpus]:
    """The three corpora of `raw`, by their names in CORPORA."""
    folder = tmp_path_factory.mktemp("corpora")
    return {
        name: prepare_corpus(format=format_, inputs=[str(raw / p)], tokenizer=tokenizer_folder, output=folder / name)
        for name, (format_, p) in made.INPUTS.items()
    }
