"""What the system refuses is a sentence: which file, which limit, what to do."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kosmos_lit.cli import main
from kosmos_lit.errors import describe_os_error
from tests.cli_runs import ROOT, tiny_run


def described(number: int, path: str | None = None) -> str | None:
    return describe_os_error(OSError(number, os.strerror(number), path))


def test_sentences_name_the_file_and_the_limit(tmp_path: Path) -> None:
    path = str(tmp_path / "not" / "there.bin")
    assert f"no space left to write {path}: free are " in (described(errno.ENOSPC, path) or "")
    assert " bytes at ., " in (described(errno.EDQUOT) or "")
    assert "`ulimit -n`" in (described(errno.EMFILE) or "")
    assert described(errno.EROFS, "/sys/run") == "/sys/run is on a read-only file system: write elsewhere"
    assert (described(errno.EACCES, "/a") or "").startswith("no permission for /a:")
    assert described(errno.EISDIR, "/a") == "/a: Is a directory"
    assert described(errno.EIO) is None  # a fault of the machine keeps its traceback


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder in which nothing can be made")
def test_a_folder_that_takes_no_run_is_a_sentence(tiny_world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(tiny_run("fit", Path("/proc/self/run"), tiny_world)) == 2

    assert "/proc/self" in capsys.readouterr().err


def test_too_many_open_files_are_a_sentence(tmp_path: Path, tiny_world: Path) -> None:
    script = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_NOFILE, (12, 12)); "
        "from kosmos_lit.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    options = ["--format", "jsonl", "--input", f"{tiny_world}/text-*.zst", "--tokenizer", f"{tiny_world}/tokenizer"]
    command = [sys.executable, "-c", script, "prepare", "corpus", *options, "--output", str(tmp_path / "index")]
    end = subprocess.run([*command, "--workers", "8"], cwd=ROOT, text=True, capture_output=True)

    assert end.returncode == 2, end.stderr
    assert "too many open files (this process may open 12)" in end.stderr
    assert "Traceback" not in end.stderr


def test_a_full_disk_is_a_sentence_with_bytes(tmp_path: Path, tiny_world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--format", "jsonl", "--input", f"{tiny_world}/text-*.zst", "--tokenizer", f"{tiny_world}/tokenizer"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", _refuse)
        code = main(["prepare", "corpus", *options, "--output", str(tmp_path / "index")])

    assert code == 2
    assert "no space left: free are " in capsys.readouterr().err


def _refuse(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
