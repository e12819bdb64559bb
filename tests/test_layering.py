"""The arrows between packages, by what each module imports: inside functions and for types alone too."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for package in ("kosmos_lit", "datamodules")
    for path in sorted((ROOT / package).rglob("*.py"))
}

LAYOUT = """
    cli
    ablation serving
    preflight
    callbacks
    report
    tasks
    evaluation
    lit
    resume
    sharding checks costs lora init_from corpus_loss trainer_internals
    inference
    weights
    checkpoint
    model
    vision connector decoder
    layers state_dicts
    ops
    batch
    tokenizer
    images
    config
    errors files terminal _version
"""
"""Places of kosmos_lit from the top down: a line imports what stands below it, and within a line a place imports itself.

`checkpoint` knows files and configurations only, so weights are loaded by it. `batch` speaks of ids, which are the
tokenizer's. `state_dicts` reads the files of a pretrained tower, which `vision` needs to be built.
"""
PEERS = {
    ("init_from", "lora"),
    ("checks", "costs"),
    ("checks", "sharding"),
    ("costs", "init_from"),
}
"""Arrows between places of one line: how a model is trained is one layer with an order of its own."""
CONTRACT = {"tokenizer", "batch", "images", "config", "errors", "files", "terminal"}
"""What the data package may know of kosmos_lit."""
BOTH = {"cli", "preflight", "ablation"}
"""The places that know the data package."""
LONGEST_CHAIN = 15
LONGEST_MODULE = 400

LEVEL = {place: level for level, line in enumerate(reversed(LAYOUT.split("\n"))) for place in line.split()}


def place_of(module: str) -> str:
    """Return the package or file that a module of kosmos_lit lies in, empty for the package's own face."""
    return [*module.split("."), ""][1]


def _runs_later(node: ast.AST) -> bool:
    return isinstance(node, ast.FunctionDef) or (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")


@cache
def imports(module: str, *, lazy: bool) -> frozenset[str]:
    """Return the modules that a module imports, inside functions and for types alone too if `lazy`."""
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    inside = {id(n) for outer in ast.walk(tree) if _runs_later(outer) for n in ast.walk(outer)}
    names = set()
    for node in ast.walk(tree):
        if not lazy and id(node) in inside:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: a relative import"
            whole = str(node.module)
            names |= {f"{whole}.{alias.name}" if f"{whole}.{alias.name}" in MODULES else whole for alias in node.names}
    return frozenset(names - {module})


def importers(library: str, *, lazy: bool) -> set[str]:
    return {
        name for name in MODULES if any(i == library or i.startswith(library + ".") for i in imports(name, lazy=lazy))
    }


def arrows() -> dict[str, set[str]]:
    """Return for each module those of ours that it imports; a package's face, which hands names on, stands for itself."""
    return {name: {i for i in imports(name, lazy=True) if i in MODULES} for name in MODULES}


@pytest.mark.parametrize("module", [m for m in MODULES if m.startswith("kosmos_lit.")])
def test_imports_follow_the_layout(module: str) -> None:
    own = place_of(module)
    for other in imports(module, lazy=True):
        if other not in MODULES or not other.startswith("kosmos_lit.") or place_of(other) == own:
            continue
        below = LEVEL[own] > LEVEL[place_of(other)] or (own, place_of(other)) in PEERS
        assert below, f"{module} imports {other}, which stands beside it or above it"


def test_only_the_top_imports_both_packages() -> None:
    ours = {name for name in importers("datamodules", lazy=True) if name.startswith("kosmos_lit")}

    assert {place_of(name) for name in ours} <= BOTH


@pytest.mark.parametrize("module", [m for m in MODULES if m.startswith("datamodules")])
def test_data_knows_of_the_model_only_the_contract(module: str) -> None:
    used = {place_of(i) for i in imports(module, lazy=True) if i.startswith("kosmos_lit.")}

    assert used <= CONTRACT


@pytest.mark.parametrize(("library", "owner"), [("open_clip", "kosmos_lit.vision"), ("xformers", "kosmos_lit.ops.kernels")])
def test_heavy_libraries_have_one_importer_and_it_is_lazy(library: str, owner: str) -> None:
    assert importers(library, lazy=True) == {owner}
    assert importers(library, lazy=False) == set()


@pytest.mark.parametrize("module", [m for m in MODULES if m.startswith("kosmos_lit.ops")])
def test_ops_have_no_parameters(module: str) -> None:
    assert not imports(module, lazy=True) & {"torch.nn", "torch.nn.Module"}


def test_configs_need_no_torch() -> None:
    assert not any(i.split(".")[0] == "torch" for i in imports("kosmos_lit.config", lazy=True))


def test_no_files_import_each_other_in_a_circle() -> None:
    graph, done = arrows(), set[str]()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"a circle: {' -> '.join([*path[path.index(name) :], name])}"
        if name not in done:
            for other in graph[name]:
                visit(other, (*path, name))
            done.add(name)

    for name in MODULES:
        visit(name, ())
    assert done == set(MODULES)


def test_the_longest_chain_of_packages_is_short() -> None:
    """A place stands one floor above the highest that it imports; the data package is one place."""

    def room(module: str) -> str:
        return place_of(module) if module.startswith("kosmos_lit") else "datamodules"

    graph: dict[str, set[str]] = {}
    for name, others in arrows().items():
        if room(name):
            graph.setdefault(room(name), set()).update(room(other) for other in others)

    @cache
    def floor(place: str) -> int:
        return 1 + max((floor(other) for other in graph.get(place, ()) if other and other != place), default=0)

    assert max(floor(place) for place in graph) <= LONGEST_CHAIN


@pytest.mark.parametrize("module", list(MODULES))
def test_modules_stay_short(module: str) -> None:
    assert len(MODULES[module].read_text(encoding="utf-8").splitlines()) <= LONGEST_MODULE


def test_packages_are_two_levels_deep_at_most() -> None:
    assert not [name for name in MODULES if name.count(".") > 2]
