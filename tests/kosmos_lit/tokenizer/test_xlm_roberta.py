"""Against `transformers`, whose XLMRobertaTokenizer and Kosmos2Processor read the released vocabulary."""

import io
import json

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from kosmos_lit.errors import UserError
from kosmos_lit.tokenizer import BOS, EOS, GROUNDING, LEADING, MODEL_FILE, TRAILING, Tokenizer, grounding

quickly = settings(derandomize=True, database=None, deadline=None, max_examples=200)
NAMES = (*LEADING, *TRAILING, *grounding(5))
LETTERS = "abcdefghijklmnopqrstuvwxyzäéïöüß<>/?!:;,0123456789 　\t漢한가ﬁⅣ①Åｶ²"
WORDS = st.text(LETTERS)
ANY = st.text(st.characters(exclude_categories=["Cs"]))


@pytest.fixture(scope="module")
def tokenizer(kosmos_vocabulary):
    return Tokenizer(kosmos_vocabulary, grounding(5))


@pytest.fixture(scope="module")
def reference(tokenizer):
    return tokenizer.to_transformers()


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    tokenizer.save_transformers(folder)
    return folder


def ids(reference, text: str) -> list[int]:
    return reference(text, add_special_tokens=False)["input_ids"]


@pytest.fixture(scope="module")
def model(kosmos_vocabulary):
    return sentencepiece.SentencePieceProcessor(model_proto=kosmos_vocabulary)


def left_alone(model: sentencepiece.SentencePieceProcessor, text: str) -> str:
    """Return a text that the model's normaliser leaves alone, made of any text."""
    while (again := model.normalize(text).removeprefix("▁").replace("▁", " ")) != text:
        text = again
    return text.replace("\x85", "")  # the one character that is a blank to transformers and a letter to SentencePiece


def is_text(text: str) -> bool:
    return not any(name in text for name in NAMES)


# ---- the same ids


@quickly
@given(text=WORDS.filter(is_text))
def test_words_and_blanks_have_the_same_ids(tokenizer, reference, text):
    assert tokenizer.encode(text).tolist() == ids(reference, text)


@quickly
@given(text=ANY)
def test_any_text_that_the_normaliser_leaves_alone_has_the_same_ids(model, tokenizer, reference, text):
    plain = left_alone(model, text)
    assert tokenizer.encode_marked(plain, names=NAMES).tolist() == ids(reference, plain)


def test_every_character_has_the_same_ids(tokenizer, reference):
    characters = [chr(c) for c in (*range(0x20, 0x3000, 3), *range(0xFB00, 0xFFFF, 7)) if chr(c) not in "\x85"]
    texts = [f"a{c}b {c}" for c in characters]
    assert [i.tolist() for i in tokenizer.encode_all(texts)] == reference(texts, add_special_tokens=False)["input_ids"]


def test_a_newline_is_a_line_end_and_to_transformers_a_blank(tokenizer, reference):
    assert ids(reference, "the\ncat") == ids(reference, "the cat") == tokenizer.encode("the cat").tolist()
    assert ids(reference, "the</line>cat") == tokenizer.encode("the\ncat").tolist()


def test_transformers_does_not_compose_a_long_decomposed_character():
    composed, decomposed = "\ud55c", "\u1112\u1161\u11ab"  # one Korean syllable; transformers looks at five bytes at most
    tokenizer = Tokenizer(trained([f"a {composed} b", f"b {composed}"]))
    reference = tokenizer.to_transformers()
    assert tokenizer.encode(decomposed).tolist() == tokenizer.encode(composed).tolist() == ids(reference, composed)
    assert ids(reference, decomposed) != ids(reference, composed)


@quickly
@given(parts=st.lists(st.one_of(WORDS.filter(is_text), st.sampled_from(NAMES[4:]))))
def test_a_marked_text_encodes_as_in_the_processor(tokenizer, reference, parts):
    text = "".join(parts)
    assert tokenizer.encode_marked(text, names=NAMES).tolist() == ids(reference, text)


@quickly
@given(parts=st.lists(st.one_of(st.text("abcdefg ", min_size=1), st.sampled_from(grounding(5)))))
def test_a_marked_text_decodes_as_in_transformers(tokenizer, reference, parts):
    marked = tokenizer.encode_marked("".join(parts)).tolist()
    assert tokenizer.decode(marked, keep_control=True) == reference.decode(marked, clean_up_tokenization_spaces=False)


