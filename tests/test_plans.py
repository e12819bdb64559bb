"""The plans that stand in the heads of configs are those of today; `--regenerate-golden` writes them anew."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from kosmos_lit.cli import main

ROOT = Path(__file__).parents[1]
CALL = "# $ python main.py "
PLANNED = sorted(path for path in (ROOT / "configs").rglob("*.yaml") if CALL in path.read_text(encoding="utf-8"))
NUMBER = re.compile(r"\d[\d,]*\.?\d*")


def split(path: Path) -> tuple[list[str], str, list[str], list[str]]:
    """Return the lines of a config up to the call, the call, what the plan says, and the lines behind it."""
    lines = path.read_text(encoding="utf-8").splitlines()
    (at,) = [n for n, line in enumerate(lines) if line.startswith(CALL)]
    end = next(n for n in range(at + 1, len(lines)) if not lines[n].startswith("#   "))
    return lines[: at + 1], lines[at].removeprefix(CALL), [line[4:] for line in lines[at + 1 : end]], lines[end:]


# These three plan the model of gpus_8; only their numbers of ranks and rows differ.
DAILY = [p if p.stem not in ("gpus_32", "gpus_64", "kosmos1") else pytest.param(p, marks=pytest.mark.slow) for p in PLANNED]


@pytest.mark.parametrize("path", DAILY, ids=lambda p: p.stem)
def test_the_plan_in_the_head_of_a_config_is_todays(
    path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("kosmos_lit.preflight.run_description.read_manifest", lambda _: None)  # whatever corpora are here
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1 << 60})())
    before, call, written, behind = split(path)

    assert main(shlex.split(call)) == 0, capsys.readouterr().out
    printed = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("note")]

    if request.config.getoption("--regenerate-golden"):
        lines = [*before, *(f"#   {line}".rstrip() for line in printed), *behind]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        pytest.skip("recorded")
    assert [NUMBER.sub("N", line) for line in printed] == [NUMBER.sub("N", line) for line in written]
    numbers, expected = (list(map(value, NUMBER.findall("\n".join(lines)))) for lines in (printed, written))
    # What a layer keeps for its backward pass may differ a little among versions of torch.
    assert numbers == pytest.approx(expected, rel=0.03, abs=0.101)


def value(text: str) -> float:
    return float(text.replace(",", ""))


def test_every_recipe_has_its_plan() -> None:
    recipes = {"kosmos1", "single_gpu", "small_cpu", "finetune_kosmos2", "gpus_8", "gpus_32", "gpus_64"}

    assert recipes <= {path.stem for path in PLANNED}
