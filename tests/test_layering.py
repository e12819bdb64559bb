"""The arrows between packages, by what each module imports."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for package in ("kosmos_lit", "datamodules")
    for path in sorted((ROOT / package).rglob("*.py"))
}
CONTRACT = {"tokenizer", "batch", "images", "errors", "files", "terminal", "config"}


def imports(path: Path, *, lazy: bool) -> set[str]:
    """Return the modules that a file imports, inside functions and for types alone too if `lazy`."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inside = {id(n) for outer in ast.walk(tree) if _runs_later(outer) for n in ast.walk(outer)}
    found = set()
    for node in ast.walk(tree):
        if not lazy and id(node) in inside:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
    return found


def _runs_later(node: ast.AST) -> bool:
    return isinstance(node, ast.FunctionDef) or (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")


def importers(library: str, *, lazy: bool) -> set[str]:
    return {
        name
        for name, path in MODULES.items()
        if any(i == library or i.startswith(library + ".") for i in imports(path, lazy=lazy))
    }


def test_only_the_command_line_imports_both_packages() -> None:
    ours = {name for name in importers("datamodules", lazy=True) if name.startswith("kosmos_lit")}

    assert {name.rsplit(".", 1)[0] for name in ours} <= {"kosmos_lit.cli", "kosmos_lit.preflight"}


@pytest.mark.parametrize("module", [m for m in MODULES if m.startswith("datamodules")])
def test_data_knows_of_the_model_only_the_contract(module: str) -> None:
    used = {i.split(".")[1] for i in imports(MODULES[module], lazy=True) if i.startswith("kosmos_lit.")}

    assert used <= CONTRACT


@pytest.mark.parametrize(("library", "owner"), [("open_clip", "kosmos_lit.vision"), ("xformers", "kosmos_lit.ops.kernels")])
def test_heavy_libraries_have_one_importer_and_it_is_lazy(library: str, owner: str) -> None:
    assert importers(library, lazy=True) == {owner}
    assert importers(library, lazy=False) == set()


@pytest.mark.parametrize("module", [m for m in MODULES if m.startswith("kosmos_lit.ops")])
def test_ops_have_no_parameters(module: str) -> None:
    used = imports(MODULES[module], lazy=True)

    assert not used & {"torch.nn", "torch.nn.Module"}


def test_configs_need_no_torch() -> None:
    assert not any(i.split(".")[0] == "torch" for i in imports(MODULES["kosmos_lit.config"], lazy=True))


def test_imports_have_no_circles() -> None:
    arrows = {name: {i for i in imports(path, lazy=False) if i in MODULES} - {name} for name, path in MODULES.items()}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"a circle: {' -> '.join([*path, name])}"
        if name not in done:
            for other in arrows[name]:
                visit(other, (*path, name))
            done.add(name)

    for name in MODULES:
        visit(name, ())
    assert done == set(MODULES)


@pytest.mark.parametrize("module", list(MODULES))
def test_modules_stay_short(module: str) -> None:
    assert len(MODULES[module].read_text(encoding="utf-8").splitlines()) <= 400
