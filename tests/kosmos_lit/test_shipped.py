"""Shipped configs are found by their names from anywhere; an existing path wins."""

from __future__ import annotations

from pathlib import Path

import pytest

from kosmos_lit.config import VisionConfig
from kosmos_lit.errors import UserError
from kosmos_lit.shipped import CONFIGS, find_file, shipped_names


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("quickstart", "quickstart.yaml"),
        ("quickstart.yaml", "quickstart.yaml"),
        ("trainer/fsdp", "trainer/fsdp.yaml"),
        ("configs/eval/vqav2.yaml", "eval/vqav2.yaml"),
    ],
)
def test_a_name_finds_a_shipped_config(name: str, file: str) -> None:
    assert find_file(name, "-c") == CONFIGS / file


def test_a_file_that_exists_wins_over_a_name(tmp_path: Path) -> None:
    (tmp_path / "quickstart.yaml").write_text("{}", encoding="utf-8")

    assert find_file("quickstart.yaml", "-c") == Path("quickstart.yaml")
    assert find_file("quickstart", "-c") == CONFIGS / "quickstart.yaml"


@pytest.mark.parametrize("name", ["../main", "/etc/quickstart", "configs", "eval"])
def test_nothing_but_a_listed_name_is_found(name: str) -> None:
    with pytest.raises(UserError, match="none of that name is shipped"):
        find_file(name, "-c")


def test_an_unknown_name_lists_all_configs_the_nearest_first() -> None:
    with pytest.raises(UserError) as error:
        find_file("trainer/fspd", "-c")

    message = str(error.value)
    assert message.startswith("-c: no file trainer/fspd (looked from ")
    assert "did you mean trainer/fsdp? (there are trainer/fsdp, trainer/fsdp1, " in message
    assert all(name in message for name in shipped_names())


def test_every_config_is_shipped() -> None:
    folder = Path(__file__).parents[2] / "configs"

    assert {f"{name}.yaml" for name in shipped_names()} == {str(p.relative_to(folder)) for p in folder.rglob("*.yaml")}


def test_a_towers_description_within_a_config_is_found_from_anywhere() -> None:
    tower = VisionConfig(architecture="configs/vision/tiny_48.json", pretrained=None, image_size=48).resolved()

    assert isinstance(tower.architecture, dict)
    with pytest.raises(UserError, match=r"vision.architecture: no file vision/tiny_49.json .*did you mean vision/tiny_48\?"):
        VisionConfig(architecture="vision/tiny_49.json").resolved()