def test_names_and_ids_are_the_same(tokenizer, reference):
    assert len(reference) == tokenizer.vocab_size
    names = reference.convert_ids_to_tokens(list(range(tokenizer.vocab_size)))
    assert [name.replace("▁", " ") for name in names] == [tokenizer.name(i) for i in range(tokenizer.vocab_size)]


def test_the_released_vocabulary_comes_out_in_full(kosmos_vocabulary):
    tokenizer = Tokenizer(kosmos_vocabulary, GROUNDING)
    reference = tokenizer.to_transformers()
    assert len(reference) == tokenizer.vocab_size
    assert reference.convert_tokens_to_ids(["</line>", "<grounding>", "<patch_index_1023>"]) == [
        tokenizer.special.line_end,
        tokenizer.special.line_end + 6,
        tokenizer.vocab_size - 1,
    ]


# ---- files


def test_the_saved_folder_is_read_by_transformers(tokenizer, folder):
    from transformers import AutoTokenizer, XLMRobertaTokenizer

    loaded = AutoTokenizer.from_pretrained(folder)
    text = "the cat <phrase> sat</phrase> <unknown> 漢"
    assert isinstance(loaded, XLMRobertaTokenizer)
    assert loaded(text)["input_ids"] == [BOS, *tokenizer.encode_marked(text).tolist(), EOS]
    assert len(loaded) == tokenizer.vocab_size


def test_the_saved_folder_is_the_same_tokenizer(tokenizer, folder):
    loaded = Tokenizer.from_transformers(folder)
    assert (loaded.fingerprint, loaded.extra) == (tokenizer.fingerprint, tokenizer.extra)
    assert Tokenizer.load(folder).fingerprint == tokenizer.fingerprint


@pytest.fixture(scope="module")
def rebuilt(reference, tmp_path_factory):
    """Ours again, by way of the files that transformers 5 writes: without the SentencePiece model."""
    folder = tmp_path_factory.mktemp("json")
    reference.save_pretrained(folder)
    assert not (folder / MODEL_FILE).exists()
    return Tokenizer.load(folder)


@quickly
@given(text=st.one_of(ANY, WORDS, st.text(LETTERS + "\n\u0301\u1112\u1161\u11ab")))
def test_a_model_rebuilt_from_json_gives_the_same_ids(tokenizer, rebuilt, text):
    assert np.array_equal(rebuilt.encode(text), tokenizer.encode(text))


@quickly
@given(text=st.text("abcdefg <>\n漢"))
def test_a_model_rebuilt_from_json_gives_the_same_text(tokenizer, rebuilt, text):
    numbers = tokenizer.encode(text)
    assert rebuilt.decode(numbers) == tokenizer.decode(numbers)


def test_a_model_rebuilt_from_json_has_the_same_names(tokenizer, rebuilt):
    assert rebuilt.extra == tokenizer.extra
    assert [rebuilt.name(i) for i in range(tokenizer.vocab_size)] == [tokenizer.name(i) for i in range(tokenizer.vocab_size)]


def test_files_go_both_ways_without_loss(tokenizer, rebuilt, tmp_path):
    rebuilt.save_transformers(tmp_path)
    assert Tokenizer.from_transformers(tmp_path).fingerprint == rebuilt.fingerprint


def test_a_folder_of_version_4_is_read_with_its_added_tokens(kosmos_vocabulary, tokenizer, tmp_path):
    (tmp_path / MODEL_FILE).write_bytes(kosmos_vocabulary)
    added = {tokenizer.name(i): i for i in range(tokenizer.special.doc_end, tokenizer.vocab_size)}
    (tmp_path / "added_tokens.json").write_text(json.dumps(added), encoding="utf-8")
    assert Tokenizer.load(tmp_path).fingerprint == tokenizer.fingerprint


