# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""README's table of what runs where is the generated one, and a GPU's cell is what its checks have reported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from gpu import command, stages
from scripts import load_script

REPOSITORY = Path(__file__).resolve().parent.parent
ROW = {"id": "r", "claim": "it works", "cpu": "✅", "gpu_note": "", "levels": [{"covers": "", "checks": ["a", "b"]}]}


@pytest.fixture(scope="module")
def tool():
    return load_script(REPOSITORY / "tools" / "support_table.py")


def result(check: str, verdict: str = "ok", run: str = "2026-01-02T03:04:05+00:00") -> dict[str, Any]:
    return {"check": check, "verdict": verdict, "run": run, "date": run[:10], "device": "1 x H200", "commit": "abc"}


def test_readme_has_the_generated_table(tool):
    assert tool.main(["--check"]) == 0, "run python tools/support_table.py"


def test_without_a_run_on_a_gpu_nothing_is_claimed_of_one(tool):
    rows = json.loads(tool.ROWS.read_text())["rows"]
    cells = [line.split("|")[3].strip() for line in tool.table(rows, []).splitlines()[4:]]
    assert len(cells) == len(rows) > 30 and all(cell.startswith("⚪") for cell in cells)


@pytest.mark.parametrize(
    ("results", "cell"),
    [
        ([], "⚪"),
        ([result("a")], "⚪"),
        ([result("a"), result("b", "skipped")], "⚪"),
        ([result("a"), result("b")], "🟢 1 x H200, 2026-01-02"),
        ([result("a"), result("a", "FAILURE"), result("b")], "🔴 a (1 x H200, 2026-01-02)"),
        ([result("a", "FAILURE"), result("b"), result("a", run="2026-02-02T00:00:00")], "🟢 1 x H200, 2026-01-02"),
        ([result("a"), result("b"), result("b", "FAILURE", "2026-02-02T00:00:00")], "🔴 b (1 x H200, 2026-02-02)"),
        ([result("a"), result("b"), result("b", "skipped", "2026-02-02T00:00:00")], "🟢 1 x H200, 2026-01-02"),
    ],
)
def test_a_row_is_green_only_where_the_last_run_of_all_its_checks_has_passed(tool, results, cell):
    assert tool.table([ROW], results).splitlines()[-1] == f"| it works | ✅ | {cell} |"


def test_the_strongest_level_that_has_passed_is_shown_with_what_it_covers(tool):
    levels = [{"covers": "one GPU", "checks": ["a"]}, {"covers": "eight GPUs", "checks": ["a", "b"]}]
    row = ROW | {"levels": levels, "gpu_note": "(a note)"}
    assert tool.gpu_cell(row, tool.last_runs([result("a")])) == "🟢 1 x H200, 2026-01-02: one GPU (a note)"
    assert tool.gpu_cell(row, tool.last_runs([result("a"), result("b")])).endswith(": eight GPUs (a note)")


def test_every_check_that_a_row_needs_is_one_of_the_commands():
    known = {check for one in stages.chosen(command.parsed(["--gpus", "8"])) for check in one.checks}
    assert set(command.rows_of_checks()) - known == set()
    rows = json.loads((REPOSITORY / "docs" / "support.json").read_text())["rows"]
    assert len({row["id"] for row in rows}) == len(rows)


def test_results_are_those_of_gpus_only():
    path = REPOSITORY / "docs" / "support.jsonl"
    devices = [json.loads(line)["device"] for line in path.read_text().splitlines()] if path.exists() else []
    assert not any(device.startswith("CPU") for device in devices)
