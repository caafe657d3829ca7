# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The scripts of experiments/ start, and the tables of the pages are those of the recorded results."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
EXPERIMENTS = REPOSITORY / "experiments"
SCRIPTS = [path.name for path in sorted(EXPERIMENTS.glob("*.py")) if "__main__" in path.read_text(encoding="utf-8")]
PAGES = {
    "adapter_map.py": "adapters.md",
    "anchored_tables.py": "anchored.md",
    "recipe_table.py": "recipes/comparison.md",
    "staleness.py": "benchmarks.md",
}
"""Script -> the page whose tables it writes from a file of experiments/results/."""


def run(script: str, option: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(EXPERIMENTS / script), option]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_experiment_starts(script):
    done = run(script, "--help")
    assert done.returncode == 0 and done.stdout.startswith(f"usage: {script} "), done.stderr


@pytest.mark.parametrize("script", PAGES)
def test_the_tables_of_a_page_are_those_of_the_recorded_results(script):
    page = (REPOSITORY / "docs" / PAGES[script]).read_text(encoding="utf-8")
    assert re.findall(r"^<!-- table (\w+) -->$", page, re.MULTILINE)
    done = run(script, "--check")
    assert done.returncode == 0, done.stderr or f"the tables of docs/{PAGES[script]} differ from the recorded results"
