# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Tests that assert on a clock have the mark timing, so that a busy machine does not fail `make test`."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from tiny_run import REPOSITORY

MARK = "pytest.mark.timing"
CLOCK = re.compile(r"time\.(monotonic|perf_counter|time|process_time)\(\)")
DIRECTORIES = ("unit", "runs", "distributed", "learning", "repository")


def clock_asserting_tests() -> Iterator[tuple[str, bool]]:
    """Yield each test function that asserts on a clock, and whether it or its file has the mark."""
    for file in (
        path for directory in DIRECTORIES for path in sorted((REPOSITORY / "tests" / directory).rglob("*.py"))
    ):
        text = file.read_text(encoding="utf-8")
        tree = ast.parse(text if CLOCK.search(text) else "")
        marked = any(isinstance(node, ast.Assign) and MARK in ast.unparse(node) for node in tree.body)
        for function in (node for node in tree.body if isinstance(node, ast.FunctionDef)):
            own = any(MARK in ast.unparse(decorator) for decorator in function.decorator_list)
            asserts = (node for node in ast.walk(function) if isinstance(node, ast.Assert))
            if function.name.startswith("test_") and any(CLOCK.search(ast.unparse(one)) for one in asserts):
                yield f"{file.name}::{function.name}", marked or own


def test_a_test_that_asserts_on_a_clock_has_the_mark():
    found = dict(clock_asserting_tests())
    assert len(found) >= 10
    assert [name for name, is_marked in found.items() if not is_marked] == []
