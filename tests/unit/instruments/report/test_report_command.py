# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The report that a run writes of itself: in another process, never in the way of the run."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from types import SimpleNamespace

from reported_runs import write_run
from tiny_run import REPOSITORY

from megatron_selfdistill.instruments.report import report_command
from megatron_selfdistill.instruments.report.report_command import ReportRefresh


def test_a_report_that_is_slow_holds_up_neither_the_next_one_nor_the_end(tmp_path, monkeypatch, caplog):
    started, waits = [], []

    def wait(seconds):
        waits.append(seconds)
        raise subprocess.TimeoutExpired("report", seconds)

    def slow(command, **options):
        started.append(options["env"]["PYTHONPATH"].split(os.pathsep)[0])
        return SimpleNamespace(poll=lambda: None, wait=wait)

    monkeypatch.setattr(report_command.subprocess, "Popen", slow)
    writer = ReportRefresh(tmp_path)
    writer.start()
    writer.start()
    with caplog.at_level(logging.WARNING):
        writer.finish(seconds=3)
    assert started == [str(REPOSITORY)], "one process, which imports the package of the run"
    assert set(waits) == {3} and "is not written after 3 s" in caplog.text


def test_a_report_that_fails_says_why_and_stops_nobody(tmp_path, monkeypatch, capfd, caplog):
    ReportRefresh(tmp_path / "no run").finish()
    assert "which has neither metrics.jsonl" in capfd.readouterr().err
    monkeypatch.setattr(sys, "executable", str(tmp_path / "no python"))
    with caplog.at_level(logging.WARNING):
        ReportRefresh(tmp_path).finish()
    assert "No such file or directory" in caplog.text


def test_the_process_imports_neither_torch_nor_numpy(tmp_path):
    run_dir = write_run(tmp_path / "run", 10)
    code = (
        "import sys\nfrom megatron_selfdistill.instruments.report.report_command import main\nmain(sys.argv[1:])\n"
        "sys.exit(repr({'torch', 'numpy', 'megatron', 'hydra', 'matplotlib'} & set(sys.modules) or ''))"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code, str(run_dir)], capture_output=True, text=True, env=environment)
    assert done.stderr.strip() == "''" and (run_dir / "report.html").is_file()
