# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The loss's README and the Triton files name the same twins, and their kernels are where the README says."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[3] / "megatron_selfdistill"
LOSS, KERNELS = PACKAGE / "loss", PACKAGE / "kernels"
DOOR = "triton_backend.py"
TABLE = re.findall(r"^\| `(\w+\.py)` \| `?([\w/.]+)`? \| (.*) \|$", (LOSS / "README.md").read_text(), re.MULTILINE)
FILES = sorted(path.name for path in KERNELS.glob("*.py") if path.name not in ("__init__.py", DOOR))


def test_the_readme_lists_every_triton_file_once() -> None:
    assert sorted(name for name, _, _ in TABLE) == FILES


@pytest.mark.parametrize(("name", "twin", "content"), TABLE)
def test_a_triton_file_and_the_readme_name_the_same_twin_and_kernels(name: str, twin: str, content: str) -> None:
    tree = ast.parse((KERNELS / name).read_text())
    assert re.findall(r"^Twin: `?([\w/.]+\w)", ast.get_docstring(tree) or "", re.MULTILINE) == [twin]
    assert twin == "none" or (LOSS / twin).is_file()
    kernels = [node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel")]
    assert re.findall(r"`(\w+)`", content) == kernels


def test_every_formula_that_a_triton_file_quotes_exists_in_its_twin() -> None:
    """`token_statistics._floor`: the first word of a docstring after "Compute" names a function, of this file."""
    for name, twin, _ in TABLE:
        quoted = re.findall(r'"""(?:Compute|Launch the kernel of) `([\w.]+)`', (KERNELS / name).read_text())
        text = (LOSS / twin).read_text() if twin != "none" else ""
        if any(q.startswith("jsd_and_renyi_passes.") for q in quoted):
            text += (LOSS / "sharded" / "jsd_and_renyi_passes.py").read_text()
        missing = [q for q in quoted if f"def {q.split('.')[-1]}(" not in text and q not in OF_THE_DEFINITION]
        assert missing == [], name


OF_THE_DEFINITION = {"mixed_logits", "token_status"}
