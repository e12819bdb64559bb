"""Instruction data from the file to the batch."""

from __future__ import annotations

import json
import re
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest

from datamodules import InstructData
from datamodules.config import CorpusConfig, TokenizerConfig
from datamodules.corpus import IndexedCorpus
from datamodules.prepare.index import prepare_corpus
from datamodules.sources.instruct import prompt_text
from kosmos_lit.batch import CORPORA
from kosmos_lit.errors import UserError
from kosmos_lit.images import decode
from kosmos_lit.inference.prompts import encode_prompt
from kosmos_lit.tokenizer import BOS, EOS, IGNORE, Tokenizer
from tests.datamodules import sample_data
from tests.kosmos_lit.hugging_face_tokenizers import byte_fallback, byte_level, unigram, write_folder

LATENTS, SEQ_LEN = 3, 211
OPTIONS = {
    "seq_len": SEQ_LEN,
    "n_latents": LATENTS,
    "image_size": 7,
    "global_batch_rows": 4,
    "micro_batch_rows": 2,
    "num_workers": 0,
    "seed": 5,
}
RECORDS = sample_data.examples(19, 0) + sample_data.examples(13, 19)


@pytest.fixture(scope="module")
def build(raw, tokenizer_folder, tmp_path_factory):
    """Open instruction data as a module, with an index of its own."""

    def run(inputs=("tuning/*.jsonl*",), val=None, val_share=0.3, **changes):
        config = CorpusConfig(
            format="instruct",
            input=[str(raw / p) for p in inputs],
            val_input=val and [str(raw / val)],
            index=str(tmp_path_factory.mktemp("built") / "index"),
            val_share=val_share,
        )
        data = InstructData(config, tokenizer=TokenizerConfig(path=str(tokenizer_folder)), **(OPTIONS | changes))
        data.trainer = SimpleNamespace(
            world_size=1,
            global_rank=0,
            accumulate_grad_batches=1,
            global_step=0,
            val_check_interval=None,
            max_steps=7,
            ckpt_path=None,
            default_root_dir=str(tokenizer_folder.parent / "run"),
        )
        data.prepare_data()
        data.setup("fit")
        return data

    return run


@pytest.fixture(scope="module")
def data(build):
    return build()


def record_of(corpus: IndexedCorpus, document: int) -> dict:
    shard, name = corpus.shard_and_name(document)
    return RECORDS[int(name.removeprefix("line ")) - 1 + (19 if shard.endswith("gz") else 0)]


def answers_of(record: dict) -> list[str]:
    if "completion" in record:
        return [record["completion"]]
    return [message["content"] for message in record["messages"] if message["role"] == "assistant"]


def test_targets_are_the_answers_and_an_eos_behind_each(data, tokenizer):
    stream = data.stream("val")
    n_segments = 0
    for number in range(data.n_val_rows()):
        row = stream.row(number)
        for segment in row.segments:
            targets = row.targets[segment.position : segment.position + segment.length]
            answers = answers_of(record_of(data.prepared["instruct"].corpus, segment.document))
            expected = [id_ for answer in answers for id_ in (*tokenizer.encode(answer).tolist(), EOS)]
            assert targets[targets != IGNORE].tolist() == expected
            n_segments += 1
    assert n_segments == len(list(data.prepared["instruct"].held_out())) > 5


def test_no_eos_stands_in_the_input(data):
    rows = [data.stream().row(i) for i in range(17)]
    assert not any((row.tokens == EOS).any() for row in rows)


def test_the_targets_of_a_step_are_known_before_it(data):
    stream = data.stream()
    counted = [stream.n_targets(i, i + 1) for i in range(23)]
    assert counted == [int((stream.row(i).targets != IGNORE).sum()) for i in range(23)]


def test_no_example_is_split(data):
    corpus = data.prepared["instruct"].corpus
    lengths = np.diff(corpus.token_offsets)
    for number in range(29):
        for segment in data.stream().row(number).segments:
            assert (segment.start, segment.end) == (0, lengths[segment.document] + 1)


def test_an_image_is_read_from_its_own_file(raw, examples):
    document = next(d for d in range(examples.n_documents) if len(examples.document_images(d)) == 2)
    [first, second] = examples.document_images(document)
    names = record_of(examples, document)["images"]
    folder = raw / "tuning"
    assert examples.image_bytes(first) == (folder / names[0]).read_bytes()
    assert examples.image_bytes(second) == (folder / names[1]).read_bytes()
    assert examples.image_file(second) == folder / names[1]


