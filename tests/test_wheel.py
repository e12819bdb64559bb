"""A wheel, installed far from the checkout, does what the checkout does."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from tests.cli_runs import ROOT, losses, run

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("wheel")]  # one worker: it is built and trained with once
PARTS = ("kosmos_lit", "datamodules", "configs", "pyproject.toml", "README.md", "LICENSE")
BUILD = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
SHORT = ("--trainer.max_steps=20", "--trainer.log_every_n_steps=1", "--trainer.num_sanity_val_steps=0")
SHORT += ("--trainer.val_check_interval=20", "--trainer.default_root_dir")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of the checkout's files; building it in the checkout would leave files there."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in PARTS:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, folder / "source" / name, symlinks=True, ignore=ignored)
        else:
            shutil.copy(ROOT / name, folder / "source" / name)
    (folder / "dist").mkdir()
    build = [sys.executable, "-c", BUILD, str(folder / "dist")]
    subprocess.run(build, cwd=folder / "source", check=True, capture_output=True)
    [path] = (folder / "dist").iterdir()
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of an environment with the wheel, which takes all other packages from this one."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=True)
    [packages] = folder.glob("lib/python*/site-packages")
    # This environment's own .pth files, one of which may name the checkout, are not read.
    (packages / "others.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(pip, check=True, capture_output=True)
    return folder / "bin"


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory without a checkout, which no variable leads back to."""
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def call(*command: str | Path) -> str:
    """Run a command in the working directory and return what it prints."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    end = subprocess.run(list(map(str, command)), text=True, capture_output=True, env=environment, check=False)
    assert end.returncode == 0, end.stderr
    return end.stdout


def test_it_holds_every_file_of_the_packages_and_configs(wheel: Path, installed: Path) -> None:
    [packages] = installed.parent.glob("lib/python*/site-packages")
    files = [p.relative_to(ROOT) for name in ("kosmos_lit", "datamodules", "configs") for p in (ROOT / name).rglob("*.*")]
    shipped = [Path("kosmos_lit", p) if p.parts[0] == "configs" else p for p in files if "__pycache__" not in p.parts]

    assert len(shipped) > 300
    assert [str(path) for path in sorted(shipped) if not (packages / path).is_file()] == []
    assert not (packages / "configs").exists()


def test_it_trains_generates_and_plans_as_the_checkout_does(installed: Path, elsewhere: Path) -> None:
    image = elsewhere / "image.png"
    shutil.copy(ROOT / "docs" / "quickstart.png", image)
    question = ["--image", str(image), "--max_new_tokens", "9"]
    ends = ["checkpoints", "step=00000020.ckpt"]

    call(installed / "kosmos-lit", "fit", "-c", "quickstart", *SHORT, elsewhere / "wheel")
    answer = call(installed / "kosmos-lit", "generate", "--ckpt_path", Path("wheel", *ends), *question)
    plan = call(installed / "python", "-m", "kosmos_lit", "plan", "-c", "quickstart", "--json")

    checkout = str(elsewhere / "checkout")
    assert run(["fit", "-c", "configs/quickstart.yaml", *SHORT, checkout]).returncode == 0
    assert losses(elsewhere / "wheel") == losses(elsewhere / "checkout")
    assert list(losses(elsewhere / "wheel")) == list(range(1, 21))
    assert answer == run(["generate", "--ckpt_path", str(Path(checkout, *ends)), *question]).stdout
    assert plan == run(["plan", "-c", "configs/quickstart.yaml", "--json"]).stdout
