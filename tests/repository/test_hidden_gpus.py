# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""On a machine with GPUs only tests that are marked ``gpu`` see them, in their own processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
PROBES = """
import os, subprocess, sys
import pytest

def seen():
    code = "import os; print(repr(os.environ.get('CUDA_VISIBLE_DEVICES')))"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip()
    return f"{os.environ.get('CUDA_VISIBLE_DEVICES')!r} {child}"

@pytest.fixture(scope="module")
def module():
    return seen()

def test_before():
    print("before:", seen())

@pytest.mark.gpu
def test_marked(module):
    print("marked:", seen(), "fixture:", module)

def test_after():
    print("after:", seen())
"""
TWO_GPUS = "import hidden_gpus\nhidden_gpus.number = lambda visible: len(visible.split(',')) if visible else 0\n"


def probed(directory: Path, **environment: str) -> str:
    """Return what the probes print in a pytest of their own with this project's conftest.py, on a pretended machine."""
    (directory / "test_probes.py").write_text(PROBES)
    (directory / "pretended.py").write_text(TWO_GPUS)
    paths = os.pathsep.join([str(directory), str(TESTS / "support"), str(TESTS.parent)])
    command = [sys.executable, "-m", "pytest", "-q", "-s", "-p", "pretended", "-p", "tests.conftest"]
    command += [
        "-c",
        str(TESTS.parent / "pyproject.toml"),
        "--rootdir",
        str(directory),
        str(directory / "test_probes.py"),
    ]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("CUDA_V", "SELFDISTILL_"))}
    environment = inherited | {"PYTHONPATH": paths, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"} | environment
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, cwd=directory)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_only_marked_tests_and_their_fixtures_and_children_see_the_gpus(tmp_path):
    output = probed(tmp_path, CUDA_VISIBLE_DEVICES="0,1")
    assert "before: '' ''" in output and "after: '' ''" in output, output
    assert "marked: '0,1' '0,1' fixture: '0,1' '0,1'" in output, output


def test_without_a_gpu_marked_tests_are_skipped(tmp_path):
    output = probed(tmp_path)
    assert "before: '' ''" in output and "marked" not in output and "1 skipped" in output, output


def test_a_pytest_that_a_gpu_test_starts_sees_the_gpus_itself(tmp_path):
    output = probed(tmp_path, CUDA_VISIBLE_DEVICES="1", SELFDISTILL_TEST_GPU="1")
    assert "before: '1' '1'" in output and "marked: '1' '1'" in output, output
