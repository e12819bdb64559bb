import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datamodules.prepare.tokenizer import MAX_SENTENCE_BYTES, _cut, train_tokenizer
from kosmos_lit.errors import UserError
from kosmos_lit.tokenizer import LEADING, MODEL_FILE, TRAILING, UNK, Tokenizer
from tests.datamodules import sample_data

CONTROLS = [*LEADING, *TRAILING]
quick = settings(deadline=None, max_examples=100)
pieces = st.sampled_from([*CONTROLS, "▁", " ", "\n", "\r\n", "\ud800", "é", "漢", "cat"])
texts = st.lists(st.one_of(pieces, st.text(max_size=5)), max_size=11).map("".join)


@quick
@given(texts)
def test_text_never_becomes_a_control_token(tokenizer, text):
    allowed = {UNK, tokenizer.special.line_end, *range(len(LEADING), tokenizer.special.mask)}
    assert set(tokenizer.encode(text).tolist()) <= allowed


@pytest.mark.parametrize("control", CONTROLS)
def test_a_control_tokens_name_in_a_text_is_spelled_out(tokenizer, control):
    ids = tokenizer.encode(f"the cat {control} sees").tolist()
    assert len(ids) > len(tokenizer.encode("the cat sees"))
    assert not {tokenizer.name(id_) for id_ in ids} & (set(CONTROLS) - {"<unk>"})


@quick
@given(st.text(alphabet="abdefgiklmnoprstuvz .\n", max_size=61))
def test_decoding_undoes_encoding_but_for_white_space(tokenizer, text):
    expected = "\n".join(" ".join(line.split()) for line in text.split("\n"))
    assert tokenizer.decode(tokenizer.encode(text).tolist()) == expected


@quick
@given(st.lists(texts, max_size=5))
def test_texts_encoded_together_are_encoded_alike(tokenizer, several):
    assert [ids.tolist() for ids in tokenizer.encode_all(several)] == [tokenizer.encode(t).tolist() for t in several]


def test_a_tokenizer_has_as_many_pieces_as_asked(tokenizer):
    assert tokenizer.n_pieces == 211
    assert tokenizer.vocab_size == 211 + 7


def test_a_tokenizer_made_the_same_way_is_reused(tmp_path):
    sample_data.write_jsonl(tmp_path / "a.jsonl", sample_data.sentences(53))
    first = train_tokenizer([str(tmp_path / "*.jsonl")], 101, tmp_path / "t")
    written = (tmp_path / "t" / MODEL_FILE).stat().st_mtime_ns
    second = train_tokenizer([str(tmp_path / "*.jsonl")], 101, tmp_path / "t")
    assert second.fingerprint == first.fingerprint
    assert (tmp_path / "t" / MODEL_FILE).stat().st_mtime_ns == written


def test_a_tokenizer_of_another_size_is_not_replaced(tmp_path):
    sample_data.write_jsonl(tmp_path / "a.jsonl", sample_data.sentences(53))
    train_tokenizer([str(tmp_path / "*.jsonl")], 101, tmp_path / "t")
    with pytest.raises(UserError, match="already holds a tokenizer"):
        train_tokenizer([str(tmp_path / "*.jsonl")], 97, tmp_path / "t")
    assert Tokenizer.load(tmp_path / "t").n_pieces == 101


def test_other_files_in_a_tokenizers_folder_are_kept(tmp_path):
    sample_data.write_jsonl(tmp_path / "t/a.jsonl", sample_data.sentences(53))
    train_tokenizer([str(tmp_path / "t/*.jsonl")], 101, tmp_path / "t")
    assert (tmp_path / "t/a.jsonl").exists()


def test_every_format_teaches_the_tokenizer(raw, tmp_path):
    patterns = [str(raw / p) for p in ("text/*", "table/*", "pairs/*", "pages/*")]
    learnt = train_tokenizer(patterns, 211, tmp_path / "t")
    assert learnt.n_pieces == 211


def test_too_little_text_for_a_size_says_how_much_is_possible(tmp_path):
    sample_data.write_jsonl(tmp_path / "a.jsonl", sample_data.sentences(3))
    with pytest.raises(UserError, match=r"5003 pieces out of 1 files: the text is enough for at most \d+"):
        train_tokenizer([str(tmp_path / "*.jsonl")], 5003, tmp_path / "t")
    assert not (tmp_path / "t").exists()


def test_a_size_without_room_for_text_is_refused(tmp_path):
    sample_data.write_jsonl(tmp_path / "a.jsonl", sample_data.sentences(3))
    with pytest.raises(UserError, match="--vocab_size 3 is too small"):
        train_tokenizer([str(tmp_path / "*.jsonl")], 3, tmp_path / "t")


def test_files_that_are_not_there_are_named(tmp_path):
    with pytest.raises(UserError, match="prepare tokenizer: no file matches"):
        train_tokenizer([str(tmp_path / "*.jsonl")], 101, tmp_path / "t")


@quick
@given(st.lists(st.text(alphabet="aé漢", min_size=1, max_size=701), max_size=19).map(" ".join))
def test_long_lines_are_cut_where_sentencepiece_can_read_them(line):
    cut = list(_cut(line))
    assert all(0 < len(piece.encode()) <= MAX_SENTENCE_BYTES for piece in cut)
    assert "".join(cut).replace(" ", "") == line.replace(" ", "")
