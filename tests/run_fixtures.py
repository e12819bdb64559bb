"""A small world, drawn and prepared once, and a short run on it."""

from __future__ import annotations

from pathlib import Path

import pytest

from kosmos_lit.cli import main
from tests.running import tiny_run


@pytest.fixture(scope="session")
def tiny_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The drawn world of configs/tiny.yaml, with its tokenizer and indexes."""
    folder = tmp_path_factory.mktemp("tiny")
    assert main(tiny_run("rows", folder / "unused", folder / "world", "--count", "0")) == 0
    return folder / "world"


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_world: Path) -> Path:
    """The folder of a run of six steps; a test must not change it."""
    folder = tmp_path_factory.mktemp("trained")
    assert main(tiny_run("fit", folder, tiny_world)) == 0
    return folder
