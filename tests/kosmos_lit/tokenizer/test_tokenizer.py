import io

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from kosmos_lit.errors import UserError
from kosmos_lit.tokenizer import (
    BOS,
    EOS,
    GROUNDING,
    GROUNDING_TAGS,
    IGNORE,
    LEADING,
    MODEL_FILE,
    TRAILING,
    UNK,
    SpecialTokens,
    Tokenizer,
    clean,
    expand_images,
    grounding,
)
from tests.kosmos_lit.tiny_kosmos import N_PIECES

LITERALS = [*LEADING, *TRAILING]
ANYTHING = st.lists(st.one_of(st.text(), st.sampled_from([*LITERALS, "\n", "\r\n", " ", "\ud800"]))).map("".join)
KNOWN = st.lists(st.text("abcdefghijklmnopqrstuvwxyzäéïöüß<>/?!:;,0123456789", min_size=1), min_size=1).map(" ".join)
quickly = settings(derandomize=True, database=None, deadline=None, max_examples=60)


@pytest.fixture(scope="module")
def grounded(kosmos_vocabulary):
    return Tokenizer(kosmos_vocabulary, grounding(7))


@pytest.fixture(scope="module")
def pieces(kosmos_vocabulary):
    return sentencepiece.SentencePieceProcessor(model_proto=kosmos_vocabulary)


def trained(**changes) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["abc cba", "bca"]), model_writer=model, vocab_size=8, minloglevel=2, **changes
    )
    return model.getvalue()


# ---- ids


def test_the_papers_vocabulary_has_64007_ids():
    special = SpecialTokens.for_pieces(64_000)
    assert (special.bos, special.pad, special.eos, special.unk) == (0, 1, 2, 3)
    assert (special.mask, special.doc_end, special.image) == (64_001, 64_002, 64_003)
    assert (special.image_end, special.chunk_end, special.line_end) == (64_004, 64_005, 64_006)


def test_a_vocabulary_has_seven_ids_more_than_pieces(kosmos_tokenizer):
    assert (kosmos_tokenizer.n_pieces, kosmos_tokenizer.vocab_size) == (N_PIECES, N_PIECES + 7)


def test_leading_tokens_come_first_and_trailing_ones_last(kosmos_tokenizer):
    names = [kosmos_tokenizer.name(i) for i in range(kosmos_tokenizer.vocab_size)]
    assert (names[:4], names[-6:]) == (list(LEADING), list(TRAILING))


def test_a_piece_has_the_id_after_its_number(kosmos_vocabulary, kosmos_tokenizer):
    pieces = sentencepiece.SentencePieceProcessor(model_proto=kosmos_vocabulary)
    names = [pieces.id_to_piece(i).replace("▁", " ") for i in range(3, N_PIECES)]
    assert [kosmos_tokenizer.name(i + 1) for i in range(3, N_PIECES)] == names
    text = "the cat sat on a blue mat"
    assert kosmos_tokenizer.encode(text).tolist() == [i + 1 for i in pieces.encode(text)]


def test_special_ids_name_themselves(kosmos_tokenizer):
    special = kosmos_tokenizer.special
    assert kosmos_tokenizer.name(special.image) == "<image>"
    assert kosmos_tokenizer.name(special.line_end) == "</line>"
    assert kosmos_tokenizer.name(special.mask) == "<mask>"


# ---- appended control tokens


def test_the_released_grounding_vocabulary_has_65037_ids():
    first = SpecialTokens.for_pieces(64_000).line_end + 1
    ids = dict(zip(GROUNDING, range(first, first + len(GROUNDING)), strict=True))
    assert [ids[name] for name in GROUNDING_TAGS] == list(range(64_007, 64_013))
    assert (ids["<patch_index_0000>"], ids["<patch_index_0044>"], ids["<patch_index_1023>"]) == (64_013, 64_057, 65_036)


