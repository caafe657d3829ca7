# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The tables of what runs where are the generated ones, and a GPU's cell is what its checks have reported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from scripts import load_script

from tests.gpu import command, stages

REPOSITORY = Path(__file__).resolve().parents[2]
ROW = {
    "id": "r",
    "group": "g",
    "claim": "it works",
    "cpu": "✅",
    "evidence": ["tests/test_it.py"],
    "gpu_note": "",
    "levels": [{"covers": "", "checks": ["a", "b"]}],
}


@pytest.fixture(scope="module")
def tool():
    return load_script(REPOSITORY / "tools" / "support_table.py")


def result(check: str, verdict: str = "ok", run: str = "2026-01-02T03:04:05+00:00") -> dict[str, Any]:
    return {"check": check, "verdict": verdict, "run": run, "date": run[:10], "device": "1 x H200", "commit": "abc"}


@pytest.fixture(scope="module")
def support() -> dict[str, Any]:
    return json.loads((REPOSITORY / "docs" / "support.json").read_text())


def supporting(*rows: dict[str, Any]) -> dict[str, Any]:
    return {"groups": [{"id": "g", "claim": "the subject"}], "rows": list(rows)}


def test_readme_and_the_page_have_the_generated_tables(tool):
    assert tool.main(["--check"]) == 0, "run python tools/support_table.py"


def test_a_changed_table_is_found_and_written_again(tool, monkeypatch, tmp_path, capsys):
    readme, page = tmp_path / "README.md", tmp_path / "support.md"
    readme.write_text(f"before\n{tool.BEGIN}\nstale\n{tool.END}\nafter\n")
    monkeypatch.setattr(tool, "README", readme)
    monkeypatch.setattr(tool, "PAGE", page)
    assert tool.main(["--check"]) == 1 and not page.exists()
    assert capsys.readouterr().err.splitlines() == [
        f"{name} differs from what tools/support_table.py writes: run python tools/support_table.py"
        for name in ("README.md", "support.md")
    ]
    assert tool.main([]) == 0 and tool.main(["--check"]) == 0
    assert readme.read_text().startswith("before\n") and "stale" not in readme.read_text()
    page.write_text(page.read_text().replace("✅", "🟢", 1))
    assert tool.main(["--check"]) == 1


def test_readmes_table_fits_on_a_screen(tool, support):
    lines = tool.short_table(support, {}).splitlines()
    rows = [line for line in lines if line.startswith("|")][2:]
    assert 0 < len(rows) <= 14 and max(map(len, lines)) <= 100


def test_every_row_belongs_to_a_group_and_every_group_has_a_row(support):
    groups = [group["id"] for group in support["groups"]]
    assert len(set(groups)) == len(groups) and {row["group"] for row in support["rows"]} == set(groups)


def test_what_a_cpu_shows_rests_on_test_files_that_exist(support):
    without = [row["id"] for row in support["rows"] if row["cpu"].startswith(("✅", "refused")) and not row["evidence"]]
    assert without == []
    named = [name for row in support["rows"] for name in row["evidence"]]
    assert [name for name in named if not (REPOSITORY / name).is_file()] == []


def test_without_a_run_on_a_gpu_nothing_is_claimed_of_one(tool, support):
    cells = [line.split("|")[3].strip() for line in tool.page(support, {}).splitlines() if line.startswith("| ")]
    cells = [cell for cell in cells if cell != "GPU"]
    assert len(cells) == len(support["rows"]) > 30 and all(cell.startswith("⚪") for cell in cells)
    assert "🟢" not in tool.short_table(support, {}).replace(tool.LEGEND, "")


def test_the_page_names_the_evidence_of_a_row_and_no_check_twice(tool):
    levels = [{"covers": "one GPU", "checks": ["a"]}, {"covers": "eight GPUs", "checks": ["a", "b"]}]
    text = tool.page(supporting(ROW | {"levels": levels}, ROW | {"evidence": [], "levels": []}), {})
    assert "- CPU: `tests/test_it.py`\n- GPU (one GPU): a\n- GPU (eight GPUs): the checks above; b\n" in text
    assert "- CPU: no test\n- GPU: no check\n" in text


@pytest.mark.parametrize(
    ("cells", "shown"),
    [
        (["✅", "✅ (imitated)"], "✅"),
        (["✅", "\u2013", "refused"], "✅ 1 of 3"),
        (["⚪", "\u2013"], "⚪"),
        (["✅", "🔴 a check (1 x H200, 2026-01-02)"], "🔴 1 of 2"),
    ],
)
def test_a_groups_cell_counts_its_rows(tool, cells, shown):
    assert tool.short_cell(cells, "✅") == shown


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
    last = tool.last_runs(results)
    assert f"| it works | ✅ | {cell} |" in tool.page(supporting(ROW), last).splitlines()
    mark = cell[0]
    assert f"| the subject | ✅ | {mark} |" in tool.short_table(supporting(ROW), last).splitlines()


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
