# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The order of packages and files: imports go one way, the loss needs only torch, each file has its licence."""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path

import pytest

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
REGISTRY = "config.methods"
"""The one module of the core that imports methods by their names."""
LOSS_MAY_IMPORT = {"torch"}
# One file may use apex's kernel for weight gradients, where it is installed.
FUSED_LINEAR_MAY_IMPORT = LOSS_MAY_IMPORT | {"fused_weight_gradient_mlp_cuda"}
DATA_MAY_IMPORT = {"torch", "datasets", "transformers", "tokenizers", "jinja2", "sentencepiece", "yaml"}

LICENCE = "# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0."

PACKAGE_FILES = sorted((REPOSITORY / PACKAGE).rglob("*.py"))
PYTHON_FILES = [
    REPOSITORY / "setup.py",
    *(
        path
        for directory in (PACKAGE, "tests", "tools", "examples", "experiments")
        for path in sorted((REPOSITORY / directory).rglob("*.py"))
    ),
]


@functools.cache
def imported_names(source: str, module: str) -> tuple[str, ...]:
    """Each absolute dotted name that ``source``, the file of ``module``, imports, also inside functions."""
    found: list[str] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")[: -node.level]
                base = ".".join([*parents, base]).rstrip(".")
            found += (f"{base}.{alias.name}" for alias in node.names)
    return tuple(found)


def package_of(name: str) -> str | None:
    """Return the longest package of `ORDER` that contains ``name``; None for the files beside the packages."""
    inside = name.removeprefix(f"{PACKAGE}.") + "."
    return max((package for package in ORDER if inside.startswith(f"{package}.")), key=len, default=None)


def wrong_way_imports(source: str, module: str) -> list[str]:
    """Return the imports of ``source``, the file of ``module``, that run against `ORDER` or from the core outwards."""
    importer, wrong = package_of(module), []
    for name in imported_names(source, module):
        imported = package_of(name) if name.startswith(f"{PACKAGE}.") else None
        if imported is None or imported == importer:
            continue
        if importer is not None and ORDER.index(imported) > ORDER.index(importer):
            wrong.append(f"{module} imports {name}, whose package comes later")
        elif ring_of(importer) == "core" and ring_of(imported) in NEVER_BY_CORE:
            wrong.append(f"{module} of the core imports {name}")
    return wrong


def named_modules(source: str, prefix: str) -> list[str]:
    """Return the strings of ``source`` that name modules below ``prefix``, such as for `importlib.import_module`."""
    constants = (node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant))
    return [text for text in constants if isinstance(text, str) and re.fullmatch(rf"{re.escape(prefix)}[\w.]*", text)]