def test_appended_tokens_follow_the_last_one_under_their_names(kosmos_tokenizer, grounded):
    names = ["</line>", *grounding(7)]
    first = kosmos_tokenizer.special.line_end
    assert [grounded.name(first + i) for i in range(14)] == names
    assert [grounded.id_of(name) for name in names] == list(range(first, first + 14))
    assert grounded.vocab_size == kosmos_tokenizer.vocab_size + 13


def test_every_control_token_is_found_by_its_name(grounded):
    names = [*LEADING, *TRAILING, *grounding(7)]
    assert [grounded.name(grounded.id_of(name)) for name in names] == names


def test_a_control_token_that_is_not_there_is_the_users_error(kosmos_tokenizer):
    with pytest.raises(UserError, match="no control token '<phrase>'; it has <s>, <pad>"):
        kosmos_tokenizer.id_of("<phrase>")


@pytest.mark.parametrize("extra", [["<a>", "<a>"], ["<image>"], ["<s>"], [""], [" "]])
def test_appended_tokens_need_names_of_their_own(kosmos_vocabulary, extra):
    with pytest.raises(UserError, match="need names of their own"):
        Tokenizer(kosmos_vocabulary, extra)


@quickly
@given(text=st.lists(st.one_of(st.text(), st.sampled_from(grounding(3)))).map("".join))
def test_text_never_becomes_an_appended_token(kosmos_tokenizer, grounded, text):
    assert np.array_equal(grounded.encode(text), kosmos_tokenizer.encode(text))


def test_appended_tokens_stand_for_no_bytes(grounded):
    assert (grounded.token_bytes[:, grounded.id_of("<phrase>") :] == 0).all()


# ---- text with names of control tokens


def test_names_in_a_marked_text_are_control_tokens(grounded):
    red, the = grounded.encode("red square").tolist(), grounded.encode("the").tolist()
    ids = grounded.encode_marked("<grounding> the <phrase> red square</phrase>").tolist()
    start, opens, closes = map(grounded.id_of, ("<grounding>", "<phrase>", "</phrase>"))
    assert ids == [start, *the, opens, *red, closes]


def test_blanks_before_a_name_are_no_text_but_newlines_are(grounded):
    assert np.array_equal(grounded.encode_marked("the \t <phrase>"), grounded.encode_marked("the<phrase>"))
    line_end, opens = grounded.special.line_end, grounded.id_of("<phrase>")
    assert grounded.encode_marked("the\n <phrase>").tolist() == [*grounded.encode("the").tolist(), line_end, opens]


def test_a_name_that_another_begins_with_is_not_taken_for_it(kosmos_vocabulary):
    tokenizer = Tokenizer(kosmos_vocabulary, ["<a", "<ab"])
    assert tokenizer.encode_marked("<ab<a").tolist() == [tokenizer.id_of("<ab"), tokenizer.id_of("<a")]


def test_only_the_names_asked_for_are_looked_for(grounded):
    ids = grounded.encode_marked("<image> <phrase>", names=["<image>"]).tolist()
    assert ids == [grounded.special.image, *grounded.encode("<phrase>").tolist()]


@quickly
@given(text=ANYTHING)
def test_without_appended_tokens_a_marked_text_is_text(kosmos_tokenizer, text):
    assert np.array_equal(kosmos_tokenizer.encode_marked(text), kosmos_tokenizer.encode(text))


@quickly
@given(parts=st.lists(st.one_of(KNOWN, st.sampled_from([*grounding(3), "\n", " "]))))
def test_a_marked_text_is_written_out_as_it_is_read(grounded, parts):
    ids = grounded.encode_marked("".join(parts))
    assert grounded.encode_marked(grounded.decode(ids, keep_control=True)).tolist() == ids.tolist()


def test_control_tokens_are_written_out_on_demand(grounded):
    ids = [BOS, *grounded.encode_marked("<grounding>the<phrase>red cat</phrase>\n<object>it"), EOS, 10_007]
    marked = "<s><grounding> the<phrase> red cat</phrase>\n<object> it</s>"
    assert grounded.decode(ids, keep_control=True) == marked
    assert grounded.decode(ids) == "the red cat\nit"


