# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The order of packages and files: imports go one way, the loss needs only torch, and one name stands for one thing."""

from __future__ import annotations

import ast
import functools
import graphlib
import subprocess
import sys
from collections import Counter
from pathlib import Path

from megatron_selfdistill.annexes import DOORS

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGE = "megatron_selfdistill"

# A package may import from those before it, never from those after it.  Its files have no order, but no circles.
ORDER = (
    *("config", "compat", "distributed", "loss", "kernels", "data", "model", "architectures", "adapters"),
    *("checkpoint.formats", "adapters.stored_adapters", "data.run_data", "checkpoint"),
    *("adapters.configured_adapters", "interop.hf", "interop", "rollout", "engines", "pipeline", "metrics"),
    *("evaluation", "sources", "teachers", "environments", "chat_logs", "overlap", "guidance", "methods", "commands"),
    "methods.data_sets",
    *("instruments", "instruments.explorer", "instruments.report", "instruments.plan"),
    *("instruments.selftest", "instruments.doctor"),
)
NEVER_BY_CORE = {"methods", *(place.partition(".")[0] for place in DOORS.values())}
"""Packages that the core does not know."""
LOSS_MAY_IMPORT = {"torch"}
FUSED_LINEAR_MAY_IMPORT = LOSS_MAY_IMPORT | {"fused_weight_gradient_mlp_cuda"}
"""One file may use apex's kernel for weight gradients, where it is installed."""
DATA_MAY_IMPORT = {"torch", "datasets", "transformers", "tokenizers", "jinja2", "sentencepiece", "yaml"}
LICENCE = "# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0."
FILES = sorted((REPOSITORY / PACKAGE).rglob("*.py"))


def module_of(path: Path) -> str:
    """Return the name of a file's module; that of a directory ends in __init__, so that one dot means the directory."""
    parts = path.relative_to(REPOSITORY).with_suffix("").parts
    return parts[0] if parts == (PACKAGE, "__init__") else ".".join(parts)


@functools.cache
def trees() -> dict[str, ast.Module]:
    return {module_of(path): ast.parse(path.read_text(encoding="utf-8")) for path in FILES}


def imported_names(tree: ast.Module, module: str) -> list[str]:
    """Return each absolute dotted name that ``tree``, the file of ``module``, imports, also inside functions."""
    found: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = module.split(".")[: -node.level] if node.level else []
            base = ".".join([*parents, node.module or ""]).rstrip(".")
            found += (f"{base}.{alias.name}" for alias in node.names)
    return found


@functools.cache
def imports() -> dict[str, list[str]]:
    """Return the names that each module of the package imports."""
    return {module: imported_names(tree, module) for module, tree in trees().items()}


def imports_below(directory: str) -> dict[str, list[str]]:
    return {module: names for module, names in imports().items() if module.startswith(f"{PACKAGE}.{directory}.")}


def foreign(names: list[str]) -> set[str]:
    """Return the packages of others among the names."""
    return {name.split(".")[0] for name in names} - sys.stdlib_module_names - {PACKAGE, "__future__"}


def package_of(name: str) -> str | None:
    """Return the longest package of `ORDER` that contains ``name``; None for the files beside the packages."""
    inside = name.removeprefix(f"{PACKAGE}.") + "."
    return max((package for package in ORDER if inside.startswith(f"{package}.")), key=len, default=None)


def is_core(package: str | None) -> bool:
    """Return whether a package belongs to no annex; the files beside the packages do not."""
    return (package or "").split(".")[0] not in NEVER_BY_CORE


def wrong_way(module: str, names: list[str]) -> list[str]:
    """Return the imports of ``module`` that run against `ORDER` or from the core outwards."""
    importer, wrong = package_of(module), []
    for name in names:
        imported = package_of(name) if name.startswith(f"{PACKAGE}.") else None
        if imported is None or imported == importer:
            continue
        later = importer is not None and ORDER.index(imported) > ORDER.index(importer)
        if later or (is_core(importer) and not is_core(imported)):
            wrong.append(f"{module} imports {name}")
    return wrong


def test_imports_run_one_way():
    assert [line for module, names in imports().items() for line in wrong_way(module, names)] == []


def test_no_modules_import_each_other_in_a_circle():
    modules = {module.removesuffix(".__init__"): module for module in trees()}
    graph = {}
    for short, module in modules.items():
        candidates = ((name, name.rpartition(".")[0]) for name in imports()[module])
        known = {next((one for one in names if one in modules), None) for names in candidates}
        graph[short] = known - {None, PACKAGE, short}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError


def test_the_loss_needs_torch_only_and_of_the_package_the_choices_and_the_doors():
    for module, names in imports_below("loss").items():
        may = FUSED_LINEAR_MAY_IMPORT if module.endswith(".fused_linear") else LOSS_MAY_IMPORT
        assert foreign(names) <= may, module
        own = {name.split(".")[1] for name in names if name.startswith(f"{PACKAGE}.")}
        assert own <= {"loss", "choices", "annexes"}, module


def test_data_knows_nothing_of_megatron():
    assert {module: names for module, names in imports_below("data").items() if foreign(names) - DATA_MAY_IMPORT} == {}


def test_only_the_file_of_ranks_reads_megatrons_parallel_state():
    readers = {module for module, names in imports().items() if any("parallel_state" in n.split(".") for n in names)}
    assert readers <= {f"{PACKAGE}.distributed.ranks"}


def test_importing_the_package_imports_neither_torch_nor_megatron():
    code = (
        "import sys, megatron_selfdistill\n"
        "heavy = {'torch', 'numpy', 'megatron', 'transformers', 'hydra'} & set(sys.modules)\n"
        "import megatron_selfdistill.config\n"
        "heavy |= {'torch', 'megatron', 'transformers'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True)


def test_every_python_file_opens_with_the_licence():
    directories = (PACKAGE, "tests", "tools", "examples", "experiments")
    files = [REPOSITORY / "setup.py", *(path for name in directories for path in (REPOSITORY / name).rglob("*.py"))]
    first = {path: path.read_text(encoding="utf-8").splitlines()[:2] for path in files}  # the second, below a #! line
    assert [str(path) for path, lines in first.items() if LICENCE not in lines] == []


def test_no_two_files_and_no_two_public_classes_have_one_name():
    files = [path.name for path in FILES if path.name != "__init__.py"]
    nodes = [node for tree in trees().values() for node in tree.body]
    classes = [node.name for node in nodes if isinstance(node, ast.ClassDef) and not node.name.startswith("_")]
    assert [name for names in (files, classes) for name, count in Counter(names).items() if count > 1] == []
