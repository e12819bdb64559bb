"""Commands in README and docs can be run, and the files they name exist."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from kosmos_lit.cli import VERBS, generate, plan, prepare, report, report_data, report_run, rows, verify_resume, weights
from kosmos_lit.cli.trainer import KosmosCLI
from tests.cli_runs import ROOT

PARSERS = {
    "prepare tokenizer": prepare.tokenizer_parser,
    "prepare corpus": prepare.corpus_parser,
    "report eval": report.eval_parser,
    "report run": report_run.run_parser,
    "report data": report_data.data_parser,
    "verify-resume": verify_resume.verify_resume_parser,
    "generate": generate.generate_parser,
    "import": weights.import_parser,
    "export": weights.export_parser,
}
PAGES = [*(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "AGENTS")), *sorted((ROOT / "docs").rglob("*.md"))]


def commands(page: Path) -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line.split("  #")[0].strip() for line in lines if line.strip() and not line.startswith("#")]


MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
TARGETS = {target for rule in re.findall(r"^([a-z -]+):", MAKEFILE, re.MULTILINE) for target in rule.split()}


PYTHON_FILE = r"(?:(?:benchmarks|datamodules|kosmos_lit|tests)/[\w/]+|\btest_\w+)\.py\b"
"""A Python file of this project; the pages name other projects' files too."""


def inline(page: Path) -> list[str]:
    """Return the inline code of a page."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", text)]


COMMANDS = [(page.name, command) for page in PAGES for command in commands(page)]


@pytest.mark.parametrize(("page", "command"), COMMANDS, ids=lambda value: value[:60])
def test_a_printed_command_can_be_run(page: str, command: str) -> None:
    words = shlex.split(command)
    while "=" in words[0]:
        words.pop(0)

    match words:
        case ["make", *targets]:
            assert {t for t in targets if "=" not in t} <= TARGETS
        case [".venv/bin/python" | "python", "main.py", verb, *arguments]:
            words = f"{verb} {arguments[0]}"
            assert_parses(words, arguments[1:]) if words in VERBS else assert_parses(verb, arguments)
        case [".venv/bin/python" | "python", script, *_] if script.startswith("benchmarks/"):
            assert (ROOT / script).is_file()
        case [script] if script.startswith(".ci/"):
            assert (ROOT / script).is_file()
        case ["sbatch", *more]:
            at = next(i for i, word in enumerate(more) if word.startswith("slurm/"))
            assert (ROOT / more[at]).is_file()
            if more[at] == "slurm/train.sbatch":
                assert_parses("fit", more[at + 2 :])
            elif more[at] == "slurm/prepare.sbatch":
                assert_parses("prepare corpus", more[at + 1 :])
        case ["source", ".venv/bin/activate"] | ["tensorboard" | "tar", *_]:
            assert len(words) > 1
        case _:
            pytest.fail(f"{page}: {command!r} is no known kind of command")


def assert_parses(verb: str, arguments: list[str]) -> None:
    assert verb in VERBS
    if verb in PARSERS:
        assert PARSERS[verb]().read(arguments)
    else:
        if verb in ("rows", "plan"):
            own = rows.rows_parser() if verb == "rows" else plan.plan_parser()
            _, arguments = own.read_known(arguments)
        if "--ckpt_path" in arguments:
            at = arguments.index("--ckpt_path")
            arguments = arguments[:at] + arguments[at + 2 :]
        arguments = [word for word in arguments if word != "--print_config"]
        # Two devices, as there is nothing to shard within a node of one.
        on_cpu = {"accelerator": "cpu", "devices": 2, "precision": "32-true", "logger": "false"}
        flags = [f"--trainer.{key}={value}" for key, value in on_cpu.items()]
        assert KosmosCLI([*arguments, *flags], run=False).model.config


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_to_a_file_leads_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8"))
    files = [link for link in links if "://" not in link]

    assert [file for file in files if not (page.parent / file).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_make_target_within_a_line_exists(page: Path) -> None:
    named = [word for code in inline(page) if code.startswith("make ") for word in shlex.split(code)[1:2]]

    assert [target for target in named if target not in TARGETS] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_python_file_within_a_line_exists(page: Path) -> None:
    names = [name for code in inline(page) for name in re.findall(PYTHON_FILE, code)]

    assert [name for name in names if not exists(name)] == []


def exists(name: str) -> bool:
    """Whether a file exists: by its path, or a test by its name alone."""
    return (ROOT / name).is_file() or (name.startswith("test_") and any((ROOT / "tests").rglob(name)))


def test_pages_name_targets_and_files_within_lines() -> None:
    inline_code = [code for page in PAGES for code in inline(page)]

    assert any(code.startswith("make ") for code in inline_code)
    assert any(re.search(PYTHON_FILE, code) for code in inline_code)


def test_readme_starts_with_its_two_commands() -> None:
    assert [command for _, command in COMMANDS[:2]] == ["make quickstart", "make test"]


def test_readme_names_every_verb() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")

    assert [verb for verb in VERBS if verb not in text] == []


def test_readme_is_short_and_narrow() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()

    assert len(lines) <= 150
    assert [line for line in lines if len(line) > 125] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_prose_is_at_most_125_columns_wide(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)

    # A row of a table is one line.
    assert [line for line in text.splitlines() if len(line) > 125 and not line.lstrip().startswith("|")] == []


def test_every_page_is_in_the_site() -> None:
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")[2]
    pages = [str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")]

    assert [page for page in pages if not re.search(rf"[\[ ]{re.escape(page)}[,\]]", nav)] == []


@pytest.mark.slow
def test_the_site_builds_without_a_broken_link(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    build = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)

    assert build.returncode == 0, build.stderr
    # The reference is made from docstrings.
    assert "no_repeat_ngram_size" in (tmp_path / "reference" / "engine.html").read_text(encoding="utf-8")