# ---- text


@quickly
@given(text=ANYTHING)
def test_text_never_becomes_a_control_token_other_than_line_ends(kosmos_tokenizer, text):
    ids = kosmos_tokenizer.encode(text)
    special = kosmos_tokenizer.special
    line_ends = ids == special.line_end
    assert line_ends.sum() == clean(text).count("\n")
    assert ((ids[~line_ends] >= UNK) & (ids[~line_ends] < special.mask)).all()


@pytest.mark.parametrize("literal", ["<image>", "</s>", "</line>"])
def test_a_literal_control_token_stays_text(kosmos_tokenizer, literal):
    ids = kosmos_tokenizer.encode(literal)
    assert "".join(kosmos_tokenizer.name(i) for i in ids).strip() == literal
    assert ((ids > UNK) & (ids < kosmos_tokenizer.special.mask)).all()


def test_a_newline_is_a_line_end_between_lines(kosmos_tokenizer):
    the, cat = kosmos_tokenizer.encode("the").tolist(), kosmos_tokenizer.encode("cat").tolist()
    line_end = kosmos_tokenizer.special.line_end
    assert kosmos_tokenizer.encode("the\ncat").tolist() == [*the, line_end, *cat]
    assert kosmos_tokenizer.encode("the\n\ncat\n").tolist() == [*the, line_end, line_end, *cat, line_end]


@pytest.mark.parametrize("newline", ["\r\n", "\r"])
def test_every_kind_of_newline_counts_once(kosmos_tokenizer, newline):
    assert np.array_equal(kosmos_tokenizer.encode(f"the{newline}cat"), kosmos_tokenizer.encode("the\ncat"))


def test_an_empty_text_has_no_ids(kosmos_tokenizer):
    ids = kosmos_tokenizer.encode("")
    assert (ids.tolist(), ids.dtype) == ([], np.int64)


def test_what_utf8_cannot_write_becomes_a_question_mark(kosmos_tokenizer):
    assert clean("a\ud800b") == "a?b"
    assert np.array_equal(kosmos_tokenizer.encode("a\ud800b"), kosmos_tokenizer.encode("a?b"))


@quickly
@given(texts=st.lists(ANYTHING, max_size=5))
def test_many_texts_are_encoded_as_each_alone(kosmos_tokenizer, texts):
    together = kosmos_tokenizer.encode_all(texts)
    assert [ids.tolist() for ids in together] == [kosmos_tokenizer.encode(text).tolist() for text in texts]


@quickly
@given(lines=st.lists(KNOWN, min_size=1, max_size=3))
def test_decoding_gives_the_text_back(kosmos_tokenizer, lines):
    text = "\n".join(lines)
    assert kosmos_tokenizer.decode(kosmos_tokenizer.encode(text)) == text


@quickly
@given(text=st.text("acehilmnoqrstuxyzéäïöüß0123<>/!?:;,\n \t\u00a0\u3000\uff41\u00b2\u2460", max_size=31))
def test_decoding_gives_every_text_back_that_the_normaliser_leaves_alone(kosmos_tokenizer, pieces, text):
    plain = "\n".join(pieces.normalize(line).removeprefix("▁").replace("▁", " ") for line in text.split("\n"))
    assert kosmos_tokenizer.decode(kosmos_tokenizer.encode(plain)) == plain
    assert np.array_equal(kosmos_tokenizer.encode(text), kosmos_tokenizer.encode(plain))


def test_decoding_leaves_control_tokens_out(kosmos_tokenizer):
    special = kosmos_tokenizer.special
    words = kosmos_tokenizer.encode("the cat")
    ids = [0, special.image, special.image, special.image_end, *words, special.chunk_end, 2, 1]
    assert kosmos_tokenizer.decode(ids) == "the cat"


def test_an_unknown_character_is_decoded_as_unknown(kosmos_tokenizer):
    ids = kosmos_tokenizer.encode("the 漢 cat")
    assert UNK in ids
    assert kosmos_tokenizer.decode(ids) == "the  ⁇  cat"


