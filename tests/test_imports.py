"""Imports point one way, and heavy libraries are imported by those who need them, when they need them."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]

# Each may import its own row and those before it: docs/design.md, "Layout and direction".
ORDER = (
    {"cache"},
    {"kernels", "constants"},
    {"sites", "atlas", "form", "regions", "masks", "timing", "calls", "macs"},
    {"backends"},
    {"selection", "work", "context", "features", "rules"},
    {"selector"},
    {"masked_conv", "masked_norm", "record", "stage", "plan", "hooks", "surgery", "train"},
    {
        "frozen_layer",
        "strips",
        "frozen_modules",
        "programs",
        "chains",
        "frozen_branch",
        "frozen_squeeze",
        "frozen_heads",
        "freeze",
        "cuda_graph",
        "traced",
        "profile",
    },
    {"coverage", "engines"},
    {"bench", "sweep", "device_sweep"},
    {"cli", "__main__"},
)
LAYER = {name: layer for layer, names in enumerate(ORDER) for name in names}


@dataclass(frozen=True)
class Import:
    """A module that a file imports, in a function or not; imports for type checking are not imports."""

    file: Path
    name: str
    lazy: bool


def imports(*folders: str) -> Iterator[Import]:
    for folder in folders:
        files = sorted((ROOT / folder).rglob("*.py"))
        assert files, folder
        for file in files:
            yield from _imports(file, ast.parse(file.read_text()), lazy=False)


def _imports(file: Path, node: ast.AST, lazy: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            for other in child.orelse:
                yield from _imports(file, other, lazy)
        elif isinstance(child, ast.Import):
            yield from (Import(file, alias.name, lazy) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"{file}: relative import"
            yield Import(file, child.module or "", lazy)
            yield from (Import(file, f"{child.module}.{alias.name}", lazy) for alias in child.names)
        elif isinstance(child, ast.Call) and ast.unparse(child.func).endswith(("import_module", "__import__")):
            yield Import(file, ast.literal_eval(child.args[0]), lazy=True)
        else:
            yield from _imports(file, child, lazy or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef))


def module_of(file: Path) -> str:
    path = file.relative_to(ROOT).with_suffix("")
    return ".".join(part for part in path.parts if part != "__init__")


def core() -> dict[str, set[str]]:
    """What each module of sparsenet imports of sparsenet."""
    found: dict[str, set[str]] = {module_of(file): set() for file in (ROOT / "sparsenet").rglob("*.py")}
    for each in imports("sparsenet"):
        names = [name for name in found if name == each.name]
        found[module_of(each.file)].update(name for name in names if name not in ("sparsenet", module_of(each.file)))
    return found


def top(module: str) -> str:
    return module.split(".")[1]


def test_every_module_has_its_place() -> None:
    for module in core():
        if module != "sparsenet":
            assert top(module) in LAYER, f"give {module} its place in ORDER and in docs/design.md"


def test_imports_point_one_way() -> None:
    graph = core()
    assert "sparsenet.sites" in graph["sparsenet.backends.rows"]  # the walk sees something
    assert len([edge for edges in graph.values() for edge in edges]) > 50
    for module, imported in graph.items():
        if module == "sparsenet":
            continue
        for other in imported:
            assert LAYER[top(other)] <= LAYER[top(module)], f"{module} imports {other}, which comes after it"


def test_no_module_imports_itself_by_way_of_others() -> None:
    """A package's `__init__` runs before its modules, and counts as imported by whoever imports one of them."""
    graph = core()
    for imported in graph.values():
        imported |= {name.rpartition(".")[0] for name in imported if name.count(".") > 1}
    for module, imported in graph.items():
        imported -= {module, module.rpartition(".")[0]}
    TopologicalSorter(graph).prepare()  # raises CycleError


def test_the_core_knows_no_model_family() -> None:
    """But for the catalogue, which runs everyone's models."""
    for each in imports("sparsenet"):
        if each.file.name == "coverage.py" and each.lazy:
            continue
        assert each.name.split(".")[0] not in ("torchvision", "timm", "examples"), each
        if each.name.startswith("sparsenet.adapters"):
            assert each.lazy and each.file.name in ("surgery.py", "freeze.py"), each


def test_one_file_imports_spconv() -> None:
    found = {
        each.file.relative_to(ROOT).as_posix()
        for each in imports("sparsenet", "adapters", "examples")
        if each.name.split(".")[0] in ("spconv", "cumm")
    }
    assert found == {"sparsenet/backends/spconv.py"}
    assert all(each.lazy for each in imports("sparsenet") if each.name.split(".")[0] == "spconv")


def test_triton_is_imported_by_its_kernels_only() -> None:
    for each in imports("sparsenet", "adapters", "examples"):
        if each.name.split(".")[0] == "triton":
            assert each.file.parent.name == "kernels" and each.file.name.startswith("triton"), each


def test_tritons_kernels_are_imported_when_first_asked_for() -> None:
    """But for what says whether they can be, and by one another."""
    for each in imports("sparsenet", "adapters", "examples"):
        if each.name.startswith("sparsenet.kernels.triton_") and not each.file.name.startswith("triton_"):
            assert each.lazy or each.name == "sparsenet.kernels.triton_support", each


def test_nobody_imports_adapters_by_their_folder() -> None:
    for each in imports("sparsenet", "adapters", "examples", "tests"):
        assert each.name.split(".")[0] != "adapters", each


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_the_folders_own_name_is_refused() -> None:
    done = python("import adapters")
    assert done.returncode != 0
    assert "import sparsenet.adapters: the name 'adapters' belongs to another project" in done.stderr


def test_importing_sparsenet_is_light() -> None:
    done = python(
        "import sys; import sparsenet;"
        "print([name for name in ('spconv', 'timm', 'matplotlib', 'torchvision', 'PIL') if name in sys.modules],"
        "'sparsenet.surgery' in sys.modules)"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["[]", "True"]