def test_a_batch_has_its_images_in_the_order_of_their_slots(data):
    batch = next(iter(data.train_dataloader()))
    row = data.stream().row(0)
    first = decode(data.prepared["instruct"].corpus.image_bytes(row.images[0]), 7, "crop")
    assert batch.images[0].numpy().tolist() == first.tolist()
    assert batch.corpus.tolist() == [CORPORA.index("instruct")] * 2
    assert len(batch.images) == len(batch.slots) > 2


# ---- what does not fit, and what is held out


def test_examples_longer_than_a_row_are_dropped_and_counted(build, caplog):
    with caplog.at_level("INFO"):
        data = build(seq_len=48)
    plans = [data.prepared["instruct"].train.plan, data.prepared["instruct"].val.plan]
    n_long = sum(sum(plan.totals.dropped.values()) for plan in plans)
    planned = [document for plan in plans for document in sample_data.documents_of(plan)]
    assert n_long > 0
    assert len(planned) == len(RECORDS) - n_long
    assert re.search(r"instruct: \d+ train documents are dropped: .*; the first: .*Rows have 48 positions", caplog.text)
    assert ", line " in caplog.text


def test_rows_that_no_example_fits_are_refused(examples):
    with pytest.raises(UserError, match=r"none of 32 documents fits rows of 11 positions; .*; raise"):
        sample_data.plan("instruct", examples, 11, LATENTS, 0)


def test_a_file_may_be_held_out_as_a_whole(build):
    data = build(val="tuning/b.jsonl.gz")
    corpus = data.prepared["instruct"].corpus
    assert {corpus.shard_and_name(d)[0][-2:] for d in data.prepared["instruct"].held_out()} == {"gz"}
    assert len(list(data.prepared["instruct"].held_out())) == 13
    assert sample_data.documents_of(data.prepared["instruct"].train.plan) == list(range(19))


def test_a_held_out_file_that_was_not_prepared_is_named(build):
    with pytest.raises(UserError, match=r"no file matches .*no\.jsonl"):
        build(val="tuning/no.jsonl")


# ---- the same text in training and in generation


@pytest.mark.parametrize("kind", [0, 1, 2])
def test_a_prompt_is_read_as_it_was_trained(data, examples, tokenizer, kind):
    document = next(d for d in range(examples.n_documents) if int(record_of(examples, d) is RECORDS[kind]))
    record = RECORDS[kind]
    text = record.get("prompt") or prompt_text([(m["role"], m["content"]) for m in record["messages"][:-1]])
    read = encode_prompt(text, len(record.get("images", [])), tokenizer, LATENTS)
    stream = sample_data.stream(
        {"instruct": examples}, tokenizer.special, ratio=(0, 0, 0, 1), seq_len=SEQ_LEN, n_latents=LATENTS
    )
    rows = [stream.row(i) for i in range(stream.by_name["instruct"].plan.n_rows)]
    row, segment = next((r, s) for r in rows for s in r.segments if s.document == document)
    n, place = len(read.tokens), slice(segment.position, segment.position + segment.length)
    assert read.tokens.tolist() == row.tokens[place][:n].tolist()
    assert read.slots.tolist() == [slot - place.start for slot in row.slots.tolist() if place.start <= slot < place.stop]
    assert row.targets[place][n - 1 :].tolist() == [*tokenizer.encode(answers_of(record)[-1]).tolist(), EOS]


TALKS = [
    {"prompt": "the cat sat: ", "completion": " at the mat"},
    {"prompt": "the cat", "completion": " sat"},
    {"messages": [{"role": "user", "content": "the?"}, {"role": "assistant", "content": "cat"}]},
    {
        "messages": [
            {"role": "user", "content": "the?"},
            {"role": "assistant", "content": " cat "},
            {"role": "user", "content": "at?"},
            {"role": "assistant", "content": "the cat"},
        ]
    },
]
WRITTEN = [
    "the cat sat:  at the mat",
    "the cat sat",
    "Question: the? Answer: cat",
    "Question: the? Answer: cat Question: at? Answer: the cat",
]


@pytest.mark.parametrize("pieces", [byte_level, partial(byte_level, add_prefix_space=True), byte_fallback, unigram])
def test_an_answer_follows_its_prompt_with_the_ids_of_the_whole_text(tmp_path, pieces):
    folder = write_folder(tmp_path, pieces())
    sample_data.write_examples(tmp_path / "x.jsonl", TALKS)
    inputs = [str(tmp_path / "x.jsonl")]
    corpus = prepare_corpus(format="instruct", inputs=inputs, tokenizer=folder, output=tmp_path / "index")
    tokenizer = Tokenizer.load(folder)
    assert [corpus.document_tokens(d).tolist() for d in range(4)] == [tokenizer.encode(text).tolist() for text in WRITTEN]