# ---- bytes


@quickly
@given(lines=st.lists(KNOWN, min_size=1, max_size=3))
def test_token_bytes_add_up_to_the_texts_utf8(kosmos_tokenizer, lines):
    text = "\n".join(lines)
    ids = kosmos_tokenizer.encode(text)
    n_bytes = kosmos_tokenizer.count_bytes(np.concatenate([[BOS], ids]), np.append(ids, EOS))
    assert n_bytes.sum() == len(text.encode())


def test_text_behind_an_image_begins_a_line(kosmos_tokenizer):
    ids = kosmos_tokenizer.encode("the cat")
    before = np.concatenate([[kosmos_tokenizer.special.image_end], ids[:-1]])
    assert kosmos_tokenizer.count_bytes(before, ids).sum() == len("the cat")


def test_what_is_no_target_has_no_bytes(kosmos_tokenizer):
    ids = kosmos_tokenizer.encode("the cat")
    assert kosmos_tokenizer.count_bytes(ids, np.full_like(ids, IGNORE)).sum() == 0


def test_control_tokens_stand_for_no_bytes_but_line_ends_and_unknowns_for_one(kosmos_tokenizer):
    sizes, special = kosmos_tokenizer.token_bytes, kosmos_tokenizer.special
    assert sizes.shape == (2, N_PIECES + 7)
    assert sizes[:, :4].tolist() == [[0, 0, 0, 1]] * 2
    assert sizes[:, special.mask :].tolist() == [[0, 0, 0, 0, 0, 1]] * 2
    assert (sizes[0, 4 : special.mask] > 0).all()


# ---- files


def test_a_folder_gives_the_tokenizer_that_it_holds(tmp_path, kosmos_vocabulary, kosmos_tokenizer):
    (tmp_path / MODEL_FILE).write_bytes(kosmos_vocabulary)
    loaded = Tokenizer.load(tmp_path)
    assert loaded.fingerprint == kosmos_tokenizer.fingerprint
    assert np.array_equal(loaded.encode("the cat"), kosmos_tokenizer.encode("the cat"))


def test_other_vocabularies_have_other_fingerprints(kosmos_tokenizer):
    assert Tokenizer(trained()).fingerprint != kosmos_tokenizer.fingerprint


def test_a_folder_without_a_tokenizer_is_the_users_error(tmp_path):
    with pytest.raises(UserError, match=f"no tokenizer in .*{MODEL_FILE} is missing.*make one with"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("model", [b"", b"no model", b"\x00" * 50, "half"])
def test_bytes_that_are_no_model_are_the_users_error(kosmos_vocabulary, model):
    broken = kosmos_vocabulary[: len(kosmos_vocabulary) // 2] if model == "half" else model
    with pytest.raises(UserError, match="SentencePiece model"):
        Tokenizer(broken)


def test_control_pieces_elsewhere_are_the_users_error():
    with pytest.raises(UserError, match=r"at \(3, 0, 1\), not at \(0, 1, 2\)"):
        Tokenizer(trained(unk_id=3, bos_id=0, eos_id=1))


# ---- images


def test_an_image_is_written_out_as_mark_slots_and_end():
    special = SpecialTokens.for_pieces(10)
    i, e = special.image, special.image_end
    expanded, last, slots = expand_images(np.array([0, i, 5, 6, i, i, 2]), special, 3)
    assert expanded.tolist() == [0, i, i, i, i, e, 5, 6, i, i, i, i, e, i, i, i, i, e, 2]
    assert last.tolist() == [0, 5, 6, 7, 12, 17, 18]
    assert slots.tolist() == [2, 9, 14]


def test_tokens_without_an_image_stay_as_they_are():
    expanded, last, slots = expand_images(np.array([0, 5, 2]), SpecialTokens.for_pieces(10), 3)
    assert (expanded.tolist(), last.tolist(), slots.tolist()) == ([0, 5, 2], [0, 1, 2], [])
