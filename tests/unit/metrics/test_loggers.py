# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Every logger gets what the run logs; a logger that fails is dropped, and one that cannot start is refused."""

from __future__ import annotations

import math
from contextlib import closing
from pathlib import Path

import pytest
import recorded_logger
import tiny_run

from megatron_selfdistill.choices import LOGGERS
from megatron_selfdistill.errors import ConfigError
from megatron_selfdistill.metrics import loggers
from megatron_selfdistill.metrics.log import MetricsLog
from megatron_selfdistill.metrics.run_log import read_metrics
from tests.unit.metrics.test_samples import sample

RECORDED, FAILING, LEAVING, NO_START = (
    f"recorded_logger.{name}" for name in ("RecordedLogger", "FailingLogger", "LeavingLogger", "failing_start")
)


def log_of(run_dir: Path, *names: str) -> MetricsLog:
    return MetricsLog(run_dir, num_steps=9, loggers=names, config={"seed": 3}, console_every=0)


def test_a_logger_of_a_dotted_path_gets_everything_in_order(tmp_path):
    with closing(log_of(tmp_path, RECORDED)) as log:
        log.resume(3)
        log.log(4, {"loss/mean": math.inf})
        log.log_samples(4, lambda: [sample("so"), sample("or")])
        log.log_evaluation(4, {"evaluation/greedy_accuracy": 0.5})
    log.close()
    assert tuple(loggers.BUILT_IN) == LOGGERS, "other names are dotted paths"
    assert recorded_logger.calls(tmp_path) == [
        ["init", 3, {"seed": 3}],
        ["scalars", 4, {"loss/mean": math.inf}],
        ["samples", 4, ["so", "or"]],
        ["scalars", 4, {"evaluation/greedy_accuracy": 0.5}],
        ["close"],
    ]


@pytest.mark.parametrize(
    ("name", "fault"),
    [(FAILING, "ConnectionError: the server is gone"), (LEAVING, "ProgramEndError: metrics.loggers=")],
)
def test_a_logger_that_fails_is_dropped_with_one_warning_and_the_others_go_on(tmp_path, caplog, name, fault):
    with closing(log_of(tmp_path, name, RECORDED)) as log:
        log.resume(0)
        for step in (1, 2, 3):
            log.log(step, {"loss/mean": step / 10})
    (record,) = caplog.records
    assert record.getMessage().startswith(f"metrics.loggers: {name} ") and fault in record.getMessage()
    assert [values["step"] for values in read_metrics(tmp_path)] == [1, 2, 3]
    steps = [call[1] for call in recorded_logger.calls(tmp_path) if call[0] == "scalars"]
    assert steps == [1, 1, 2, 3], "step 1 of both loggers, then steps 2 and 3 of the one that works"
    assert [call[0] for call in recorded_logger.calls(tmp_path)].count("close") == 1


def test_a_logger_that_cannot_start_ends_a_new_run_and_not_a_resumed_run(tmp_path, caplog):
    message = f"metrics.loggers: {NO_START} .*ConnectionError: no answer"
    log = log_of(tmp_path, RECORDED, NO_START)
    with pytest.raises(ConfigError, match=message):
        log.resume(0)
    assert recorded_logger.calls(tmp_path)[-1] == ["close"], "the logger that has started is closed"
    with closing(log):
        log.resume(2)
        log.log(3, {"loss/mean": 0.5})
    assert f"{NO_START}: ConnectionError: no answer" in caplog.text
    assert ["scalars", 3, {"loss/mean": 0.5}] in recorded_logger.calls(tmp_path)


@pytest.mark.full
def test_a_logger_that_cannot_start_ends_all_ranks_with_one_message(ranks, data, tmp_path):
    arguments = tiny_run.overrides(data, tmp_path / "run", f"metrics.loggers=[{NO_START}]")
    found = ranks.run(tiny_run.start_and_listen, arguments, world_size=2, init_process_group=False)
    assert [status for status, _ in found] == [2, 2]
    assert sum(output.count("cannot start: ConnectionError: no answer") for _, output in found) == 1
