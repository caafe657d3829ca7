# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The tables of the pages are those of the recorded results of experiments/."""

from __future__ import annotations

import json
import re
import runpy
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
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


@pytest.mark.parametrize("script", PAGES)
def test_the_tables_of_a_page_are_those_of_the_recorded_results(script, monkeypatch):
    """The script runs in this process, because a process of its own would import torch for seconds."""
    page = (REPOSITORY / "docs" / PAGES[script]).read_text(encoding="utf-8")
    assert re.findall(r"^<!-- table (\w+) -->$", page, re.MULTILINE)
    path = REPOSITORY / "experiments" / script
    monkeypatch.setattr(sys, "path", [str(path.parent), *sys.path])
    monkeypatch.setattr(sys, "argv", [str(path), "--check"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(path), run_name="__main__")
    assert not end.value.code, f"the tables of docs/{PAGES[script]} differ from the recorded results"


def test_no_recorded_run_beside_controls_has_a_base_that_guesses():
    """A base whose pretraining has failed has an entropy of 3 nats per token, and one that knows its task below 1."""
    lines = (REPOSITORY / "experiments" / "results" / "control_map.jsonl").read_text(encoding="utf-8").splitlines()
    assert max(max(json.loads(line)["entropy"]) for line in lines) < 2
