# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The scripts of experiments/ start, and the tables of the pages are those of the recorded results."""

from __future__ import annotations

import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
EXPERIMENTS = REPOSITORY / "experiments"
SCRIPTS = [
    f"{path.relative_to(EXPERIMENTS)}"
    for path in sorted(EXPERIMENTS.rglob("*.py"))
    if "__main__" in path.read_text(encoding="utf-8")
]
PAGES = {
    "adapter_map.py": "adapters.md",
    "anchored_tables.py": "results.md",
    "false_alarms.py": "report.md",
    "hint_levels.py": "evaluation.md",
    "quests.py": "environments.md",
    "real_map.py": "real_model.md",
    "recipe_table.py": "recipes/comparison.md",
    "staleness.py": "benchmarks.md",
    "two_teachers.py": "teachers.md",
}
"""Script -> the page whose tables it writes from a file of experiments/results/."""


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[[str, str], tuple[int, str]]:
    """Return a function that runs a script with one option as the main module; it gives the status and the output.

    The script runs in this process, because a process of its own would import torch and Megatron Core for seconds.
    """

    def run(script: str, option: str) -> tuple[int, str]:
        path = EXPERIMENTS / script
        monkeypatch.setattr(sys, "path", [str(path.parent), *sys.path])
        monkeypatch.setattr(sys, "argv", [str(path), option])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(path), run_name="__main__")
        output, error = capsys.readouterr()
        return int(end.value.code or 0), output + error

    return run


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_experiment_starts(script, run):
    status, output = run(script, "--help")
    assert status == 0 and output.startswith(f"usage: {Path(script).name} "), output


@pytest.mark.parametrize("script", PAGES)
def test_the_tables_of_a_page_are_those_of_the_recorded_results(script, run):
    page = (REPOSITORY / "docs" / PAGES[script]).read_text(encoding="utf-8")
    assert re.findall(r"^<!-- table (\w+) -->$", page, re.MULTILINE)
    status, output = run(script, "--check")
    assert status == 0, output or f"the tables of docs/{PAGES[script]} differ from the recorded results"
