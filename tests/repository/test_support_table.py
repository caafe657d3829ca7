# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The tables of what runs where are the generated ones, and rest on tests and checks that exist."""

from __future__ import annotations

import json
from pathlib import Path

from scripts import load_script

from tests.gpu import command, stages

REPOSITORY = Path(__file__).resolve().parents[2]


def test_readme_and_the_page_have_the_generated_tables():
    tool = load_script(REPOSITORY / "tools" / "support_table.py")
    assert tool.main(["--check"]) == 0, "run python tools/support_table.py"


def test_every_claim_rests_on_test_files_and_checks_that_exist():
    rows = json.loads((REPOSITORY / "docs" / "support.json").read_text())["rows"]
    assert [row["id"] for row in rows if row["cpu"].startswith(("✅", "refused")) and not row["evidence"]] == []
    named = [name for row in rows for name in row["evidence"]]
    assert [name for name in named if not (REPOSITORY / name).is_file()] == []
    known = {check for one in stages.chosen(command.parsed(["--gpus", "8"])) for check in one.checks}
    assert set(command.rows_of_checks()) - known == set()
