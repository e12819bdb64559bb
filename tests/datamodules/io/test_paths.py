import pytest

from datamodules.io.paths import expand
from kosmos_lit.errors import UserError


def test_files_are_sorted_and_each_comes_once(tmp_path):
    for name in ("b.x", "a.x", "deep/c.x"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("1")
    found = expand([str(tmp_path / "**/*.x"), str(tmp_path / "a.x")], "test")
    assert [f.relative_to(tmp_path).as_posix() for f in found] == ["a.x", "b.x", "deep/c.x"]


def test_a_pattern_that_matches_nothing_is_named(tmp_path):
    (tmp_path / "a.x").write_text("1")
    with pytest.raises(UserError, match=r"test: no file matches '.*none.*\.x'"):
        expand([str(tmp_path / "*.x"), str(tmp_path / "none*.x")], "test")


def test_a_pattern_that_matches_only_empty_files_is_named(tmp_path):
    (tmp_path / "a.x").touch()
    with pytest.raises(UserError, match=r"matches empty files only, .*a\.x"):
        expand([str(tmp_path / "*.x")], "test")


def test_a_pattern_that_matches_only_a_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match="no file matches"):
        expand([str(tmp_path)], "test")


def test_no_pattern_at_all_is_refused():
    with pytest.raises(UserError, match="no input is given"):
        expand([], "test")
