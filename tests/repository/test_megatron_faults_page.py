# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The page about Megatron Core's silent faults quotes refusals that exist and names tests that exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from megatron_selfdistill.architectures import attention_variants, flash_sinks
from megatron_selfdistill.model import fused_kernels, known_faults

REPOSITORY = Path(__file__).resolve().parents[2]
PAGE = (REPOSITORY / "docs" / "megatron.md").read_text(encoding="utf-8")


def functions_of(path: str) -> set[str]:
    tree = ast.parse((REPOSITORY / path).read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def sentences() -> str:
    """Return all strings of the files whose faults are refused; the parser has already joined adjacent strings."""
    files = (Path(module.__file__) for module in (known_faults, attention_variants, flash_sinks, fused_kernels))
    nodes = (node for file in files for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))))
    return "\n".join(node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str))


def test_every_test_that_the_page_names_exists():
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", PAGE)
    assert len(named) > 10
    assert [f"{path}::{name}" for path, name in named if name not in functions_of(path)] == []


def test_every_refusal_that_the_page_quotes_is_one():
    quoted = re.findall(r'refused: "([^"]+)"', PAGE)
    assert len(quoted) > 8
    known = sentences()
    assert [quote for quote in quoted if quote not in known] == []
