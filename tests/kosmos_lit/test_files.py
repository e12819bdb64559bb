import os

import pytest

from kosmos_lit.files import atomic_file, atomic_folder, remove_leftovers, write_atomically


def test_a_folder_appears_whole(tmp_path):
    with atomic_folder(tmp_path / "deep/target") as folder:
        (folder / "a").write_text("1")
        assert not (tmp_path / "deep/target").exists()
    assert [p.name for p in (tmp_path / "deep").rglob("*")] == ["target", "a"]


def test_a_folder_that_was_not_finished_leaves_no_trace(tmp_path):
    def interrupted():
        with atomic_folder(tmp_path / "target") as folder:
            (folder / "a").write_text("1")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_replaced_whole(tmp_path):
    write_atomically(tmp_path / "a", b"first")
    write_atomically(tmp_path / "a", b"second")
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("a", b"second")]


def test_a_file_that_was_not_finished_leaves_the_old_one(tmp_path):
    def interrupted():
        with atomic_file(tmp_path / "a") as path:
            path.write_bytes(b"half of")
            raise KeyboardInterrupt

    write_atomically(tmp_path / "a", b"first")
    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("a", b"first")]


def test_a_file_is_on_disk_before_it_takes_its_name(tmp_path, monkeypatch):
    order = []
    fsync, move = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (order.append("fsync"), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (order.append("rename"), move(a, b)))
    write_atomically(tmp_path / "a", b"first")
    assert order == ["fsync", "rename", "fsync"]  # the file, its name, the folder


@pytest.mark.parametrize(
    ("names", "kept"), [(None, []), ({"b.npy"}, [".a.0123.tmp"]), ({"b"}, [".a.0123.tmp", ".b.npy.4567.tmp"])]
)
def test_leftovers_of_killed_writers_are_removed_by_their_targets_names(tmp_path, names, kept):
    (tmp_path / ".a.0123.tmp").mkdir()
    (tmp_path / ".a.0123.tmp/half").touch()
    (tmp_path / ".b.npy.4567.tmp").touch()
    (tmp_path / "b.npy").touch()
    remove_leftovers(tmp_path, names)
    assert sorted(os.listdir(tmp_path)) == [*kept, "b.npy"]
