"""Hugging Face tokenizers as the text half of a vocabulary."""

import json
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend

from kosmos_lit.errors import UserError
from kosmos_lit.tokenizer import BOS, EOS, LEADING, TRAILING, UNK, Tokenizer, grounding
from tests.kosmos_lit import hugging_face_tokenizers as kinds

quickly = settings(derandomize=True, database=None, deadline=None, max_examples=100)
LITERALS = ["<|endoftext|>", "<image>", "<s>", "</s>", "<pad>", "[SEP]", "[UNK]", "<unk>", "</line>", "\n", "\r\n", "  "]
ANY = st.lists(st.one_of(st.text(st.characters(exclude_categories=["Cs"])), st.sampled_from(LITERALS))).map("".join)
EXACT = ["byte_level", "byte_level_prefixed", "byte_fallback", "eager"]
MAKERS = {
    "byte_level": kinds.byte_level,
    "byte_level_prefixed": lambda: kinds.byte_level(add_prefix_space=True),
    "byte_fallback": kinds.byte_fallback,
    "eager": kinds.eager,
    "unigram": kinds.unigram,
    "word_pieces": kinds.word_pieces,
    "words": kinds.words,
}


class Both(NamedTuple):
    """A tokenizer as we read it, and as its library does."""

    ours: Tokenizer
    theirs: Backend

    def __repr__(self) -> str:
        return "..."


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    found = {}
    for name, make in MAKERS.items():
        folder = kinds.made_folder(tmp_path_factory.mktemp(name), make())
        found[name] = Both(Tokenizer.load(folder), Backend.from_file(str(folder / "tokenizer.json")))
    return found


def plain(text: str) -> bool:
    return not any(literal in text for literal in LITERALS if literal.strip())


# ---- ids


@pytest.mark.parametrize("kind", MAKERS)
def test_ids_of_text_stand_between_the_control_tokens(made, kind):
    ours, theirs = made[kind]
    n_text = theirs.get_vocab_size()
    assert ours.n_pieces == n_text
    assert ours.vocab_size == 4 + n_text + 6
    assert [ours.name(i) for i in range(4)] == list(LEADING)
    assert [ours.name(i) for i in range(4 + n_text, ours.vocab_size)] == list(TRAILING)


@pytest.mark.parametrize("kind", MAKERS)
@quickly
@given(text=st.one_of(st.text("thecatsonré ,.!<>"), ANY).filter(plain))
def test_an_id_is_theirs_plus_4(made, kind, text):
    ours, theirs = made[kind]
    if not ours._pieces.reads_newlines:
        text = text.replace("\r", "").replace("\n", "")
    unknown = theirs.token_to_id("<unk>"), theirs.token_to_id("[UNK]")
    wanted = [UNK if i in unknown else i + 4 for i in theirs.encode(text, add_special_tokens=False).ids]
    assert ours.encode(text).tolist() == wanted


@pytest.mark.parametrize("kind", MAKERS)
@quickly
@given(text=ANY)
def test_text_never_becomes_a_control_or_special_token(made, kind, text):
    ours, theirs = made[kind]
    special = {i + 4 for i, token in theirs.get_added_tokens_decoder().items() if token.special}
    allowed = set(range(UNK, ours.special.mask)) - special | {ours.special.line_end}
    assert set(ours.encode(text).tolist()) <= allowed


@pytest.mark.parametrize(("kind", "literal"), [("byte_level", "<|endoftext|>"), ("eager", "<image>"), ("unigram", "</s>")])
def test_a_special_token_spelled_out_is_text(made, kind, literal):
    ours, theirs = made[kind]
    assert len(theirs.encode(literal, add_special_tokens=False).ids) < 3  # read as the token there
    ids = ours.encode(literal)
    assert len(ids) >= 3 or UNK in ids
    assert kind == "unigram" or ours.decode(ids) == literal


def test_special_tokens_decode_to_nothing(made):
    for ours, theirs in made.values():
        special = [i + 4 for i, token in theirs.get_added_tokens_decoder().items() if token.special]
        the = ours.encode("the").tolist()
        assert special
        assert ours.decode([*special, *the, *special]) == ours.decode(the)
        assert ours.token_bytes[:, special].sum() == 0


def test_special_tokens_keep_their_names(made):
    ours, _ = made["byte_level"]
    assert (ours.name(4), ours.name(5)) == ("<|endoftext|>", "<image>")
    assert ours.id_of("<image>") == ours.special.image != 5


def test_templates_truncation_and_padding_are_left_out(tmp_path):
    backend = kinds.byte_level()
    backend.enable_truncation(2)
    backend.enable_padding(length=5)
    ours = Tokenizer.load(kinds.made_folder(tmp_path, backend))
    assert ours.decode(ours.encode("the cat sat")) == "the cat sat"


# ---- text


@pytest.mark.parametrize("kind", [k for k in EXACT if k != "byte_level_prefixed"])
@quickly
@given(text=ANY)
def test_decoding_gives_every_text_back(made, kind, text):
    ours, _ = made[kind]
    text = text.replace("▁", "") if kind == "byte_fallback" else text  # its sign for a space
    assert ours.decode(ours.encode(text)) == text


@quickly
@given(text=ANY.filter(lambda text: not text.startswith(" ")))
def test_decoding_takes_back_the_space_that_encoding_adds(made, text):
    ours, _ = made["byte_level_prefixed"]
    assert ours.decode(ours.encode(text)) == text


