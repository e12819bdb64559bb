"""Every file in configs/ can be used, and an overlay changes what it names and nothing else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from kosmos_lit.cli.trainer import KosmosCLI
from kosmos_lit.config import KosmosConfig
from kosmos_lit.model import Kosmos

CONFIGS = Path(__file__).parents[1] / "configs"
RUNS = sorted(p for p in CONFIGS.glob("*.yaml") if p.name != "base.yaml")
ABLATIONS = sorted((CONFIGS / "ablation").glob("*.yaml"))
OTHERS = sorted(p for p in CONFIGS.glob("*/*.yaml") if p not in ABLATIONS)
ON_CPU = ("--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.logger=false", "--trainer.precision=32-true")


def parsed(*files: Path) -> KosmosCLI:
    """Parse the files and build trainer, model and data module, as `fit` does before it starts."""
    return KosmosCLI([*(argument for f in files for argument in ("-c", str(f))), *ON_CPU], run=False)


def flat(node: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(node, dict) or not node:
        return {prefix: node}
    return {k: v for key, value in node.items() for k, v in flat(value, f"{prefix}.{key}".lstrip(".")).items()}


def resolved(cli: KosmosCLI) -> dict[str, Any]:
    return flat(cli.config.as_dict())


def count(module: torch.nn.Module, *, trained: bool = False) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trained)


@pytest.mark.parametrize("path", RUNS, ids=lambda p: p.stem)
def test_a_run_can_be_built(path: Path) -> None:
    cli = parsed(path)
    config = replace(cli.model.config, vision=replace(cli.model.config.vision, pretrained=None))

    with torch.device("meta"):
        model = Kosmos(config)

    assert count(model) > 0
    assert cli.datamodule.n_latents == config.connector.n_latents


@pytest.mark.parametrize("path", ABLATIONS, ids=lambda p: p.stem)
def test_an_ablation_changes_what_it_names_and_nothing_else(path: Path) -> None:
    before, after = resolved(parsed(CONFIGS / "quickstart.yaml")), resolved(parsed(CONFIGS / "quickstart.yaml", path))
    named = flat(yaml.safe_load(path.read_text(encoding="utf-8")))

    changed = {key for key in before | after if before.get(key) != after.get(key)} - {"config"}

    assert changed
    assert changed <= set(named)
    assert all(after[key] == value for key, value in named.items())


@pytest.mark.parametrize("path", OTHERS, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_an_overlay_can_be_laid_over_the_papers_run(path: Path) -> None:
    assert parsed(CONFIGS / "kosmos1.yaml", path).model.config.decoder.n_layers == 24


def test_the_papers_model_has_the_papers_parameters() -> None:
    cli = parsed(CONFIGS / "kosmos1.yaml", CONFIGS / "model" / "kosmos1.yaml")
    config = replace(cli.model.config, vision=replace(cli.model.config.vision, pretrained=None))

    with torch.device("meta"):
        model = Kosmos(config)

    assert count(model.decoder) == 1_340_180_480
    assert count(model) == 1_662_375_936
    assert count(model, trained=True) == 1_371_794_432


def test_the_papers_model_is_the_default_one() -> None:
    cli = parsed(CONFIGS / "kosmos1.yaml", CONFIGS / "model" / "kosmos1.yaml")

    assert cli.model.config == KosmosConfig()


def test_interpolation_follows_overlays_and_flags(tmp_path: Path) -> None:
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text("seed_everything: 7\n", encoding="utf-8")

    cli = KosmosCLI(
        ["-c", str(CONFIGS / "quickstart.yaml"), "-c", str(overlay), "--trainer.default_root_dir", "elsewhere", *ON_CPU],
        run=False,
    )

    assert cli.model.seed == 7
    assert cli.datamodule.seed == 7
    assert cli.datamodule.world.seed == 7
    assert cli.datamodule.world.path == "elsewhere/world"


def test_an_overlay_keeps_the_fields_beside_the_one_it_changes(tmp_path: Path) -> None:
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text("data: {init_args: {caption: {val_share: 0.25}}}\n", encoding="utf-8")

    data = parsed(CONFIGS / "kosmos1.yaml", overlay).datamodule

    assert data.configs["caption"].val_share == 0.25
    assert data.configs["caption"].index == "data/index/caption"
    assert set(data.configs) == {"text", "caption", "interleaved"}


@pytest.mark.parametrize("path", RUNS, ids=lambda p: p.stem)
def test_one_seed_decides_model_and_data(path: Path, tmp_path: Path) -> None:
    overlay = tmp_path / "seed.yaml"
    overlay.write_text("seed_everything: 7\n", encoding="utf-8")

    cli = parsed(path, overlay)

    assert (cli.model.seed, cli.datamodule.seed) == (7, 7)
