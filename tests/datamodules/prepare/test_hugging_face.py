"""Corpora in the ids of a Hugging Face tokenizer, from preparation to a trained model."""

import json

import numpy as np
import pytest
import yaml

from datamodules.prepare.index import prepare_corpus
from datamodules.prepare.tokenizer import train_tokenizer
from kosmos_lit.cli import main
from kosmos_lit.errors import UserError
from kosmos_lit.tokenizer import BOS, EOS, Tokenizer
from kosmos_lit.weights.load import load_tokenizer
from tests.cli_runs import TINY
from tests.datamodules import sample_data
from tests.kosmos_lit.hugging_face_tokenizers import byte_level, write_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("byte_level"), byte_level())


@pytest.fixture
def texts(tmp_path):
    written = [text for n in range(3) for text in sample_data.texts(23, n)]
    for n in range(3):
        sample_data.write_jsonl(tmp_path / f"raw/{n}.jsonl", written[23 * n : 23 * n + 23])
    return written


def prepared(tmp_path, folder, **changes):
    options = {"format": "jsonl", "inputs": [str(tmp_path / "raw/*.jsonl")], "tokenizer": folder} | changes
    return prepare_corpus(**{"output": tmp_path / "index"} | options)


@pytest.mark.parametrize("workers", [1, 3])
def test_documents_are_the_texts_byte_for_byte(texts, folder, tmp_path, workers):
    corpus, tokenizer = prepared(tmp_path, folder, workers=workers), Tokenizer.load(folder)
    tokens = [corpus.document_tokens(d).astype(np.int64) for d in range(corpus.n_documents)]
    assert [tokenizer.decode(ids) for ids in tokens] == texts
    sizes = [tokenizer.count_bytes(np.append(BOS, ids), np.append(ids, EOS)).sum() for ids in tokens]
    assert sizes == [len(text.encode()) for text in texts]


def test_an_image_in_a_page_has_our_marker(raw, folder, tmp_path):
    format_, pattern = sample_data.INPUTS["caption"]
    corpus = prepare_corpus(format=format_, inputs=[str(raw / pattern)], tokenizer=folder, output=tmp_path / "index")
    ids = corpus.document_tokens(0)
    assert ids[0] == Tokenizer.load(folder).special.image
    assert (ids[1:] < Tokenizer.load(folder).special.mask).all()


@pytest.mark.parametrize(("n_more", "dtype"), [(0, np.uint16), (1 << 16, np.uint32)])
def test_tokens_take_the_bytes_that_the_vocabulary_asks_for(texts, tmp_path, n_more, dtype):
    table = json.loads(byte_level().to_str())
    vocabulary = table["model"]["vocab"]
    vocabulary |= {f"word{i}": len(vocabulary) + i for i in range(n_more)}
    (tmp_path / "tokenizer.json").write_text(json.dumps(table), encoding="utf-8")
    prepared(tmp_path, tmp_path)
    assert np.load(tmp_path / "index/tokens.npy").dtype == dtype


def test_a_tokenizer_is_not_trained_over_another_ones_folder(texts, folder, tmp_path):
    with pytest.raises(UserError, match="already holds a tokenizer"):
        train_tokenizer([str(tmp_path / "raw/*.jsonl")], 101, folder)


@pytest.mark.slow
def test_a_model_learns_writes_and_is_saved_with_it(texts, folder, tmp_path, capsys):
    with open(TINY, encoding="utf-8") as file:
        config = yaml.safe_load(file)
    names = ("StepLog", "Checkpoints")
    config["trainer"]["callbacks"] = [c for c in config["trainer"]["callbacks"] if c["class_path"].endswith(names)]
    config["model"]["kosmos"]["decoder"]["vocab_size"] = 331
    text = {"format": "jsonl", "input": [str(tmp_path / "raw/*.jsonl")], "index": str(tmp_path / "index"), "val_share": 0.1}
    shared = {key: config["data"]["init_args"][key] for key in ("seq_len", "global_batch_rows", "micro_batch_rows")}
    arguments = {"tokenizer": {"path": str(folder)}, "text": text, "ratio": {"text": 1, "caption": 0, "interleaved": 0}}
    config["data"] = {"class_path": "datamodules.MixtureData", "init_args": arguments | shared | {"num_workers": 2}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    assert main(["fit", "-c", str(tmp_path / "run.yaml"), "--trainer.default_root_dir", str(tmp_path / "run")]) == 0

    checkpoint = tmp_path / "run/checkpoints/step=00000006.ckpt"
    tokenizer = load_tokenizer(checkpoint)
    assert tokenizer is not None
    assert tokenizer.fingerprint == Tokenizer.load(folder).fingerprint
    capsys.readouterr()
    assert main(["generate", "--ckpt_path", str(checkpoint), "--prompt", "The cat", "--max_new_tokens", "5"]) == 0
    assert capsys.readouterr().out.strip()
