# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Pages of explored responses are written beside their files, linked from the report, and never from private runs."""

from __future__ import annotations

import pytest
from explored_records import Words, logit_rows, record_of
from reported_runs import blocks_of, write_run

from megatron_selfdistill.instruments.explorer.target_page import (
    target_page,
    write_explored,
)
from megatron_selfdistill.instruments.report.run_report import write_report
from megatron_selfdistill.loss import Target


@pytest.fixture(scope="module")
def record() -> dict:
    return record_of(logit_rows(70, 300, 2), Target(anchor="student"), step=10)


def test_a_page_holds_the_record_in_blocks_and_no_text_as_markup(record):
    page = target_page(record)
    blocks = blocks_of(page)
    assert [name for name in blocks if name.startswith("block-")] == ["block-0", "block-1"]
    assert [blocks["block-0"], blocks["block-1"]] == record["blocks"]
    assert blocks["overview"]["tokens"] == record["tokens"] and "blocks" not in blocks["overview"]
    assert Words.NASTY[0] in record["tokens"]["text"] and "document.title" not in page


TURN = {"episode": 0, "turn": 0, "reward": 0.5, "hint": "north", "reply": None}


@pytest.mark.full
def test_the_report_links_the_pages_of_its_runs_does_not_hold_them_and_names_the_turns_of_an_episode(record, tmp_path):
    run_dir = write_run(tmp_path / "runs with spaces" / "first")
    without = write_report([run_dir]).stat().st_size
    turns = [record | TURN | {"turn": turn} for turn in range(11)]
    write_explored(run_dir, 10, [*turns, record | TURN | {"problem_id": "other"}, record])
    report = write_report([run_dir])
    assert report.stat().st_size < without + 2000
    (links,) = blocks_of(report.read_text())["overview"]["explored"]
    places = [(link["sample"], link.get("turn")) for link in links]
    assert places == [*((1, turn) for turn in range(1, 12)), (2, 1), (3, None)]
    assert links[1]["href"] == "explored/step_0000010_1_turn_2.html"
    shown = blocks_of((run_dir / links[1]["href"]).read_text())["overview"]
    assert {name: shown[name] for name in TURN} == TURN | {"turn": 1}
    elsewhere = write_report([run_dir], tmp_path / "all.html")
    href = blocks_of(elsewhere.read_text())["overview"]["explored"][0][-1]["href"]
    assert href == "runs%20with%20spaces/first/explored/step_0000010_3.html"


def test_a_run_that_must_not_show_contents_has_no_pages(record, tmp_path):
    run_dir = write_run(tmp_path / "private", 30, "data.kind=conversations", "conversations.show_contents=false")
    write_explored(run_dir, 10, [record])
    assert blocks_of(write_report([run_dir]).read_text())["overview"]["explored"] is None
    assert not list((run_dir / "explored").glob("*.html"))
