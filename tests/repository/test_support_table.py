# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The tables of what runs where rest on tests and checks that exist; no tool shows a secret or leaves out a case."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st
from scripts import load_script
from tiers import cover_of

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


def test_without_an_answer_the_script_ends_with_2_and_one_sentence_without_a_secret(monkeypatch, capsys):
    monkeypatch.setenv("PIP_INDEX_URL", "http://user:secret@127.0.0.1:9/simple")
    assert load_script(REPOSITORY / "tools" / "newest_versions.py").main() == 2
    written = capsys.readouterr().err
    assert "does not answer: http://127.0.0.1:9/simple/" in written and written.count("\n") == 1
    assert "secret" not in written


@given(st.sets(st.tuples(*[st.sampled_from("abc")] * 4)), st.integers(1, 5))
def test_what_occurs_together_in_any_cases_occurs_together_in_their_cover(cases, strength):
    def parts(cases):
        size = min(strength, 4)
        return {frozenset(part) for case in cases for part in itertools.combinations(enumerate(case), size)}

    ordered = sorted("".join(case) for case in cases)
    assert parts(cover_of(ordered, strength)) == parts(ordered)
