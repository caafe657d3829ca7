# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""events.jsonl: what a line holds, what stays secret, and that an event never stops a run."""

from __future__ import annotations

import logging
import re

from megatron_selfdistill.metrics.run_log import EventLog, read_events


def test_an_event_has_time_step_and_details_and_a_resumed_run_appends(tmp_path):
    EventLog(tmp_path).record(0, "started", versions={"torch": "2.13"})
    EventLog(tmp_path).record(3, "stopped", reason="SIGTERM")
    with (tmp_path / "events.jsonl").open("a") as file:
        file.write('{"time": "2026')  # killed here
    first, second = read_events(tmp_path)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", first.pop("time"))
    assert first == {"step": 0, "event": "started", "versions": {"torch": "2.13"}}
    assert (second["step"], second["event"], second["reason"]) == (3, "stopped", "SIGTERM")
    EventLog(tmp_path).record(3, "started")
    assert [event["event"] for event in read_events(tmp_path)] == ["started", "stopped", "started"]


def test_an_event_that_cannot_be_written_is_a_warning(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        EventLog(tmp_path / "gone").record(7, "saved")
    assert "the event saved of step 7 is not in" in caplog.text


def test_a_rank_that_is_not_the_reporter_writes_nothing(tmp_path):
    EventLog(tmp_path, enabled=False).record(0, "started")
    assert read_events(tmp_path) == []


def test_a_file_of_records_that_is_no_regular_file_has_no_records(tmp_path):
    (tmp_path / "events.jsonl").mkdir()
    assert read_events(tmp_path) == []