@pytest.mark.parametrize("kind", ["unigram", "word_pieces", "words"])
@quickly
@given(lines=st.lists(st.lists(st.sampled_from(["the", "cat", "sat"]), max_size=5).map(" ".join), min_size=1, max_size=4))
def test_decoding_gives_lines_of_words_back(made, kind, lines):
    ours, _ = made[kind]
    assert ours.decode(ours.encode("\n".join(lines))) == "\n".join(lines)


@quickly
@given(text=st.text("abcdefghijklmnopqrstuvw ,.!\n", max_size=61))
def test_what_word_pieces_forget_they_forget_at_once(made, text):
    ours, _ = made["word_pieces"]
    once = ours.decode(ours.encode(text))
    assert ours.decode(ours.encode(once)) == once


@pytest.mark.parametrize(("kind", "reads"), [(k, k in EXACT) for k in MAKERS])
def test_a_newline_is_text_where_the_tokenizer_gives_it_back(made, kind, reads):
    ours, _ = made[kind]
    ids = ours.encode("the\ncat").tolist()
    assert (ours.special.line_end in ids) != reads
    assert ours.decode(ids) == "the\ncat"


@quickly
@given(texts=st.lists(ANY, max_size=5))
def test_many_texts_are_encoded_as_each_alone(made, texts):
    for ours, _ in made.values():
        assert [i.tolist() for i in ours.encode_all(texts)] == [ours.encode(text).tolist() for text in texts]


def test_an_unknown_word_is_decoded_as_unknown(made):
    ours, _ = made["words"]
    ids = ours.encode("the dog sat")
    assert ids.tolist() == [6, UNK, 8]
    assert ours.decode(ids) == "the ⁇  sat"


def test_what_utf8_cannot_write_becomes_a_question_mark(made):
    ours, _ = made["byte_level"]
    assert np.array_equal(ours.encode("a\ud800b"), ours.encode("a?b"))


@quickly
@given(parts=st.lists(st.one_of(st.text("the\n cat").map(str.strip), st.sampled_from(grounding(3)))))
def test_a_marked_text_is_written_out_as_it_is_read(made, parts):
    for kind in EXACT:
        ours = Tokenizer(made[kind][0]._pieces, grounding(3))
        ids = ours.encode_marked("".join(parts))
        assert ours.encode_marked(ours.decode(ids, keep_control=True)).tolist() == ids.tolist()


def test_names_show_spaces_as_spaces(made):
    for ours, _ in made.values():
        assert "".join(ours.name(i) for i in ours.encode("the cat").tolist()).strip() == "the cat"


# ---- bytes


@pytest.mark.parametrize("kind", EXACT)
@quickly
@given(text=ANY)
def test_token_bytes_add_up_to_the_texts_utf8(made, kind, text):
    ours, _ = made[kind]
    text = text.lstrip(" ") if kind == "byte_level_prefixed" else text
    ids = ours.encode(text)
    n_bytes = ours.count_bytes(np.concatenate([[BOS], ids]), np.append(ids, EOS))
    assert n_bytes.sum() == len(text.encode())


@pytest.mark.parametrize("kind", ["unigram", "word_pieces", "words"])
@quickly
@given(lines=st.lists(st.lists(st.sampled_from(["the", "cat", "sat"]), max_size=5).map(" ".join), min_size=1, max_size=4))
def test_token_bytes_add_up_for_lines_of_words(made, kind, lines):
    ours, _ = made[kind]
    ids = ours.encode("\n".join(lines))
    n_bytes = ours.count_bytes(np.concatenate([[BOS], ids]), np.append(ids, EOS))
    assert n_bytes.sum() == len("\n".join(lines).encode())


# ---- folders


def test_a_folder_without_tokenizer_json_is_converted(made, tmp_path):
    from transformers import GPT2Tokenizer

    backend = made["byte_level"][1]
    table = json.loads(backend.to_str())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(table["vocab"]), encoding="utf-8")
    (tmp_path / "merges.txt").write_text("\n".join(" ".join(m) for m in table["merges"]), encoding="utf-8")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}', encoding="utf-8")
    ours, theirs = Tokenizer.load(tmp_path), GPT2Tokenizer.from_pretrained(tmp_path)
    assert (ours.encode("the  cat\n sat") - 4).tolist() == theirs("the  cat\n sat")["input_ids"]


def test_a_folder_that_transformers_cannot_convert_is_the_users_error(tmp_path):
    (tmp_path / "vocab.json").write_text("{}", encoding="utf-8")
    with pytest.raises(UserError, match=r"has no tokenizer\.json, and transformers cannot make one"):
        Tokenizer.load(tmp_path)


def test_what_transformers_saves_is_read(made, tmp_path):
    from transformers import PreTrainedTokenizerFast

    ours, backend = made["word_pieces"]
    saved = PreTrainedTokenizerFast(tokenizer_object=backend, cls_token="[CLS]", sep_token="[SEP]", unk_token="[UNK]")
    saved.save_pretrained(tmp_path)
    assert np.array_equal(Tokenizer.load(tmp_path).encode("The cat, sat"), ours.encode("the cat, sat"))


def test_added_tokens_whose_ids_leave_one_out_are_the_users_error(tmp_path):
    table = json.loads(kinds.byte_level().to_str())
    table["added_tokens"].append(table["added_tokens"][0] | {"id": 999, "content": "<late>"})
    (tmp_path / "tokenizer.json").write_text(json.dumps(table), encoding="utf-8")
    with pytest.raises(UserError, match="'<late>' cannot have id 999"):
        Tokenizer.load(tmp_path)
