# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The shape of the house: imports run one way, the maths needs torch only, each file says whose it is."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGE = "megatron_selfdistill"

# A module may import from those before it, never from those after it.  Folders count as one.
ORDER = (
    "paths one_copy noise progress config console_line next_steps roll_call cpu repairs parallel data verify inputs "
    "loss model optimizer_step checkpoint prechecks run_lock teacher device_batch teacher_bank rollout vllm_plugin "
    "serve inference schedule batch score metrics turns guards stop evaluate plan logged rollouts resuming run_folder "
    "run command_line train selftest report commands cli __main__"
).split()

LOSS_MAY_IMPORT = {"torch", "triton"}
# One file may use apex's kernel for weight gradients, where it is installed.
FUSED_LINEAR_MAY_IMPORT = LOSS_MAY_IMPORT | {"fused_weight_gradient_mlp_cuda"}
DATA_MAY_IMPORT = {"torch", "datasets", "transformers", "tokenizers", "sentencepiece"}

LICENCE = "# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0."

PACKAGE_FILES = sorted((REPOSITORY / PACKAGE).rglob("*.py"))
PYTHON_FILES = [
    REPOSITORY / "setup.py",
    *(
        path
        for folder in (PACKAGE, "tests", "tools", "examples")
        for path in sorted((REPOSITORY / folder).rglob("*.py"))
    ),
]


def imported_names(source: str, module: str) -> Iterator[str]:
    """Each absolute dotted name that ``source``, the file of ``module``, imports, also inside functions."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")[: -node.level]
                base = ".".join([*parents, base]).rstrip(".")
            yield from (f"{base}.{alias.name}" for alias in node.names)


def wrong_way_imports(source: str, module: str) -> list[str]:
    """The imports of ``source`` that run against `ORDER`, or that name a part that it does not know."""
    importer = part_of(module)
    if importer is None:
        return [f"{module} imports {name}" for name in imported_names(source, module) if name.startswith(PACKAGE)]
    if importer not in ORDER:
        return [f"{module}: not in ORDER; give it a place in the data flow"]
    wrong = []
    for name in imported_names(source, module):
        imported = part_of(name) if name.split(".")[0] == PACKAGE else None
        if imported in ORDER and ORDER.index(imported) > ORDER.index(importer):
            wrong.append(f"{module} imports {name}: {imported} comes after {importer}")
    return wrong


def part_of(name: str) -> str | None:
    """``loss`` for ``megatron_selfdistill.loss.target``; None for the package itself."""
    parts = name.split(".")
    return parts[1] if len(parts) > 1 else None


def module_of(path: Path) -> str:
    parts = path.relative_to(REPOSITORY).with_suffix("").parts
    # The package's own file stays megatron_selfdistill; a folder's is megatron_selfdistill.folder.__init__,
    # so that one dot in it means the folder.
    return parts[0] if parts == (PACKAGE, "__init__") else ".".join(parts)


def foreign_imports(folder: str, name: str = "*.py") -> dict[str, set[str]]:
    """Third-party packages that each file of a folder of the package imports."""
    found = {}
    for path in sorted((REPOSITORY / PACKAGE / folder).rglob(name)):
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
        ("loss.target", "from megatron_selfdistill import schedule"),
        ("loss.target", "import megatron_selfdistill.train"),
        ("loss.target", "from ..model.build import build"),
        ("loss.__init__", "from ..train import main"),
        ("parallel", "def f():\n    from megatron_selfdistill.train import main"),
        ("helpers", "import torch"),
    ],
)
def test_a_wrong_way_import_is_found(module, source):
    assert len(wrong_way_imports(source, f"{PACKAGE}.{module}")) == 1


def test_a_right_way_import_passes():
    source = "import torch\nfrom .build import f\nfrom ..data import x\nimport megatron_selfdistill.loss.target"
    assert wrong_way_imports(source, f"{PACKAGE}.model.layers") == []


def test_loss_imports_torch_and_triton_only():
    for name, found in foreign_imports("loss").items():
        allowed = FUSED_LINEAR_MAY_IMPORT if name == "fused_linear.py" else LOSS_MAY_IMPORT
        assert found <= allowed, name


def test_loss_imports_nothing_else_of_the_package():
    for path in sorted((REPOSITORY / PACKAGE / "loss").rglob("*.py")):
        names = imported_names(path.read_text(), module_of(path))
        assert {part_of(name) for name in names if name.startswith(f"{PACKAGE}.")} <= {"loss"}, path.name


def test_data_knows_nothing_of_megatron():
    for name, found in foreign_imports("data").items():
        assert found <= DATA_MAY_IMPORT, name


def test_only_parallel_reads_megatrons_parallel_state():
    readers = {
        module_of(path)
        for path in PACKAGE_FILES
        if any("parallel_state" in n.split(".") for n in imported_names(path.read_text(), module_of(path)))
    }
    assert readers <= {f"{PACKAGE}.parallel"}


def test_importing_the_package_imports_neither_torch_nor_megatron():
    code = (
        "import sys, megatron_selfdistill, megatron_selfdistill.config.paths\n"
        "heavy = {'torch', 'numpy', 'megatron', 'transformers', 'hydra'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True)


def test_no_file_is_called_utils():
    nameless = {"utils", "util", "helpers", "common", "misc"}
    assert [path for path in PYTHON_FILES if path.stem in nameless] == []


def test_every_python_file_opens_with_the_licence():
    without = [str(path.relative_to(REPOSITORY)) for path in PYTHON_FILES if not opens_with_licence(path)]
    assert without == []


def opens_with_licence(path: Path) -> bool:
    lines = path.read_text(encoding="utf-8").splitlines()
    return LICENCE in lines[:2]  # the second, below a #! line
