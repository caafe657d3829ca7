# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Tests that read a clock have the mark timing, and one that fails runs once more and is counted."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator

import pytest
from tiny_run import REPOSITORY

MARK = "pytest.mark.timing"
CLOCK = re.compile(r"time\.(monotonic|perf_counter|time|process_time)\(\)")
DIRECTORIES = ("unit", "runs", "distributed", "learning", "repository")
TESTS = """
import pathlib, pytest
pytestmark = pytest.mark.timing

def fails_the_first(times, name):
    file = pathlib.Path(__file__).with_name(name)
    count = int(file.read_text()) if file.exists() else 0
    file.write_text(str(count + 1))
    assert count >= times

def test_passing(): fails_the_first(0, "passing")
def test_slow_once(): fails_the_first(1, "once")
def test_slow_always(): fails_the_first(FAILURES, "always")
"""


def clock_asserting_tests() -> Iterator[tuple[str, bool]]:
    """Yield each test function that asserts on a clock, and whether it or its file has the mark."""
    for file in (
        path for directory in DIRECTORIES for path in sorted((REPOSITORY / "tests" / directory).rglob("*.py"))
    ):
        tree = ast.parse(file.read_text(encoding="utf-8"))
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


def test_make_test_leaves_the_marked_tests_to_a_target_of_their_own():
    options = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    assert "-m 'not full and not timing'" in options and "tools/timing_tests.py" in makefile
    assert "make test-timing" in (REPOSITORY / ".ci" / "run").read_text(encoding="utf-8")


@pytest.mark.parametrize(("failures", "status"), [(1, 0), (2, 1)], ids=["passes the second time", "fails twice"])
def test_a_test_that_fails_runs_once_more_and_is_counted(tmp_path, failures, status):
    (tmp_path / "test_clock.py").write_text(TESTS.replace("FAILURES", str(failures)))
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = timing\n")
    counts = tmp_path / "counts"
    done = subprocess.run(
        [sys.executable, str(REPOSITORY / "tools" / "timing_tests.py"), "test_clock.py"],
        cwd=tmp_path,
        env=os.environ | {"SELFDISTILL_RERUNS": str(counts), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == status, done.stdout + done.stderr
    assert counts.read_text() == "2\n" and "[timing] 2 tests ran once more" in done.stdout
    assert [(tmp_path / name).read_text() for name in ("passing", "once", "always")] == ["1", "2", "2"]
