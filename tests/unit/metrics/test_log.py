# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Each step is logged once, in files and on the console, also after a resume and where the directory is gone."""

from __future__ import annotations

import json
import math
import re
import shutil
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from megatron_selfdistill.evaluation.evaluation_result import Transcript
from megatron_selfdistill.metrics.log import MetricsLog
from megatron_selfdistill.metrics.run_log import EventLog, read_evaluation_samples, read_events, read_metrics

TENSORBOARD = ["tensorboard"]


def log_steps(run_dir: Path, steps: range, done: int, **options: Any) -> None:
    options = {"console_every": 0, "num_steps": 9} | options
    with closing(MetricsLog(run_dir, **options)) as log:
        log.resume(done)
        for step in steps:
            log.log(step, {"loss/mean": step / 10, "response/length_mean": 22.0})


def test_numbers_that_json_lacks_come_back(tmp_path):
    with closing(MetricsLog(tmp_path, num_steps=3, console_every=0)) as log:
        log.resume(0)
        log.log(1, {"loss/mean": math.nan, "gradient_norm": math.inf, "k/mean": -math.inf, "lr": 1e-4})
    line = (tmp_path / "metrics.jsonl").read_text()
    json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    (values,) = read_metrics(tmp_path)
    assert math.isnan(values["loss/mean"]) and values["gradient_norm"] == math.inf
    assert values["k/mean"] == -math.inf and values["lr"] == 1e-4 and values["step"] == 1


def test_a_resumed_run_logs_no_step_twice_and_a_run_that_starts_again_forgets_everything(tmp_path):
    log_steps(tmp_path, range(1, 6), done=0)  # killed after step 5; the checkpoint is of step 3
    log_steps(tmp_path, range(4, 9), done=3)
    assert [values["step"] for values in read_metrics(tmp_path)] == list(range(1, 9))
    log_steps(tmp_path, range(1), done=0)
    assert [values["step"] for values in read_metrics(tmp_path)] == [0]


def test_a_resumed_run_has_the_responses_of_no_evaluation_twice(tmp_path):
    answer = vars(Transcript("", None, "a prompt", "a response", correct=True, length=3, truncated=False))
    for done, steps in ((0, (2, 4)), (3, (4, 6))):  # killed after step 4; the checkpoint is of step 3
        with closing(MetricsLog(tmp_path, num_steps=8, loggers=[], console_every=0)) as log:
            log.resume(done)
            for step in steps:
                log.log_evaluation_samples(step, [answer | {"problem_id": name} for name in "ab"])
    kept = [(record["step"], record["problem_id"]) for record in read_evaluation_samples(tmp_path)]
    assert kept == [(step, name) for step in (2, 4, 6) for name in "ab"]


@pytest.mark.parametrize("missing", [1, 7])
def test_a_line_cut_short_by_a_kill_is_dropped(tmp_path, missing):
    log_steps(tmp_path, range(1, 4), done=0)
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text()[:-missing])
    assert [values["step"] for values in read_metrics(tmp_path)] == [1, 2]
    log_steps(tmp_path, range(4, 5), done=3)
    assert [values["step"] for values in read_metrics(tmp_path)] == [1, 2, 4]


def test_only_the_reporter_writes(tmp_path):
    log_steps(tmp_path / "run", range(3), done=0, enabled=False, loggers=TENSORBOARD, console_every=1)
    assert not (tmp_path / "run").exists()
    EventLog(tmp_path, enabled=False).record(0, "started")
    assert read_events(tmp_path) == []


def test_tensorboard_shows_each_step_once_after_a_resume(tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    seconds, now = iter(range(100)), time.time()
    monkeypatch.setattr(time, "time", lambda: now + next(seconds))  # event files are named by the second
    log_steps(tmp_path, range(1, 6), done=0, loggers=TENSORBOARD)
    log_steps(tmp_path, range(4, 8), done=3, loggers=TENSORBOARD)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("loss/mean")
    assert [event.step for event in events] == list(range(1, 8))


def test_a_log_goes_on_where_the_directory_is_deleted(tmp_path):
    with closing(MetricsLog(tmp_path / "run", num_steps=9, console_every=0)) as log:
        log.resume(0)
        for step in range(1, 6):
            if step == 4:
                shutil.rmtree(tmp_path / "run")
            log.log(step, {"loss/mean": step / 10})
    assert [values["step"] for values in read_metrics(tmp_path / "run")] == [4, 5]


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


def test_an_event_that_cannot_be_written_is_a_warning_and_a_directory_of_its_name_has_no_records(tmp_path, caplog):
    EventLog(tmp_path / "gone").record(7, "saved")
    assert "the event saved of step 7" in caplog.text
    (tmp_path / "events.jsonl").mkdir()
    assert read_events(tmp_path) == []
