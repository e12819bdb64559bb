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
from tests.kosmos_lit import hugging_face_tokenizers

quickly = settings(derandomize=True, database=None, deadline=None, max_examples=100)
LITERALS = ["<|endoftext|>", "<image>", "<s>", "</s>", "<pad>", "[SEP]", "[UNK]", "<unk>", "</line>", "\n", "\r\n", "  "]
ANY = st.lists(st.one_of(st.text(st.characters(exclude_categories=["Cs"])), st.sampled_from(LITERALS))).map("".join)
EXACT = ["byte_level", "byte_level_prefixed", "byte_fallback", "eager"]
MAKERS = {
    "byte_level": hugging_face_tokenizers.byte_level,
    "byte_level_prefixed": lambda: hugging_face_tokenizers.byte_level(add_prefix_space=True),
    "byte_fallback": hugging_face_tokenizers.byte_fallback,
    "eager": hugging_face_tokenizers.eager,
    "unigram": hugging_face_tokenizers.unigram,
    "word_pieces": hugging_face_tokenizers.word_pieces,
    "words": hugging_face_tokenizers.words,
}


class TokenizerPair(NamedTuple):
    """A tokenizer of ours, and the library's own of the same file."""

    tokenizer: Tokenizer
    backend: Backend

    def __repr__(self) -> str:
        return "..."


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    loaded = {}
    for name, make in MAKERS.items():
        folder = hugging_face_tokenizers.write_folder(tmp_path_factory.mktemp(name), make())
        loaded[name] = TokenizerPair(Tokenizer.load(folder), Backend.from_file(str(folder / "tokenizer.json")))
    return loaded


def plain(text: str) -> bool:
    return not any(literal in text for literal in LITERALS if literal.strip())


# ---- ids


@pytest.mark.parametrize("kind", MAKERS)
def test_ids_of_text_stand_between_the_control_tokens(tokenizers, kind):
    tokenizer, backend = tokenizers[kind]
    n_text = backend.get_vocab_size()
    assert tokenizer.n_pieces == n_text
    assert tokenizer.vocab_size == 4 + n_text + 6
    assert [tokenizer.name(i) for i in range(4)] == list(LEADING)
    assert [tokenizer.name(i) for i in range(4 + n_text, tokenizer.vocab_size)] == list(TRAILING)


@pytest.mark.parametrize("kind", MAKERS)
@quickly
@given(text=st.one_of(st.text("thecatsonré ,.!<>"), ANY).filter(plain))
def test_an_id_is_the_backends_plus_4(tokenizers, kind, text):
    tokenizer, backend = tokenizers[kind]
    if not tokenizer._pieces.reads_newlines:
        text = text.replace("\r", "").replace("\n", "")
    unknown = backend.token_to_id("<unk>"), backend.token_to_id("[UNK]")
    expected = [UNK if i in unknown else i + 4 for i in backend.encode(text, add_special_tokens=False).ids]
    assert tokenizer.encode(text).tolist() == expected


@pytest.mark.parametrize("kind", MAKERS)
@quickly
@given(text=ANY)
def test_text_never_becomes_a_control_or_special_token(tokenizers, kind, text):
    tokenizer, backend = tokenizers[kind]
    special = {i + 4 for i, token in backend.get_added_tokens_decoder().items() if token.special}
    allowed = set(range(UNK, tokenizer.special.mask)) - special | {tokenizer.special.line_end}
    assert set(tokenizer.encode(text).tolist()) <= allowed


@pytest.mark.parametrize(("kind", "literal"), [("byte_level", "<|endoftext|>"), ("eager", "<image>"), ("unigram", "</s>")])
def test_a_special_token_spelled_out_is_text(tokenizers, kind, literal):
    tokenizer, backend = tokenizers[kind]
    assert len(backend.encode(literal, add_special_tokens=False).ids) < 3  # the backend reads the token
    ids = tokenizer.encode(literal)
    assert len(ids) >= 3 or UNK in ids
    assert kind == "unigram" or tokenizer.decode(ids) == literal