def test_a_tokenizer_json_of_version_4_is_read(tokenizer, reference, rebuilt, tmp_path):
    reference.save_pretrained(tmp_path)
    table = json.loads((tmp_path / "tokenizer.json").read_bytes())
    blanks = {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": "▁"}
    strip = {"type": "Strip", "strip_left": False, "strip_right": True}
    table["normalizer"] = {"type": "Sequence", "normalizers": [table["normalizer"], strip, blanks]}
    table["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "add_prefix_space": True}
    (tmp_path / "tokenizer.json").write_text(json.dumps(table), encoding="utf-8")
    assert Tokenizer.load(tmp_path).fingerprint == rebuilt.fingerprint


def test_a_folder_without_added_tokens_gets_those_of_kosmos_1(kosmos_vocabulary, tmp_path):
    from transformers import XLMRobertaTokenizer

    plain = Tokenizer(kosmos_vocabulary)
    (tmp_path / MODEL_FILE).write_bytes(kosmos_vocabulary)
    XLMRobertaTokenizer.from_pretrained(tmp_path).save_pretrained(tmp_path / "new")
    loaded = Tokenizer.from_transformers(tmp_path / "new")
    assert (loaded.vocab_size, loaded.extra) == (plain.vocab_size, ())
    assert np.array_equal(loaded.encode("the cat"), plain.encode("the cat"))


# ---- the processor


@pytest.fixture(scope="module")
def processor(reference):
    from transformers import CLIPImageProcessor, Kosmos2Processor

    return Kosmos2Processor(CLIPImageProcessor(), reference, num_patch_index_tokens=5)


def test_the_processor_finds_all_its_tokens(tokenizer, processor):
    assert len(processor.tokenizer) == tokenizer.vocab_size


def test_the_processor_reads_a_prompt_as_we_do(tokenizer, processor):
    text = "<grounding> the cat <phrase> sat</phrase><object><patch_index_0001> <patch_index_0004></object> on"
    read = processor(text=text)["input_ids"]
    assert read == [BOS, *tokenizer.encode_marked(text).tolist()]


def test_the_processors_folder_is_read_back(tokenizer, processor, tmp_path):
    from transformers import AutoProcessor, Kosmos2Processor

    processor.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert isinstance(loaded, Kosmos2Processor)
    assert loaded(text="<grounding> the cat")["input_ids"] == [BOS, *tokenizer.encode_marked("<grounding> the cat").tolist()]


def test_the_processor_appends_its_tags_to_a_kosmos_1_vocabulary(kosmos_vocabulary):
    from transformers import CLIPImageProcessor, Kosmos2Processor

    plain = Tokenizer(kosmos_vocabulary)
    processor = Kosmos2Processor(CLIPImageProcessor(), plain.to_transformers(), num_patch_index_tokens=0)
    assert len(processor.tokenizer) == plain.vocab_size + 6
    assert processor(text="the cat")["input_ids"] == [BOS, *plain.encode("the cat").tolist()]


# ---- what does not fit


def trained(lines=("abc cba", "bca"), **changes) -> bytes:
    model = io.BytesIO()
    options = {"vocab_size": 8, "minloglevel": 2} | changes
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=model, **options)
    return model.getvalue()


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"model_type": "bpe"}, "not Unigram"),
        ({"add_dummy_prefix": False}, "add_dummy_prefix is off"),
        ({"remove_extra_whitespaces": False}, "remove_extra_whitespaces is off"),
        ({"user_defined_symbols": ["<u>"], "vocab_size": 9}, r"pieces of types \[4\]"),
        ({"byte_fallback": True, "vocab_size": 264}, "byte_fallback is on"),
    ],
)
def test_a_model_that_transformers_would_read_otherwise_is_refused(changes, why):
    with pytest.raises(UserError, match=why):
        Tokenizer(trained(**changes)).to_transformers()


def test_a_normaliser_that_does_nothing_is_kept(tmp_path):
    tokenizer = Tokenizer(trained(normalization_rule_name="identity"))
    tokenizer.to_transformers().save_pretrained(tmp_path)
    assert Tokenizer.load(tmp_path).encode("abc  ａ").tolist() == tokenizer.encode("abc  ａ").tolist()


def test_hugging_face_pieces_have_no_counterpart(byte_level_folder):
    with pytest.raises(UserError, match="only a SentencePiece vocabulary"):
        Tokenizer.load(byte_level_folder).to_transformers()


def test_another_kind_of_folder_is_refused_with_the_expected_files(byte_level_folder, tmp_path):
    for folder in (byte_level_folder, tmp_path):
        with pytest.raises(UserError, match=f"no Kosmos-2 or XLM-RoBERTa tokenizer: expected {MODEL_FILE}, or"):
            Tokenizer.from_transformers(folder)


@pytest.mark.parametrize(
    ("added", "why"),
    [
        ({62: "<mask>", 63: "</doc>", 65: "</image>"}, "leave out id 64"),
        ({62: "<mask>", 63: "<image>"}, "id 63 is <image>, expected </doc>"),
    ],
)
def test_added_tokens_in_another_place_are_the_users_error(kosmos_vocabulary, tmp_path, added, why):
    (tmp_path / MODEL_FILE).write_bytes(kosmos_vocabulary)
    config = {"added_tokens_decoder": {str(id_): {"content": name} for id_, name in added.items()}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(UserError, match=why):
        Tokenizer.load(tmp_path)