def test_a_prompt_is_the_beginning_of_its_row_for_byte_level_pieces(tmp_path):
    folder = write_folder(tmp_path, byte_level())
    sample_data.write_examples(tmp_path / "x.jsonl", TALKS)
    inputs = [str(tmp_path / "x.jsonl")]
    corpus = prepare_corpus(format="instruct", inputs=inputs, tokenizer=folder, output=tmp_path / "index")
    tokenizer = Tokenizer.load(folder)
    for document, record in enumerate(TALKS):
        ids, supervised = corpus.document_tokens(document), corpus.document_supervised(document)
        text = record.get("prompt") or prompt_text([(m["role"], m["content"]) for m in record["messages"][:-1]])
        prompt = encode_prompt(text, 0, tokenizer, LATENTS).tokens[1:]
        assert ids[: len(prompt)].tolist() == prompt.tolist()
        assert supervised[len(prompt) :].all()
        assert not supervised[len(prompt) - 1]


def test_prompts_of_predict_are_the_tokens_of_the_row_up_to_the_last_answer(data, tokenizer):
    batches = list(data.predict_dataloader())
    corpus = data.prepared["instruct"].corpus
    prompts = [(ids, answer) for batch in batches for ids, answer in zip(batch.tokens, batch.targets, strict=True)]
    for document, (ids, answer) in zip(data.prepared["instruct"].held_out(), prompts, strict=True):
        stored = corpus.document_tokens(document)
        assert stored[: len(ids)].tolist() == ids.tolist()
        assert answer == tokenizer.decode(stored[len(ids) :].tolist()) == answers_of(record_of(corpus, document))[-1]
    assert all(len(b.images) == sum(b.n_images) for b in batches)
    assert all(text.count("<image>") == n for b in batches for text, n in zip(b.prompts, b.n_images, strict=True))


def test_prompts_without_room_for_an_answer_are_skipped(data, caplog, monkeypatch):
    monkeypatch.setattr(data, "seq_len", 101)
    with caplog.at_level("INFO"):
        n_prompts = sum(len(batch.targets) for batch in data.predict_dataloader())
    n_held_out = len(list(data.prepared["instruct"].held_out()))
    assert n_prompts < n_held_out
    assert f"{n_held_out - n_prompts} prompts are skipped: they leave less than 64 of 101 positions" in caplog.text


def test_prompts_that_all_lack_room_are_an_error_that_names_the_length(data, monkeypatch):
    monkeypatch.setattr(data, "seq_len", 67)
    with pytest.raises(UserError, match=r"there are no prompts: .* 67 positions .* raise data\.seq_len"):
        list(data.predict_dataloader())


def test_images_are_read_batch_by_batch(data, monkeypatch):
    monkeypatch.setattr("datamodules.prompt_batches.BATCH_SIZE", 2)
    read = []
    once = data.prepared["instruct"].corpus.image_bytes
    monkeypatch.setattr(data.prepared["instruct"].corpus, "image_bytes", lambda image: (read.append(image), once(image))[1])
    batches = iter(data.predict_dataloader())
    first = next(batches)
    assert len(read) == len(first.images)
    later = list(batches)
    assert len(read) == len(first.images) + sum(len(batch.images) for batch in later) > len(first.images)
    assert len(first.targets) == 2
    assert sum(len(batch.targets) for batch in later) == len(list(data.prepared["instruct"].held_out())) - 2


# ---- indexes


def test_an_index_remembers_its_turn_template(examples, raw, tokenizer_folder):
    from datamodules.sources import ReadOptions

    other = ReadOptions(turn_template="{user} {assistant}")
    with pytest.raises(UserError, match=r"options is .*turn_template"):
        prepare_corpus(
            format="instruct",
            inputs=[str(raw / "tuning/*.jsonl*")],
            tokenizer=tokenizer_folder,
            output=examples.folder,
            options=other,
        )


def test_an_index_from_before_an_option_was_made_with_its_default(raw, tokenizer_folder, tmp_path):
    prepare = {"format": "jsonl", "inputs": [str(raw / "text/a.jsonl")], "tokenizer": tokenizer_folder}
    prepare_corpus(**prepare, output=tmp_path / "index")
    manifest = json.loads((tmp_path / "index/manifest.json").read_text(encoding="utf-8"))
    del manifest["options"]["turn_template"]
    (tmp_path / "index/manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    assert prepare_corpus(**prepare, output=tmp_path / "index").n_documents == 17


def test_the_first_position_of_an_example_is_bos(data):
    row = data.stream().row(3)
    assert all(row.tokens[segment.position] == BOS for segment in row.segments)