def test_special_tokens_decode_to_nothing(tokenizers):
    for tokenizer, backend in tokenizers.values():
        special = [i + 4 for i, token in backend.get_added_tokens_decoder().items() if token.special]
        the = tokenizer.encode("the").tolist()
        assert special
        assert tokenizer.decode([*special, *the, *special]) == tokenizer.decode(the)
        assert tokenizer.token_bytes[:, special].sum() == 0


def test_special_tokens_keep_their_names(tokenizers):
    tokenizer, _ = tokenizers["byte_level"]
    assert (tokenizer.name(4), tokenizer.name(5)) == ("<|endoftext|>", "<image>")
    assert tokenizer.id_of("<image>") == tokenizer.special.image != 5


def test_templates_truncation_and_padding_are_left_out(tmp_path):
    backend = hugging_face_tokenizers.byte_level()
    backend.enable_truncation(2)
    backend.enable_padding(length=5)
    tokenizer = Tokenizer.load(hugging_face_tokenizers.write_folder(tmp_path, backend))
    assert tokenizer.decode(tokenizer.encode("the cat sat")) == "the cat sat"


# ---- text


@pytest.mark.parametrize("kind", [k for k in EXACT if k != "byte_level_prefixed"])
@quickly
@given(text=ANY)
def test_decoding_gives_every_text_back(tokenizers, kind, text):
    tokenizer, _ = tokenizers[kind]
    text = text.replace("▁", "") if kind == "byte_fallback" else text  # its sign for a space
    assert tokenizer.decode(tokenizer.encode(text)) == text


@quickly
@given(text=ANY.filter(lambda text: not text.startswith(" ")))
def test_decoding_takes_back_the_space_that_encoding_adds(tokenizers, text):
    tokenizer, _ = tokenizers["byte_level_prefixed"]
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("kind", ["unigram", "word_pieces", "words"])
@quickly
@given(lines=st.lists(st.lists(st.sampled_from(["the", "cat", "sat"]), max_size=5).map(" ".join), min_size=1, max_size=4))
def test_decoding_gives_lines_of_words_back(tokenizers, kind, lines):
    tokenizer, _ = tokenizers[kind]
    assert tokenizer.decode(tokenizer.encode("\n".join(lines))) == "\n".join(lines)


@quickly
@given(text=st.text("abcdefghijklmnopqrstuvw ,.!\n", max_size=61))
def test_decoding_word_pieces_is_idempotent(tokenizers, text):
    tokenizer, _ = tokenizers["word_pieces"]
    once = tokenizer.decode(tokenizer.encode(text))
    assert tokenizer.decode(tokenizer.encode(once)) == once


@pytest.mark.parametrize(("kind", "reads"), [(k, k in EXACT) for k in MAKERS])
def test_a_newline_is_text_where_the_tokenizer_gives_it_back(tokenizers, kind, reads):
    tokenizer, _ = tokenizers[kind]
    ids = tokenizer.encode("the\ncat").tolist()
    assert (tokenizer.special.line_end in ids) != reads
    assert tokenizer.decode(ids) == "the\ncat"


@quickly
@given(texts=st.lists(ANY, max_size=5))
def test_many_texts_are_encoded_as_each_alone(tokenizers, texts):
    for tokenizer, _ in tokenizers.values():
        assert [i.tolist() for i in tokenizer.encode_all(texts)] == [tokenizer.encode(text).tolist() for text in texts]


def test_an_unknown_word_is_decoded_as_unknown(tokenizers):
    tokenizer, _ = tokenizers["words"]
    ids = tokenizer.encode("the dog sat")
    assert ids.tolist() == [6, UNK, 8]
    assert tokenizer.decode(ids) == "the ⁇  sat"


def test_characters_without_utf8_form_become_question_marks(tokenizers):
    tokenizer, _ = tokenizers["byte_level"]
    assert np.array_equal(tokenizer.encode("a\ud800b"), tokenizer.encode("a?b"))


