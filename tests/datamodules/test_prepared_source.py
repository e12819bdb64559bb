"""The start of every rank: it opens an index, and compares it with the config."""

import json
import os
from dataclasses import replace

import pytest

from datamodules.config import CorpusConfig
from datamodules.mixture.shares import name_sources
from datamodules.packing import RowLayout
from datamodules.prepare.index import prepare_corpus
from datamodules.prepared_source import PreparedSource, prepare_source
from kosmos_lit.errors import UserError
from kosmos_lit.tokenizer import Tokenizer
from tests.datamodules import sample_data

LAYOUT = RowLayout(seq_len=47, n_latents=3, seed=5)


@pytest.fixture
def config(tokenizer_folder, tmp_path):
    """An index of three files of text."""
    for n in range(3):
        lines = [json.dumps({"text": text}).encode() for text in sample_data.sentences(7, 7 * n)]
        sample_data.write_lines(tmp_path / f"raw/{n}.jsonl", lines)
    config = CorpusConfig(
        format="jsonl", input=[str(tmp_path / "raw/*.jsonl")], index=str(tmp_path / "index"), val_share=0.0
    )
    prepare_corpus(format="jsonl", inputs=config.input, tokenizer=tokenizer_folder, output=tmp_path / "index")
    return config


@pytest.fixture
def open_source(tokenizer_folder):
    def run(config):
        return PreparedSource(name_sources({"text": config}, None)["text"], Tokenizer.load(tokenizer_folder), LAYOUT, 1)

    return run


def test_a_rank_opens_no_file_whose_name_is_in_the_index(config, open_source, monkeypatch):
    tested = []
    monkeypatch.setattr(os.path, "isfile", tested.append)
    assert open_source(config).train.plan.n_rows > 0
    assert tested == []


def test_a_file_that_is_new_since_the_index_was_made_is_refused(config, open_source, tmp_path):
    sample_data.write_lines(tmp_path / "raw/3.jsonl", [b'{"text": "new"}'])
    with pytest.raises(UserError, match=r"the index has 3 shards, the run 4; new \['3\.jsonl'\], gone \[\]"):
        open_source(config)


def test_a_folder_that_a_pattern_matches_is_no_file(config, open_source, tmp_path):
    (tmp_path / "raw/old.jsonl").mkdir()
    assert open_source(config).train.plan.totals.documents == 21


def test_an_index_is_used_without_its_text(config, open_source, tmp_path):
    for file in (tmp_path / "raw").iterdir():
        file.unlink()
    assert open_source(config).train.plan.totals.documents == 21


def test_a_file_that_has_changed_is_refused_where_it_is_prepared(config, tokenizer_folder, tmp_path):
    with (tmp_path / "raw/1.jsonl").open("a") as file:
        file.write('{"text": "more"}\n')
    with pytest.raises(UserError, match=r"1 shards that are gone or have changed, .*1\.jsonl for one"):
        prepare_source(name_sources({"text": config}, None)["text"], str(tokenizer_folder), 1)


@pytest.mark.parametrize("changes", [{"val_share": 0.3}, {"val_input": ["1.jsonl"]}])
def test_held_out_documents_are_the_rows_of_validation(config, open_source, tmp_path, changes):
    if "val_input" in changes:
        changes = {"val_input": [str(tmp_path / "raw" / name) for name in changes["val_input"]]}
    source = open_source(replace(config, **changes))
    assert set(source.held_out()) == set(sample_data.documents_of(source.val.plan)) != set()
    assert open_source(config).val is None
