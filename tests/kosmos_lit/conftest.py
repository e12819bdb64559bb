"""What is made once for all tests of `kosmos_lit`."""

from __future__ import annotations

import io
import json

import pytest
import sentencepiece

from kosmos_lit.tokenizer import Tokenizer
from tests.kosmos_lit.hugging_face_tokenizers import byte_level, word_pieces, write_folder
from tests.kosmos_lit.tiny_kosmos import N_PIECES, TOWER

LINES = (
    "the cat sat on the mat",
    "a red square and a blue circle",
    "naïve café über größe äöüß",
    "<image> and </line> tags / and < or > are text",
    "jackdaws love my big sphinx of quartz, fix! why? how: so; 0123456789",
)


@pytest.fixture(scope="session")
def kosmos_tower(tmp_path_factory) -> str:
    """Path of a tower's architecture in open_clip's format."""
    path = tmp_path_factory.mktemp("tower") / "tiny_kosmos_tower.json"
    path.write_text(json.dumps(TOWER), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="session")
def kosmos_vocabulary() -> bytes:
    """A SentencePiece model as `prepare tokenizer` makes one, of 61 pieces."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES * 7),
        model_writer=model,
        vocab_size=N_PIECES,
        model_type="unigram",
        character_coverage=1.0,
        max_sentencepiece_length=16,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


@pytest.fixture(scope="session")
def kosmos_tokenizer(kosmos_vocabulary) -> Tokenizer:
    return Tokenizer(kosmos_vocabulary)


@pytest.fixture(scope="session")
def byte_level_folder(tmp_path_factory):
    """Folder of a byte-level BPE tokenizer, as GPT-2's."""
    return write_folder(tmp_path_factory.mktemp("byte_level"), byte_level())


@pytest.fixture(scope="session")
def word_folder(tmp_path_factory):
    """Folder of a WordPiece tokenizer, as BERT's."""
    return write_folder(tmp_path_factory.mktemp("words"), word_pieces())
