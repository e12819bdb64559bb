"""What a person runs by hand is run by CI: each extra, each make verb, each hook."""

from __future__ import annotations

import re
import subprocess
import tomllib

import pytest
import yaml

from tests.cli_runs import ROOT

MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
[PHONY] = re.findall(r"^\.PHONY: (.*)$", MAKEFILE, re.MULTILINE)
WEEKLY = (ROOT / ".ci" / "weekly").read_text(encoding="utf-8")
TRIED = {match[0]: match[1].split() for match in re.findall(r"^try (\S+) (.*)$", WEEKLY, re.MULTILINE)}
OF_OTHERS = {"test-all": "check", "lowest": "test-lowest", "slurm": "slurm-test"}
"""Verbs that another one runs."""


@pytest.mark.parametrize("verb", PHONY.split())
def test_every_make_verb_is_tried_each_week(verb: str) -> None:
    assert TRIED[OF_OTHERS.get(verb, verb)][:2] == ["make", OF_OTHERS.get(verb, verb)]


def test_every_extra_is_tried_each_week() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

    assert set(project["optional-dependencies"]) == {words[1] for words in TRIED.values() if words[0] == "extra"}


@pytest.mark.parametrize("script", ["run", "weekly"])
def test_scripts_are_bash_that_can_be_run(script: str) -> None:
    path = ROOT / ".ci" / script

    assert path.stat().st_mode & 0o100
    assert subprocess.run(["bash", "-n", str(path)], check=False).returncode == 0


def test_a_forge_runs_the_same_scripts() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))
    commands = [step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step]

    assert [c for c in commands if c.startswith(".ci/")] == [".ci/run", ".ci/weekly"]


def test_hooks_are_the_linters_of_the_environment() -> None:
    [repository] = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]

    assert {hook["entry"].split()[0] for hook in repository["hooks"]} == {".venv/bin/ruff", ".venv/bin/mypy"}
