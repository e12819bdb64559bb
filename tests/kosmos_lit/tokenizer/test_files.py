import json
import pickle
import shutil

import numpy as np
import pytest

from kosmos_lit.errors import UserError
from kosmos_lit.tokenizer import MODEL_FILE, Tokenizer, grounding
from kosmos_lit.tokenizer.files import LAYOUT_FILE, MAGIC
from kosmos_lit.tokenizer.xlm_roberta import DICT_FILE

TEXT = "the cat\n sat <image> on <phrase> 漢 mats"


def same(a: Tokenizer, b: Tokenizer) -> bool:
    """Whether two tokenizers are one: by what they call themselves, and by what they do."""
    alike = (a.fingerprint, a.extra, a.vocab_size, a.special) == (b.fingerprint, b.extra, b.vocab_size, b.special)
    return alike and np.array_equal(a.encode_marked(TEXT), b.encode_marked(TEXT))


@pytest.fixture(params=["plain", "grounded", "bytes", "bytes grounded", "words"])
def tokenizer(request, kosmos_vocabulary, byte_level_folder, word_folder):
    extra = grounding(3) if "grounded" in request.param else ()
    if "bytes" in request.param:
        return Tokenizer(Tokenizer.load(byte_level_folder)._pieces, extra)
    return Tokenizer.load(word_folder) if request.param == "words" else Tokenizer(kosmos_vocabulary, extra)


def test_bytes_give_the_tokenizer_back(tokenizer):
    assert same(Tokenizer.from_bytes(tokenizer.to_bytes()), tokenizer)


def test_a_folder_gives_the_tokenizer_back(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "new")
    assert same(Tokenizer.load(tmp_path / "new"), tokenizer)


def test_a_tokenizer_can_be_sent_to_another_process(tokenizer):
    assert same(pickle.loads(pickle.dumps(tokenizer)), tokenizer)


def test_a_plain_model_is_its_own_bytes(kosmos_vocabulary):
    assert Tokenizer(kosmos_vocabulary).to_bytes() == kosmos_vocabulary
    assert Tokenizer.from_bytes(kosmos_vocabulary).extra == ()


def test_the_fingerprint_tells_everything_apart_that_changes_ids(kosmos_vocabulary, byte_level_folder, word_folder):
    pieces = [kosmos_vocabulary, *(Tokenizer.load(f)._pieces for f in (byte_level_folder, word_folder))]
    extras = [(), ("<a>",), ("<b>",), ("<a>", "<b>"), ("<b>", "<a>")]
    fingerprints = {Tokenizer(p, e).fingerprint for p in pieces for e in extras}
    assert len(fingerprints) == len(pieces) * len(extras)


def test_the_fingerprint_is_of_content_not_of_spelling(byte_level_folder, tmp_path):
    table = json.loads((byte_level_folder / "tokenizer.json").read_bytes())
    changed = dict(reversed(table.items())) | {
        "truncation": {"max_length": 3, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(changed, indent=3), encoding="utf-8")
    assert same(Tokenizer.load(tmp_path), Tokenizer.load(byte_level_folder))


def test_saving_without_extra_tokens_removes_earlier_ones(kosmos_vocabulary, tmp_path):
    Tokenizer(kosmos_vocabulary, ["<a>"]).save(tmp_path)
    Tokenizer(kosmos_vocabulary).save(tmp_path)
    assert Tokenizer.load(tmp_path).extra == ()


@pytest.mark.parametrize("layout", ["{", "[]", '{"kind": "pickle", "extra": []}', '{"kind": "sentencepiece", "extra": [3]}'])
def test_a_broken_layout_is_the_users_error(kosmos_vocabulary, tmp_path, layout):
    Tokenizer(kosmos_vocabulary).save(tmp_path)
    (tmp_path / LAYOUT_FILE).write_text(layout, encoding="utf-8")
    with pytest.raises(UserError, match=f'{LAYOUT_FILE}: expected {{"kind": sentencepiece or huggingface'):
        Tokenizer.load(tmp_path)
    with pytest.raises(UserError, match=r"the tokenizer's bytes: expected \{"):
        Tokenizer.from_bytes(MAGIC + layout.encode() + b"\n" + kosmos_vocabulary)


def test_a_layout_without_its_pieces_is_the_users_error(kosmos_vocabulary, tmp_path):
    Tokenizer(kosmos_vocabulary, ["<a>"]).save(tmp_path)
    (tmp_path / MODEL_FILE).unlink()
    with pytest.raises(UserError, match=f"names {MODEL_FILE}, which is missing"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("data", [b"", b"{}", b'{"model": 3, "added_tokens": []}', b"\xff", b"[]", b"half"])
def test_a_broken_hugging_face_file_is_the_users_error(byte_level_folder, tmp_path, data):
    content = (byte_level_folder / "tokenizer.json").read_bytes()
    (tmp_path / "tokenizer.json").write_bytes(content[: len(content) // 2] if data == b"half" else data)
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        Tokenizer.load(tmp_path)


# ---- the released layout: a model, and fairseq's dictionary


def write_dict(folder, kosmos_vocabulary, change):
    (folder / MODEL_FILE).write_bytes(kosmos_vocabulary)
    tokenizer = Tokenizer(kosmos_vocabulary)
    lines = [f"{tokenizer.name(i).replace(' ', '▁')} {1000 - i}" for i in range(4, tokenizer.special.mask)]
    (folder / DICT_FILE).write_text("\n".join(change(lines)) + "\n", encoding="utf-8")


def test_a_dictionary_that_lists_the_pieces_in_order_is_accepted(kosmos_vocabulary, tmp_path):
    write_dict(tmp_path, kosmos_vocabulary, lambda lines: lines)
    assert same(Tokenizer.load(tmp_path), Tokenizer(kosmos_vocabulary))


def test_the_first_difference_of_a_dictionary_is_named(kosmos_vocabulary, tmp_path):
    write_dict(tmp_path, kosmos_vocabulary, lambda lines: [*lines[:11], "zebra 5", *lines[12:]])
    with pytest.raises(UserError, match=r"dict\.txt: line 12 is 'zebra', but piece 14 of"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("change", [lambda lines: lines[:-1], lambda lines: [*lines, "more 1"]])
def test_a_dictionary_of_another_length_is_the_users_error(kosmos_vocabulary, tmp_path, change):
    write_dict(tmp_path, kosmos_vocabulary, change)
    with pytest.raises(UserError, match=r"dict\.txt has \d+ lines, but .* has 58 pieces"):
        Tokenizer.load(tmp_path)


def test_other_files_of_a_folder_are_kept(tokenizer, tmp_path):
    (tmp_path / "notes").write_text("mine", encoding="utf-8")
    tokenizer.save(tmp_path)
    assert (tmp_path / "notes").read_text(encoding="utf-8") == "mine"
    shutil.rmtree(tmp_path)
