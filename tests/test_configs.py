"""Every file in configs/ can be used, and an overlay changes the keys that it sets and no others."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import yaml

from datamodules import InstructData
from datamodules.sources import ReadOptions
from kosmos_lit import tasks
from kosmos_lit.batch import CORPORA
from kosmos_lit.cli.trainer import LINKS, KosmosCLI, KosmosParser
from kosmos_lit.config import ConnectorKind, DocumentAttention, Init, KosmosConfig, Norm, Positions, Trainable
from kosmos_lit.errors import UserError
from kosmos_lit.model import Kosmos
from kosmos_lit.report.published import published_results

CONFIGS = Path(__file__).parents[1] / "configs"
TEXT_ONLY = CONFIGS / "world_text_only.yaml"
RUNS = sorted(p for p in CONFIGS.glob("*.yaml") if p not in (CONFIGS / "base.yaml", TEXT_ONLY))
ABLATIONS = sorted((CONFIGS / "ablation").glob("*.yaml"))
SIZES = sorted((CONFIGS / "model").glob("*.yaml"))
DATA = sorted((CONFIGS / "data").glob("*.yaml"))
EVALS = sorted((CONFIGS / "eval").glob("*.yaml"))
TASKS = [p for p in EVALS if p.stem not in ("language", "paper", "world")]
OTHERS = sorted(p for p in CONFIGS.glob("*/*.yaml") if p not in (*ABLATIONS, *DATA, *EVALS))
ON_CPU = ("--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.logger=false", "--trainer.precision=32-true")


@cache
def parsed(*files: Path) -> KosmosCLI:
    """Parse the files and build trainer, model and data module, as `fit` does; a test must not change them."""
    return KosmosCLI([*(argument for f in files for argument in ("-c", str(f))), *ON_CPU], run=False)


class ParserOnly(KosmosCLI):
    """Reads a configuration and builds nothing."""

    def instantiate_classes(self) -> None:
        pass


@cache
def parser() -> KosmosParser:
    cli = ParserOnly(["-c", str(CONFIGS / "kosmos1.yaml"), *ON_CPU], run=False)
    assert isinstance(cli.parser, KosmosParser)
    return cli.parser


@cache
def values(*files: Path) -> dict[str, Any]:
    """Return every value of a run, by its dotted name."""
    arguments = [argument for f in files for argument in ("-c", str(f))]
    return flat(parser().parse_args([*arguments, *ON_CPU]).as_dict())


def flat(node: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(node, dict) or not node:
        return {prefix: tuple(node) if isinstance(node, list) else node}
    return {k: v for key, value in node.items() for k, v in flat(value, f"{prefix}.{key}".lstrip(".")).items()}


def settings_of(path: Path) -> dict[str, Any]:
    return flat(yaml.safe_load(path.read_text(encoding="utf-8")))


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


def test_the_worlds_baseline_is_its_model_without_images() -> None:
    world, text_only = parsed(CONFIGS / "world.yaml"), parsed(CONFIGS / "world.yaml", TEXT_ONLY)

    assert text_only.model.config == world.model.config
    assert {CORPORA[source.kind] for source in text_only.datamodule.sources.values()} == {"text", "instruct"}
    assert all(
        "/blind/" in str(s.config.input) for s in text_only.datamodule.sources.values() if CORPORA[s.kind] == "instruct"
    )


def changes(run: str, path: Path) -> dict[str, Any]:
    """Return every value of a run that an overlay changes, as it is afterwards, by its dotted name."""
    before, after = values(CONFIGS / run), values(CONFIGS / run, path)
    keys = (before | after).keys() - {"config"}
    replaced = {key for key in before if any(other.startswith(f"{key}.") for other in after)}  # a null that became a class
    return {key: after.get(key) for key in keys - replaced if before.get(key) != after.get(key)}


@pytest.mark.parametrize("run", ["quickstart.yaml", "kosmos1.yaml"])
@pytest.mark.parametrize("path", ABLATIONS, ids=lambda p: p.stem)
def test_an_ablation_changes_only_the_keys_that_it_sets(run: str, path: Path) -> None:
    settings = settings_of(path)
    linked = {LINKS[key]: value for key, value in settings.items() if key in LINKS}

    assert changes(run, path).items() <= (settings | linked).items()


@pytest.mark.parametrize("path", ABLATIONS, ids=lambda p: p.stem)
def test_an_ablation_changes_every_key_that_it_sets(path: Path) -> None:
    # `vision.trainable` is `last_block` in the paper's run already, and `all` in the quickstart.
    run = "quickstart.yaml" if path.stem == "last_block_vision" else "kosmos1.yaml"

    assert changes(run, path).keys() >= settings_of(path).keys()


@pytest.mark.parametrize("path", ABLATIONS, ids=lambda p: p.stem)
def test_an_ablation_begins_with_a_comment(path: Path) -> None:
    assert path.read_text(encoding="utf-8").startswith("# ")


@pytest.mark.parametrize("path", OTHERS, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_an_overlay_applies_to_the_papers_run(path: Path) -> None:
    changed, settings = changes("kosmos1.yaml", path), settings_of(path)
    # The defaults of a strategy's class come with its name.
    chosen = {key: changed[key] for key in changed if key in settings or not key.startswith("trainer.strategy.init_args.")}

    assert chosen.items() <= settings.items()


def tasks_of(*files: Path) -> dict[str, Any]:
    """Return the tasks of evaluation overlays by name, and check that the overlays set nothing else."""
    contents = [yaml.safe_load(path.read_text(encoding="utf-8")) for path in files]
    assert all(content.keys() == {"eval"} and content["eval"].keys() == {"tasks"} for content in contents)
    return {name: task for content in contents for name, task in content["eval"]["tasks"].items()}


def test_each_task_has_a_file_of_its_name_and_is_the_same_in_the_papers_suite() -> None:
    suite = tasks_of(CONFIGS / "eval" / "paper.yaml")

    assert all(tasks_of(path) == {path.stem: suite[path.stem]} for path in TASKS)
    assert tasks_of(CONFIGS / "eval" / "language.yaml").items() <= suite.items()


def test_the_suite_applies_to_the_papers_run() -> None:
    changed = changes("kosmos1.yaml", CONFIGS / "eval" / "paper.yaml")

    assert {key.split(".")[2] for key in changed if key != "eval.tasks"} == tasks_of(CONFIGS / "eval" / "paper.yaml").keys()


def test_the_suite_has_every_published_benchmark_and_names_end_in_the_shots() -> None:
    suite = tasks_of(CONFIGS / "eval" / "paper.yaml")

    built = {name: getattr(tasks, task["class_path"].split(".")[-1])(**task["init_args"]) for name, task in suite.items()}

    published = set(published_results().benchmarks)
    assert {task.published for task in built.values()} == published == {path.stem for path in TASKS}
    for name, task in built.items():
        assert name == f"{task.published}_{task.n_shots}".removesuffix("_0")
        shots = {"n_shots": task.n_shots} if task.n_shots else {}
        assert suite[name]["init_args"] == suite[task.published]["init_args"] | shots


@pytest.mark.parametrize("path", SIZES, ids=lambda p: p.stem)
def test_a_model_size_is_the_same_model_over_any_run(path: Path) -> None:
    over_paper, over_quickstart = (parsed(CONFIGS / run, path).model.config for run in ("kosmos1.yaml", "quickstart.yaml"))

    assert over_quickstart.architecture() == over_paper.architecture()


# By hand, for V = 64,007, F = 4D, K = D / heads:
#   decoder    V D + L (12 D^2 + 23 D) + 2 D    attention 4 D^2 + 4 D, feed-forward 8 D^2 + 5 D, LayerNorms 14 D; last 2 D
#   connector  C D + D + 64 D + 4 D^2 + 4 D     dense, latents, attention
#   CLIP ViT-L/14 without projection 303,179,776; ViT-B/16 likewise 85,799,424:
#     3 16^2 768 + 768 + 197 768 + 4 768 + 12 (12 768^2 + 13 768)
N_PARAMETERS = {
    "tiny": (51_717_632, 1_477_120, 85_799_424),
    "small": (134_305_536, 3_198_720, 303_179_776),
    "medium": (368_100_352, 5_313_536, 303_179_776),
    "large": (778_642_944, 11_116_032, 303_179_776),
    "kosmos1": (1_340_180_480, 19_015_680, 303_179_776),
    "kosmos2": (1_342_289_920, 19_015_680, 303_179_776),  # 1,030 rows of 2,048 more
    "2b": (1_944_725_504, 19_015_680, 303_179_776),
    "6b": (6_398_332_416, 55_297_536, 303_179_776),
}


@pytest.mark.parametrize("path", SIZES, ids=lambda p: p.stem)
def test_a_model_size_has_the_parameters_of_its_formula(path: Path) -> None:
    config = parsed(CONFIGS / "kosmos1.yaml", path).model.config

    with torch.device("meta"):
        model = Kosmos(replace(config, vision=replace(config.vision, pretrained=None)))

    assert (count(model.decoder), count(model.connector), count(model.vision)) == N_PARAMETERS[path.stem]


def test_every_model_size_is_tested() -> None:
    assert {path.stem for path in SIZES} == set(N_PARAMETERS)


def test_the_papers_model_has_the_papers_parameters() -> None:
    cli = parsed(CONFIGS / "kosmos1.yaml", CONFIGS / "model" / "kosmos1.yaml")
    config = replace(cli.model.config, vision=replace(cli.model.config.vision, pretrained=None))

    with torch.device("meta"):
        model = Kosmos(config)

    assert count(model.decoder) == 1_340_180_480
    assert count(model) == 1_662_375_936
    assert count(model, trained=True) == 1_371_794_432


def test_the_public_weights_can_be_fine_tuned_fully_or_by_adapters() -> None:
    run = CONFIGS / "finetune_kosmos2.yaml"
    full, adapters = parsed(run), parsed(run, CONFIGS / "trainer" / "lora.yaml")

    with torch.device("meta"):
        model, adapted = Kosmos(full.model.config), Kosmos(adapters.model.config)

    assert count(model) == 1_664_485_376
    # per decoder layer 16 ranks of q, k, v, out (4 x 4,096) and fc1, fc2 (2 x 10,240), and of the resampler's four
    assert count(adapted, trained=True) == 16 * (24 * (4 * 4096 + 2 * 10_240) + 4 * 4096)
    assert adapters.model.init_from == "models/kosmos2"
    assert full.model.config == parsed(CONFIGS / "kosmos1.yaml", CONFIGS / "model" / "kosmos2.yaml").model.config
    assert full.datamodule.ratios == [(0, (0, 0, 0, 1))]


INSTRUCT = ("--data.instruct.format=instruct", "--data.instruct.input=[x.jsonl]", "--data.instruct.index=index")
INSTRUCT_DATA = ("--data=datamodules.InstructData", "--data.tokenizer.path=folder", *INSTRUCT)


def test_instruction_data_can_be_selected_by_flags() -> None:
    data = KosmosCLI([*INSTRUCT_DATA, *ON_CPU], run=False).datamodule

    assert type(data) is InstructData
    assert data.ratios == [(0, (0, 0, 0, 1))]


def test_a_ratio_for_captions_keeps_the_ratio_of_the_examples() -> None:
    caption = ("--data.caption.format=img2dataset", "--data.caption.input=[x.tar]", "--data.caption.index=other")

    data = KosmosCLI([*INSTRUCT_DATA, *caption, "--data.ratio.caption=3", *ON_CPU], run=False).datamodule

    assert data.ratios == [(0, (0, 3, 0, 1))]


def test_the_papers_run_has_the_papers_ratio() -> None:
    assert parsed(CONFIGS / "kosmos1.yaml").datamodule.ratios == [(0, (5, 5, 2, 0))]
    assert parsed(CONFIGS / "quickstart.yaml").datamodule.ratios == [(0, (5, 5, 2, 0))]


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


def test_an_overlay_keeps_the_fields_that_it_does_not_set(tmp_path: Path) -> None:
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text("data: {init_args: {caption: {val_share: 0.25}}}\n", encoding="utf-8")

    data = parsed(CONFIGS / "kosmos1.yaml", overlay).datamodule

    assert data.sources["caption"].config.val_share == 0.25
    assert data.sources["caption"].config.index == "data/index/caption"
    assert set(data.sources) == {"text", "caption", "interleaved"}


SOURCE = "{format: jsonl, input: [FILE], index: NAME, read: {text_field: body}, weight: 3}"


def test_an_overlay_keeps_the_sources_that_it_does_not_set(tmp_path: Path) -> None:
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    named = "\n".join(f"      {name}: {SOURCE.replace('NAME', name)}" for name in ("books", "news"))
    first.write_text(f"data:\n  init_args:\n    sources:\n{named}\n", encoding="utf-8")
    second.write_text("data: {init_args: {sources: {news: {weight: 7, read: {seed: 5}}}}}\n", encoding="utf-8")
    files = [a for path in (CONFIGS / "kosmos1.yaml", first, second) for a in ("-c", str(path))]

    data = KosmosCLI([*files, "--data.sources.books.weight=11", *ON_CPU], run=False).datamodule

    assert [data.sources[name].config.weight for name in ("text", "books", "news")] == [1, 11, 7]
    assert data.sources["news"].config.read == ReadOptions(text_field="body", seed=5)


@pytest.fixture
def sources_of(tmp_path: Path) -> Callable[..., dict[str, float]]:
    """Return a function from files with sources, and flags among them, to the weights of the resulting sources."""

    def parse(*files: str) -> dict[str, float]:
        arguments = ["-c", str(CONFIGS / "quickstart.yaml")]
        for n, text in enumerate(files):
            if not text.startswith("--"):
                (tmp_path / f"{n}.yaml").write_text(f"data: {{init_args: {{sources: {text}}}}}\n", encoding="utf-8")
            arguments += [text] if text.startswith("--") else ["-c", str(tmp_path / f"{n}.yaml")]
        cli = ParserOnly([*arguments, *ON_CPU], run=False)
        return {n: source["weight"] for n, source in (cli.config.as_dict()["data"]["init_args"]["sources"] or {}).items()}

    return parse


def test_null_removes_the_sources_of_earlier_files(sources_of: Callable[..., dict[str, float]]) -> None:
    books, news = (f"{{{name}: {SOURCE.replace('NAME', name)}}}" for name in ("books", "news"))

    assert sources_of(books, news) == {"books": 3, "news": 3}
    assert sources_of(books, news, "null") == {}
    assert sources_of(books, "null", news) == {"news": 3}
    assert sources_of(books, "null", news, "{news: {weight: 5}}") == {"news": 5}


def test_a_flag_for_a_source_must_follow_the_files_with_sources(sources_of: Callable[..., dict[str, float]]) -> None:
    books, news = (f"{{{name}: {SOURCE.replace('NAME', name)}}}" for name in ("books", "news"))

    assert sources_of(books, news, "--data.sources.books.weight=11") == {"books": 11, "news": 3}
    with pytest.raises(UserError, match=r"--data\.sources\.books\.weight is given before .*2\.yaml, which names"):
        sources_of(books, "--data.sources.books.weight=11", news)


@pytest.mark.parametrize("path", RUNS, ids=lambda p: p.stem)
def test_one_seed_sets_model_and_data(path: Path, tmp_path: Path) -> None:
    overlay = tmp_path / "seed.yaml"
    overlay.write_text("seed_everything: 7\n", encoding="utf-8")

    cli = parsed(path, overlay)

    assert (cli.model.seed, cli.datamodule.seed) == (7, 7)


ABLATION_PAGE = CONFIGS.parent / "docs" / "ablations.md"


def test_the_page_on_ablations_names_every_overlay_and_no_other() -> None:
    text = ABLATION_PAGE.read_text(encoding="utf-8")

    assert set(re.findall(r"`(\w+\.yaml)`", text)) == {path.name for path in ABLATIONS}
    assert set(re.findall(r"`model/(\w+\.yaml)`", text)) == {path.name for path in SIZES}


def test_the_page_on_ablations_lists_every_value_of_every_switch() -> None:
    cells = re.findall(r"(?<=\| )`(\w+)`(?= \|)", ABLATION_PAGE.read_text(encoding="utf-8"))
    choices = (get_args(t) for t in (Norm, Positions, Init, DocumentAttention, ConnectorKind, Trainable))

    assert {value for values in choices for value in values} <= set(cells)


@pytest.mark.parametrize("size", N_PARAMETERS)
def test_the_page_on_ablations_lists_the_tested_sizes(size: str) -> None:
    (row,) = re.findall(rf"^\| `model/{size}\.yaml` .*$", ABLATION_PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    decoder, connector, tower = N_PARAMETERS[size]

    assert f"| {decoder:,} | {connector:,} |" in row
    assert f"{tower:,}" in row or size not in ("tiny", "small")


def test_every_switch_has_an_overlay_for_each_value_but_the_default() -> None:
    settings = [item for path in ABLATIONS for item in settings_of(path).items()]
    decoder, connector = "model.kosmos.decoder", "model.kosmos.connector"
    switches = {f"{decoder}.norm": Norm, f"{decoder}.positions": Positions, f"{decoder}.init": Init}
    switches |= {f"{decoder}.document_attention": DocumentAttention, f"{connector}.kind": ConnectorKind}

    for field, values in switches.items():
        assert {value for key, value in settings if key == field} == set(get_args(values)) - {get_args(values)[0]}
    assert {value for key, value in settings if key == "model.kosmos.vision.trainable"} == set(get_args(Trainable))


@pytest.mark.parametrize("path", DATA, ids=lambda p: p.stem)
def test_an_overlay_of_corpora_changes_only_the_corpora(path: Path) -> None:
    corpora = ("text", "caption", "interleaved", "sources")

    assert {key.split(".")[2] for key in changes("kosmos1.yaml", path)} == set(corpora)


def test_the_papers_corpora_are_weighted_as_in_its_table_20() -> None:
    data = parsed(CONFIGS / "kosmos1.yaml", CONFIGS / "data" / "kosmos1.yaml").datamodule
    weights = {name: source.config.weight for name, source in data.sources.items() if source.config.format == "jsonl"}

    assert list(weights.values()) == [21.8, 17.7, 16.2, 14.7, 10.6, 10.2, 5.4, 1.1, 1.0, 1.0, 0.2]
    assert [source.config.format for source in data.sources.values()] == 11 * ["jsonl"] + 4 * ["img2dataset"] + ["warc"]
