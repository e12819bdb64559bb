import pytest

from datamodules.document import Tally
from datamodules.sources import SOURCES, ReadOptions
from tests.datamodules import sample_data


def read(path, **options):
    tally = Tally()
    return list(SOURCES["parquet"].documents(path, 0, ReadOptions(**options), tally, None)), tally


def test_each_row_is_a_document(tmp_path):
    sample_data.write_parquet(tmp_path / "a.parquet", {"n": list(range(7)), "text": sample_data.texts(7, 0)})
    documents, tally = read(tmp_path / "a.parquet")
    assert [(d.record, d.parts) for d in documents] == [(i, (t,)) for i, t in enumerate(sample_data.texts(7, 0))]
    assert tally == Tally()


def test_the_text_column_can_be_named(tmp_path):
    sample_data.write_parquet(tmp_path / "a.parquet", {"text": ["not mine"], "content": ["mine"]})
    assert [d.parts for d in read(tmp_path / "a.parquet", text_field="content")[0]] == [("mine",)]


def test_a_missing_column_is_counted(tmp_path):
    sample_data.write_parquet(tmp_path / "a.parquet", {"content": ["mine"]})
    documents, tally = read(tmp_path / "a.parquet")
    assert documents == []
    assert tally.broken == {'no column "text"': 1}


def test_a_missing_value_is_broken_and_an_empty_one_is_left_out(tmp_path):
    sample_data.write_parquet(tmp_path / "a.parquet", {"text": ["first", None, " ", "fourth"]})
    documents, tally = read(tmp_path / "a.parquet")
    assert [d.record for d in documents] == [0, 3]
    assert (tally.broken, tally.skipped) == ({'no text under "text"': 1}, {"empty text": 1})
    assert tally.examples['no text under "text"'] == "a.parquet, row 1"


def test_a_column_of_numbers_is_no_text(tmp_path):
    sample_data.write_parquet(tmp_path / "a.parquet", {"text": [3, 5, 7]})
    assert read(tmp_path / "a.parquet")[1].broken == {'no text under "text"': 3}


@pytest.mark.parametrize("kept", [0, 3, 500])
def test_a_file_that_is_cut_off_is_counted(tmp_path, kept):
    sample_data.write_parquet(tmp_path / "a.parquet", {"text": sample_data.texts(101, 0)})
    data = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(data[:kept])
    documents, tally = read(tmp_path / "a.parquet")
    assert documents == []
    assert tally.broken == {"shard cut off or corrupt": 1}


def test_a_file_whose_pages_are_damaged_is_counted(tmp_path):
    sample_data.write_parquet(tmp_path / "a.parquet", {"text": sample_data.texts(101, 0)})
    data = bytearray((tmp_path / "a.parquet").read_bytes())
    data[4:304] = b"\xff" * 300
    (tmp_path / "a.parquet").write_bytes(data)
    assert read(tmp_path / "a.parquet")[1].broken == {"shard cut off or corrupt": 1}


def test_a_record_is_named_by_its_row(tmp_path):
    assert SOURCES["parquet"].record_name(tmp_path / "a.parquet", 7) == "row 7"
