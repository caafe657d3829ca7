# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The claims about the Triton kernels: the tests of kernel_claims.py, and the laws of the loss for every backend."""

from __future__ import annotations

import ast
from pathlib import Path

UNIT = Path(__file__).resolve().parents[1] / "unit"


def claims() -> dict[str, Path]:
    """Return claim -> its file.  A process that runs a claim has TRITON_INTERPRET set; see kernel_cases.py."""
    own = UNIT / "kernels" / "kernel_claims.py"
    tests = [
        (file, node)
        for file in (own, *sorted((UNIT / "loss").glob("test_*.py")))
        for node in ast.parse(file.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    ]
    return {
        node.name: file
        for file, node in tests
        if file == own or any("every_backend" in ast.unparse(decorator) for decorator in node.decorator_list)
    }