def ring_of(package: str | None) -> str:
    """Return the annex of a package, or core: also for the files beside the packages."""
    ring = (package or "").split(".")[0]
    return ring if ring in NEVER_BY_CORE else "core"


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Return each group of modules of ``graph`` that import each other in a circle."""
    found, done = [], set()

    def visit(module: str, path: list[str]) -> None:
        if module in path:
            found.append(path[path.index(module) :])
        elif module not in done:
            for imported in sorted(graph.get(module, ())):
                visit(imported, [*path, module])
            done.add(module)

    for module in sorted(graph):
        visit(module, [])
    return found


def imported_modules(source: str, module: str, modules: Collection[str]) -> set[str]:
    """Return those of ``modules`` that ``source``, the file of ``module``, imports, also inside functions."""
    found = set()
    for name in imported_names(source, module):
        known = next((one for one in (name, name.rpartition(".")[0]) if one in modules), None)
        found |= {known} if known not in (None, PACKAGE) else set()
    return found


def module_of(path: Path) -> str:
    parts = path.relative_to(REPOSITORY).with_suffix("").parts
    # The package's own file stays megatron_selfdistill; a directory's is megatron_selfdistill.directory.__init__,
    # so that one dot in it means the directory.
    return parts[0] if parts == (PACKAGE, "__init__") else ".".join(parts)


def foreign_imports(directory: str, name: str = "*.py") -> dict[str, set[str]]:
    """Third-party packages that each file of a directory of the package imports."""
    found = {}
    for path in sorted((REPOSITORY / PACKAGE / directory).rglob(name)):
        tops = {imported.split(".")[0] for imported in imported_names(path.read_text(), module_of(path))}
        found[path.name] = tops - sys.stdlib_module_names - {PACKAGE, "__future__"}
    return found


@pytest.mark.parametrize("path", PACKAGE_FILES, ids=lambda path: str(path.relative_to(REPOSITORY / PACKAGE)))
def test_imports_run_one_way(path):
    assert wrong_way_imports(path.read_text(), module_of(path)) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("loss.target", "from megatron_selfdistill.model import build"),
        ("loss.target", "from ..model.build import build"),
        ("sources.on_policy", "from megatron_selfdistill.instruments.plan.memory import f"),
        ("trainer", "def f():\n    from megatron_selfdistill.methods import default"),
        ("evaluation.held_out", "from megatron_selfdistill.methods.rlt import RltSettings"),
        ("interop.hf.rope", "from megatron_selfdistill.interop.conversion import f"),
    ],
)
def test_a_wrong_way_import_is_found(module, source):
    assert len(wrong_way_imports(source, f"{PACKAGE}.{module}")) == 1


def test_only_the_registry_names_the_package_of_methods():
    package, naming = f"{PACKAGE}.methods", []
    for path in PACKAGE_FILES:
        text = path.read_text()
        if package in text and ring_of(package_of(module_of(path))) == "core" and named_modules(text, package):
            naming.append(module_of(path))
    assert naming == [f"{PACKAGE}.{REGISTRY}"]


def mentioned_methods(source: str) -> set[str]:
    """Return the names of methods in ``source``, and the attributes that only the settings of methods have."""
    from megatron_selfdistill.config import keys
    from megatron_selfdistill.config.methods import method_names, settings_class
    from megatron_selfdistill.sources.method import Method

    of_all = {key for name in method_names() for key in settings_class(name).__dataclass_fields__} | {"settings"}
    elsewhere = {key.rpartition(".")[2] for key in keys() if not key.startswith("method.")} | set(vars(Method))
    read = {node.attr for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Attribute)}
    words = set(re.findall(r"\w+", source))
    return (read & (of_all - elsewhere)) | (words & (set(method_names()) - {"default"}))


def test_the_on_policy_source_mentions_no_method_and_no_setting_of_one():
    assert mentioned_methods((REPOSITORY / PACKAGE / "sources" / "on_policy.py").read_text()) == set()


def test_no_modules_import_each_other_in_a_circle():
    modules = {module_of(path).removesuffix(".__init__"): path for path in PACKAGE_FILES}
    graph = {module: imported_modules(path.read_text(), module_of(path), modules) for module, path in modules.items()}
    assert circles(graph) == []


def test_loss_imports_torch_only():
    for name, found in foreign_imports("loss").items():
        assert found <= (FUSED_LINEAR_MAY_IMPORT if name == "fused_linear.py" else LOSS_MAY_IMPORT), name


def test_loss_imports_only_the_choices_and_the_doors_of_the_rest_of_the_package():
    for path in sorted((REPOSITORY / PACKAGE / "loss").rglob("*.py")):
        names = imported_names(path.read_text(), module_of(path))
        assert {name.split(".")[1] for name in names if name.startswith(f"{PACKAGE}.")} <= {
            "loss",
            "choices",
            "annexes",
        }, path.name


def test_data_knows_nothing_of_megatron():
    for name, found in foreign_imports("data").items():
        assert found <= DATA_MAY_IMPORT, name


def test_only_the_file_of_ranks_reads_megatrons_parallel_state():
    readers = {
        module_of(path)
        for path in PACKAGE_FILES
        if any("parallel_state" in n.split(".") for n in imported_names(path.read_text(), module_of(path)))
    }
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
    without = [str(path.relative_to(REPOSITORY)) for path in PYTHON_FILES if not opens_with_licence(path)]
    assert without == []


def opens_with_licence(path: Path) -> bool:
    return LICENCE in path.read_text(encoding="utf-8").splitlines()[:2]  # the second, below a #! line
