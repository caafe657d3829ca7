# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The phases of a step on the console: the phase under way, slow phases, and the remaining time."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
import torch
from rich.console import Console

from megatron_selfdistill.config import load
from megatron_selfdistill.metrics import phase_progress
from megatron_selfdistill.metrics.log import MetricsLog, configured_log
from megatron_selfdistill.metrics.phases import Phases


def console(*, terminal: bool) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=100)


def text_of(output: Console) -> str:
    return str(output.file.getvalue())  # type: ignore[attr-defined]


@contextmanager
def shown(tmp_path: Path, output: Console, done: int = 0) -> Iterator[tuple[MetricsLog, Phases]]:
    """Yield a log of a run of 9 steps, which resumes after ``done`` steps, and the phases that it shows."""
    phases = Phases(torch.device("cpu"))
    with closing(MetricsLog(tmp_path, num_steps=9, output=output)) as log:
        log.show_phases(phases)
        log.resume(done)
        yield log, phases


@pytest.fixture
def wait(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Stop the clock of the progress; what is returned moves it on."""
    now = [1000.0]
    monkeypatch.setattr(phase_progress.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(phase_progress, "_TICK_SECONDS", 1e6)  # the tests tick
    return lambda seconds: now.__setitem__(0, now[0] + seconds)


def tick(log: MetricsLog) -> None:
    assert log._console is not None
    log._console.slow_phases.tick()


@pytest.mark.parametrize("terminal", [False, True])
def test_a_slow_phase_gets_one_line_per_minute(tmp_path, wait, terminal):
    output = console(terminal=terminal)
    with shown(tmp_path, output, done=2) as (log, phases):
        with phases("rollout"):
            for second in range(1, 131):
                wait(1)
                phases.counted(second // 10, 64, "")
                tick(log)
        for _ in range(30):  # quick phases
            with phases("train"):
                wait(59)
                tick(log)
        wait(600)
        tick(log)  # between two phases
    assert text_of(output).splitlines() == [
        "step 3: rollout, 6 of 64 responses, 1:00",
        "step 3: rollout, 12 of 64 responses, 2:00",
    ]


def test_a_phase_that_raises_ends_on_the_console_too_and_has_no_time(tmp_path, wait):
    output = console(terminal=False)
    with pytest.raises(ValueError, match="in the loss"), shown(tmp_path, output) as (log, phases):
        with pytest.raises(RuntimeError, match="in the engine"), phases("evaluation"), phases("rollout"):
            raise RuntimeError("in the engine")
        phases.counted(1, 2, "")  # too late: no phase is under way
        wait(100)
        tick(log)
        log.message("goes on")
        with phases("train"):
            raise ValueError("in the loss")
    assert text_of(output) == "goes on\n"
    assert {key for key in phases.metrics() if "seconds" in key} == {"seconds/step"}
    assert not any(thread.name == "slow phases" for thread in threading.enumerate())


def test_ranks_that_do_not_report_show_nothing(tmp_path, capsys):
    phases, config = Phases(torch.device("cpu")), load([f"run_dir={tmp_path / 'run'}"])
    with closing(configured_log(config, phases, enabled=False)) as log:
        log.resume(0)
        with phases("rollout"):
            phases.counted(1, 2, "")
        assert phases.listener is None
    assert capsys.readouterr().out == "" and not (tmp_path / "run").exists()
    with closing(configured_log(config, phases, enabled=True)):
        assert isinstance(phases.listener, phase_progress.PhaseProgress)


def test_the_thread_ticks_until_the_log_is_closed(tmp_path, monkeypatch):
    monkeypatch.setattr(phase_progress, "_TICK_SECONDS", 0.001)
    monkeypatch.setattr(phase_progress, "LINE_SECONDS", 0.0)
    printed = threading.Event()
    output = console(terminal=False)
    monkeypatch.setattr(output, "print", lambda *_, **__: printed.set())
    with shown(tmp_path, output) as (_, phases), phases("rollout"):
        assert printed.wait(20)
        assert any(thread.name == "slow phases" for thread in threading.enumerate())
    assert not any(thread.name == "slow phases" for thread in threading.enumerate())