@quickly
@given(parts=st.lists(st.one_of(st.text("the\n cat").map(str.strip), st.sampled_from(grounding(3)))))
def test_decoding_a_marked_text_gives_it_back(tokenizers, parts):
    for kind in EXACT:
        tokenizer = Tokenizer(tokenizers[kind][0]._pieces, grounding(3))
        ids = tokenizer.encode_marked("".join(parts))
        assert tokenizer.encode_marked(tokenizer.decode(ids, keep_control=True)).tolist() == ids.tolist()


def test_names_show_spaces_as_spaces(tokenizers):
    for tokenizer, _ in tokenizers.values():
        assert "".join(tokenizer.name(i) for i in tokenizer.encode("the cat").tolist()).strip() == "the cat"


# ---- bytes


@pytest.mark.parametrize("kind", EXACT)
@quickly
@given(text=ANY)
def test_token_bytes_add_up_to_the_texts_utf8(tokenizers, kind, text):
    tokenizer, _ = tokenizers[kind]
    text = text.lstrip(" ") if kind == "byte_level_prefixed" else text
    ids = tokenizer.encode(text)
    n_bytes = tokenizer.count_bytes(np.concatenate([[BOS], ids]), np.append(ids, EOS))
    assert n_bytes.sum() == len(text.encode())


@pytest.mark.parametrize("kind", ["unigram", "word_pieces", "words"])
@quickly
@given(lines=st.lists(st.lists(st.sampled_from(["the", "cat", "sat"]), max_size=5).map(" ".join), min_size=1, max_size=4))
def test_token_bytes_add_up_for_lines_of_words(tokenizers, kind, lines):
    tokenizer, _ = tokenizers[kind]
    ids = tokenizer.encode("\n".join(lines))
    n_bytes = tokenizer.count_bytes(np.concatenate([[BOS], ids]), np.append(ids, EOS))
    assert n_bytes.sum() == len("\n".join(lines).encode())


# ---- folders


def test_a_folder_without_tokenizer_json_is_converted(tokenizers, tmp_path):
    from transformers import GPT2Tokenizer

    backend = tokenizers["byte_level"][1]
    table = json.loads(backend.to_str())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(table["vocab"]), encoding="utf-8")
    (tmp_path / "merges.txt").write_text("\n".join(" ".join(m) for m in table["merges"]), encoding="utf-8")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}', encoding="utf-8")
    tokenizer, backend = Tokenizer.load(tmp_path), GPT2Tokenizer.from_pretrained(tmp_path)
    assert (tokenizer.encode("the  cat\n sat") - 4).tolist() == backend("the  cat\n sat")["input_ids"]


def test_a_folder_that_transformers_cannot_convert_is_the_users_error(tmp_path):
    (tmp_path / "vocab.json").write_text("{}", encoding="utf-8")
    with pytest.raises(UserError, match=r"has no tokenizer\.json, and transformers cannot make one"):
        Tokenizer.load(tmp_path)


def test_a_folder_saved_by_transformers_is_read(tokenizers, tmp_path):
    from transformers import PreTrainedTokenizerFast

    tokenizer, backend = tokenizers["word_pieces"]
    saved = PreTrainedTokenizerFast(tokenizer_object=backend, cls_token="[CLS]", sep_token="[SEP]", unk_token="[UNK]")
    saved.save_pretrained(tmp_path)
    assert np.array_equal(Tokenizer.load(tmp_path).encode("The cat, sat"), tokenizer.encode("the cat, sat"))


def test_added_tokens_whose_ids_leave_one_out_are_the_users_error(tmp_path):
    table = json.loads(hugging_face_tokenizers.byte_level().to_str())
    table["added_tokens"].append(table["added_tokens"][0] | {"id": 999, "content": "<late>"})
    (tmp_path / "tokenizer.json").write_text(json.dumps(table), encoding="utf-8")
    with pytest.raises(UserError, match="'<late>' cannot have id 999"):
        Tokenizer.load(tmp_path)
