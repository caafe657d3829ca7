# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The tables of what runs where are the generated ones, and rest on tests and checks that exist."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from scripts import load_script

from tests.gpu import command, stages

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def tool():
    return load_script(REPOSITORY / "tools" / "support_table.py")


@pytest.fixture(scope="module")
def support() -> dict[str, Any]:
    return json.loads((REPOSITORY / "docs" / "support.json").read_text())


def test_readme_and_the_page_have_the_generated_tables(tool):
    assert tool.main(["--check"]) == 0, "run python tools/support_table.py"


def test_what_a_cpu_shows_rests_on_test_files_that_exist(support):
    without = [row["id"] for row in support["rows"] if row["cpu"].startswith(("✅", "refused")) and not row["evidence"]]
    assert without == []
    named = [name for row in support["rows"] for name in row["evidence"]]
    assert [name for name in named if not (REPOSITORY / name).is_file()] == []


def test_every_check_that_a_row_needs_is_one_of_the_commands():
    known = {check for one in stages.chosen(command.parsed(["--gpus", "8"])) for check in one.checks}
    assert set(command.rows_of_checks()) - known == set()
    rows = json.loads((REPOSITORY / "docs" / "support.json").read_text())["rows"]
    assert len({row["id"] for row in rows}) == len(rows)


def test_results_are_those_of_gpus_only():
    path = REPOSITORY / "docs" / "support.jsonl"
    devices = [json.loads(line)["device"] for line in path.read_text().splitlines()] if path.exists() else []
    assert not any(device.startswith("CPU") for device in devices)
