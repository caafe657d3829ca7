# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""After the deadline no test begins, the session says how many are left, and each file comes first in its turn."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import deadline

SUPPORT = Path(deadline.__file__).resolve().parent


def session(directory: Path, until: float) -> str:
    """Return what a session of three files with a test each prints."""
    (directory / "pytest.ini").write_text("[pytest]\n")
    for name in "abc":
        (directory / f"test_{name}.py").write_text("def test_one(): pass\n")
    environment = os.environ | {
        "PYTHONPATH": str(SUPPORT),
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "SELFDISTILL_DEADLINE": str(until),
    }
    for name in ("PYTEST_XDIST_WORKER", "PYTEST_ADDOPTS"):
        environment.pop(name, None)
    command = [sys.executable, "-m", "pytest", "-v", "-p", "deadline"]
    done = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_no_test_begins_after_the_deadline_and_the_session_says_how_many_are_left(tmp_path):
    printed = session(tmp_path, time.time() - 1)
    assert "3 skipped" in printed and "passed" not in printed
    assert f"WARNING: 3 tests did not run, since {deadline.REASON}" in printed


def test_before_the_deadline_all_tests_run_and_another_file_comes_first_in_each_session(tmp_path):
    until = int(time.time()) // 3 * 3 + 3000
    firsts = []
    for later in range(3):
        printed = session(tmp_path, until + later)
        assert "3 passed" in printed and "WARNING" not in printed
        firsts.append(next(line.split(".py")[0] for line in printed.splitlines() if "PASSED" in line))
    assert sorted(firsts) == ["test_a", "test_b", "test_c"]
