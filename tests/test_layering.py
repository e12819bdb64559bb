"""Imports follow the layout, including those inside functions and for types alone."""

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
    __main__
    cli
    ablation serving
    preflight
    callbacks
    report
    tasks
    evaluation
    lit
    resume
    sharding checks costs lora init_from corpus_loss trainer_internals nonfinite
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
    shipped
    interruption
    agreement run_lock watchdog
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
    ("checks", "trainer_internals"),
    ("costs", "init_from"),
}
"""Allowed imports within a line: (importer, imported). The modules on how a model is trained are one layer."""
CONTRACT = {"tokenizer", "batch", "images", "config", "errors", "files", "terminal"}
"""The modules of kosmos_lit that the data package may import."""
BOTH = {"cli", "preflight", "ablation"}
"""The packages of kosmos_lit that may import the data package."""
LONGEST_CHAIN = 15
LONGEST_MODULE = 400

LEVEL = {place: level for level, line in enumerate(reversed(LAYOUT.split("\n"))) for place in line.split()}


def place_of(module: str) -> str:
    """Return the package or file of a module of kosmos_lit; empty for `kosmos_lit/__init__.py`."""
    return [*module.split("."), ""][1]


def _runs_later(node: ast.AST) -> bool:
    return isinstance(node, ast.FunctionDef) or (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")


@cache
def imports(module: str, *, lazy: bool) -> frozenset[str]:
    """Return the modules that a module imports; with `lazy`, also inside functions and for types alone."""
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    lazy_nodes = {id(n) for outer in ast.walk(tree) if _runs_later(outer) for n in ast.walk(outer)}
    names = set()
    for node in ast.walk(tree):
        if not lazy and id(node) in lazy_nodes:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: a relative import"
            parent = str(node.module)
            names |= {name if (name := f"{parent}.{alias.name}") in MODULES else parent for alias in node.names}
    return frozenset(names - {module})


def importers(library: str, *, lazy: bool) -> set[str]:
    return {name for name in MODULES if any(i == library or i.startswith(library + ".") for i in imports(name, lazy=lazy))}


def import_graph() -> dict[str, set[str]]:
    """Return the project's modules that each module imports; an `__init__.py` is a module of its own."""
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
    modules = {name for name in importers("datamodules", lazy=True) if name.startswith("kosmos_lit")}

    assert {place_of(name) for name in modules} <= BOTH


@pytest.mark.parametrize("module", [m for m in MODULES if m.startswith("datamodules")])
def test_the_data_package_imports_only_the_contract(module: str) -> None:
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
    graph, visited = import_graph(), set[str]()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"a circle: {' -> '.join([*path[path.index(name) :], name])}"
        if name not in visited:
            for other in graph[name]:
                visit(other, (*path, name))
            visited.add(name)

    for name in MODULES:
        visit(name, ())
    assert visited == set(MODULES)


def test_the_longest_chain_of_packages_is_short() -> None:
    """A package stands one floor above the highest that it imports; the data package is one."""

    def room(module: str) -> str:
        return place_of(module) if module.startswith("kosmos_lit") else "datamodules"

    graph: dict[str, set[str]] = {}
    for name, others in import_graph().items():
        if room(name) and room(name) != "__main__":  # which is no more than a call of `cli`
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
