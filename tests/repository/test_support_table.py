# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The tables of what runs where are the generated ones, and a GPU's cell is what its checks have reported."""

from __future__ import annotations

import json
import re
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


def test_a_changed_table_or_sentence_is_found_and_written_again(tool, monkeypatch, tmp_path, capsys):
    readme, page = tmp_path / "README.md", tmp_path / "support.md"
    begin, end = tool.STATUS
    readme.write_text(f"before\nso. {begin}x\n  stale{end}\n{tool.BEGIN}\nstale\n{tool.END}\nafter\n")
    monkeypatch.setattr(tool, "REPOSITORY", tmp_path)
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


def test_the_sentence_about_gpus_follows_the_results(tool, support, monkeypatch):
    monkeypatch.setattr(tool, "PARTS", {"one": "a", "two": "b|c", "NCCL": "d", "vLLM": "e"})
    rows = supporting(ROW | {"levels": [{"covers": "", "checks": ["a", "b", "c", "d", "e"]}]})
    assert tool.gpu_status(rows, {}) == "Nothing has run on a GPU yet."
    results = [result("a"), result("b"), result("d", "FAILURE"), result("e", "skipped")]
    assert tool.gpu_status(rows, tool.last_runs(results)) == (
        "Passed on 1 x H200 (2026-01-02): one. Failed on a GPU: NCCL. Run on a GPU only in part: two. "
        "Never run on a GPU: vLLM."
    )


def test_the_sentence_is_wrapped_where_it_was_wrapped_and_no_line_begins_with_a_mark(tool):
    begin, end = tool.STATUS
    sentence = "Passed: " + "word " * 40 + "end."
    assert tool.with_status(f"| a {begin}old{end} b |\n", sentence) == f"| a {begin}{sentence}{end} b |\n"
    text = tool.with_status(f"above\n- so. {begin}x\n  old{end} after\n", sentence)
    lines = text.splitlines()
    assert lines[1].startswith(f"- so. {begin}Passed: word") and max(map(len, lines)) <= 100
    assert all(line.startswith("  word") for line in lines[2:-1]) and lines[-1].endswith(f"end.{end} after")
    long = tool.with_status(f"{'x ' * 48}y. {begin}x\nold{end}\n", sentence)
    assert long.splitlines()[1].startswith(f"y. {begin}Passed")
    assert tool.with_status(text, sentence) == text and " ".join(text.split()).count("word") == 40


def test_each_part_of_the_sentence_has_checks(tool):
    known = {check for one in stages.chosen(command.parsed(["--gpus", "8"])) for check in one.checks}
    assert {part for part, one in tool.PARTS.items() if not any(re.fullmatch(one, check) for check in known)} == set()


PAGES = [REPOSITORY / name for name in ("README.md", "RELEASING.md", "CONTRIBUTING.md")]
PAGES += sorted(page for page in (REPOSITORY / "docs").rglob("*.md") if page.name != "support.md")
HAVE_STATUS = {"README.md", "quickstart.md", "tuning.md", "gpu.md", "failures.md"}
NEGATIVE = (
    r"(?i)\b(no (?:\w+ ){0,2}(?:run|has)|nothing has|never|(?:has|have) not|not been|not yet|only short|can, also)\b"
)
CLAIMS = {
    "README says that it has not": "",
    "arithmetic that has never been compared with a run on GPUs": "several GPUs (NCCL)",
    "On GPUs this has not been tested yet": "several GPUs (NCCL)",
    "NCCL has not run between trainer and servers": "vLLM",
    "memory of NCCL's connections have not been measured": "several GPUs (NCCL)",
    "What exists on GPUs alone has not": "vLLM",
    "This path has not run on a GPU yet": "",
    "unfused attention have not run on a GPU": "",
    "No sync has been timed on a GPU": "several GPUs (NCCL)",
    "No whole run has been timed on a GPU": "",
    "No GPU has run recipe=opsd_reference for this project": "",
    "few float64 units (L40, RTX); the time has not been measured": "",
}
"""What a page says that no GPU has done -> the part of the sentence that must never have run; "" is no status."""


def test_pages_with_a_status_of_gpus_have_the_one_sentence_and_no_page_says_otherwise(tool, support):
    last = tool.last_runs(tool.read_results(tool.RESULTS))
    sentence = tool.gpu_status(support, last)
    never = sentence.partition("Never run on a GPU: ")[2]
    begin, end = map(re.escape, tool.STATUS)
    said, others = set(), set()
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        if tool.STATUS[0] in text:
            said.add(page.name)
        text = re.sub(rf"{begin}.*?{end}|{re.escape(tool.BEGIN)}.*?{re.escape(tool.END)}", "", text, flags=re.DOTALL)
        for one in re.split(r"(?<=[.|])\s", " ".join(text.split())):
            if re.search(r"\b(GPUs?|H100|NCCL)\b", one) and re.search(NEGATIVE, one):
                others.add(next((claim for claim in CLAIMS if claim in one), f"{page.name}: {one}"))
    assert said == HAVE_STATUS
    assert others == set(CLAIMS), "say it with the marks <!--GPUs--><!--/GPUs-->, or add what follows from a part"
    assert [claim for claim, part in CLAIMS.items() if part not in never] == []
