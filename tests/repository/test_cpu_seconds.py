# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""A file that computes too long is a warning, as are all files together; with a limit it fails the session."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import cpu_seconds
import pytest

pytestmark = pytest.mark.timing

SUPPORT = Path(cpu_seconds.__file__).resolve().parent
BURN = "import time\nend = time.process_time() + 1.0\nwhile time.process_time() < end: pass\n"
FILES = {
    "test_waiting.py": "import time\ndef test_waiting(): time.sleep(0.7)\n",
    "test_computing.py": "import subprocess, sys\n"
    f"def test_a_child_computes(): subprocess.run([sys.executable, '-c', {BURN!r}])\n",
    "test_full.py": f"import pytest\n@pytest.mark.full\ndef test_full(): exec({BURN!r})\n",
}


def session(directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    (directory / "pytest.ini").write_text(
        "[pytest]\nmarkers =\n    full: minutes\n    timing: clocks\naddopts = -m 'not full and not timing'\n"
    )
    for name, text in FILES.items():
        (directory / name).write_text(text)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "cpu_seconds", *arguments]
    paths = os.pathsep.join([str(SUPPORT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": paths, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # importing all takes 1 s
    for name in ("PYTEST_XDIST_WORKER", "PYTEST_ADDOPTS"):
        environment.pop(name, None)
    return subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(
    "workers",
    [pytest.param([], marks=pytest.mark.full), ["-p", "xdist", "-n", "2", "--dist", "loadfile"]],
    ids=["alone", "xdist"],
)
def test_a_file_whose_child_processes_compute_too_long_fails_the_session(tmp_path, workers):
    done = session(tmp_path, "--file-seconds", "0.3", *workers)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "2 passed" in done.stdout
    messages = [line for line in done.stdout.splitlines() if "CPU seconds, expected at most 0.3" in line]
    assert len(messages) == 1 and messages[0].startswith("ERROR: test_computing.py took "), done.stdout


def test_files_that_together_compute_too_long_fail_the_session(tmp_path):
    done = session(tmp_path, "--file-seconds", "60", "--total-seconds", "0.3")
    assert done.returncode == 1, done.stdout + done.stderr
    messages = [line for line in done.stdout.splitlines() if "CPU seconds, expected at most" in line]
    assert len(messages) == 1 and messages[0].startswith("ERROR: all files together took "), done.stdout


def test_without_a_limit_files_that_compute_too_long_are_a_warning(tmp_path):
    (tmp_path / "conftest.py").write_text("import cpu_seconds\ncpu_seconds.LIMIT_S = cpu_seconds.TOTAL_LIMIT_S = 0.3\n")
    done = session(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "\nWARNING: test_computing.py took " in done.stdout and "ERROR" not in done.stdout, done.stdout
    assert "\nWARNING: all files together took " in done.stdout, done.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ["--file-seconds", "60", "--total-seconds", "60"],
        pytest.param(["--file-seconds", "0.3", "--total-seconds", "0.3", "-m", ""], marks=pytest.mark.full),
    ],
)
def test_a_session_within_the_limits_or_of_all_tests_passes(tmp_path, arguments):
    done = session(tmp_path, *arguments)
    assert done.returncode == 0 and "expected at most" not in done.stdout, done.stdout + done.stderr
    assert re.search(r"^CPU seconds: .*test_computing.py (0\.[3-9]|[1-9])", done.stdout, re.MULTILINE), done.stdout


def test_of_a_server_of_ranks_nothing_but_its_ranks_counts_also_when_it_has_ended():
    server = f"{BURN}print(flush=True)\ninput()  # rank_worker.serve"
    before = cpu_seconds.cpu_seconds()
    process = subprocess.Popen([sys.executable, "-c", server], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"\n"
    assert cpu_seconds.cpu_seconds() - before < 0.5
    process.communicate(b"\n")
    assert cpu_seconds.cpu_seconds() - before < 0.5
