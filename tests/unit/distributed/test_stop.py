# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""A run that is asked to stop ends at a step boundary, on all ranks alike, with a checkpoint and a marker."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_run
from tiny_run import assert_equal_runs, overrides, reproducible_metrics, saved_step, train

from megatron_selfdistill.distributed import stop
from megatron_selfdistill.distributed.stop import MARKER, SIGNALS, Stop, listening, seconds_left_in_slurm, seconds_of
from megatron_selfdistill.errors import EngineError


def asked(arguments: list[str], at: str, step: int, numbers: list[int], who: list[int]) -> int:
    """Start a run whose ranks ``who`` get signals before the stage ``at`` of `Trainer`, after ``step`` steps."""
    from megatron_selfdistill.trainer import Trainer

    original = getattr(Trainer, at)

    def with_signals(self: Any, *args: Any) -> Any:
        if self.step == step and self.grid.rank in who:
            for number in numbers:
                os.kill(os.getpid(), number)
        return original(self, *args)

    return tiny_run.start_with(arguments, Trainer, at, with_signals)


def failing(arguments: list[str]) -> int:
    """Let the engine fail in step 3, after the end of the job."""
    from megatron_selfdistill.trainer import Trainer

    batches = Trainer.batches

    def fail(self: Any) -> Any:
        if self.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
            raise EngineError("the servers are gone")
        return batches(self)

    return tiny_run.start_with(arguments, Trainer, "batches", fail)


THREE_STEPS = "num_steps=3"


@pytest.fixture(scope="module")
def whole(ranks, data, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("whole") / "run"
    train(ranks, overrides(data, directory, THREE_STEPS), world_size=2)
    return directory


@pytest.mark.parametrize(
    ("at", "numbers", "who"),
    [
        pytest.param("batches", [signal.SIGUSR1], [1], marks=pytest.mark.full),
        ("update", [signal.SIGTERM], [0]),
        pytest.param("pack", [*SIGNALS] * 3, [0, 1], marks=pytest.mark.full),
    ],
    ids=["USR1 to one rank while it generates", "TERM to one rank in an update", "many signals to both ranks"],
)
def test_a_run_that_is_stopped_and_started_again_equals_one_that_never_stopped(
    ranks, data, whole, tmp_path, at, numbers, who
):
    arguments = overrides(data, tmp_path / "run", THREE_STEPS)
    train(ranks, arguments, world_size=2, start=asked, at=at, step=1, numbers=numbers, who=who)
    assert saved_step(tmp_path / "run") == 2, "the step in which the signal comes is finished, and no other begins"
    assert (tmp_path / "run" / MARKER).read_text().startswith("step 2: SIG")
    train(ranks, arguments, world_size=2)
    assert not (tmp_path / "run" / MARKER).exists()
    assert_equal_runs(ranks, whole, tmp_path / "run", num_steps=3)


@pytest.mark.full
@pytest.mark.parametrize(
    ("at", "step", "numbers", "more", "marker"),
    [
        ("save", 1, [*SIGNALS] * 2, "checkpoint.save_every=1", "step 1: SIG"),
        ("update", 0, [signal.SIGINT], "num_steps=6", "step 1: SIGINT\n"),
        ("update", 0, [signal.SIGTERM], "num_steps=1", None),
    ],
    ids=["in a save", "as Ctrl-C does", "in the last step"],
)
def test_a_signal_ends_a_run_after_its_step_with_a_marker_if_steps_are_left(
    ranks, data, tmp_path, at, step, numbers, more, marker
):
    arguments = overrides(data, tmp_path / "run", more)
    train(ranks, arguments, start=asked, at=at, step=step, numbers=numbers, who=[0])
    assert saved_step(tmp_path / "run") == 1
    path = tmp_path / "run" / MARKER
    assert path.read_text().startswith(marker) if marker else not path.exists()


def test_a_signal_before_the_first_step_ends_the_run_without_one(ranks, data, tmp_path):
    evaluated = ["evaluation.at_start=true", f"evaluation.path={data}/problems.jsonl", "evaluation.limit=2"]
    arguments = overrides(data, tmp_path / "run", *evaluated)
    train(ranks, arguments, start=asked, at="evaluate", step=0, numbers=[signal.SIGUSR1], who=[0])
    assert (tmp_path / "run" / MARKER).read_text() == "step 0: SIGUSR1\n"
    assert [line["step"] for line in reproducible_metrics(tmp_path / "run")] == [0]
    assert not list((tmp_path / "run").glob("checkpoints/*")), "there is nothing yet to save"


@pytest.mark.full
def test_an_engine_that_ends_with_the_job_makes_no_failed_run(ranks, data, whole, tmp_path):
    arguments = overrides(data, tmp_path / "run", THREE_STEPS)
    train(ranks, arguments, world_size=2, start=failing)
    assert saved_step(tmp_path / "run") == 2 and (tmp_path / "run" / MARKER).exists()
    train(ranks, arguments, world_size=2)
    assert_equal_runs(ranks, whole, tmp_path / "run", num_steps=3)


@pytest.mark.full
def test_a_time_limit_that_no_step_fits_leads_on_by_one_step_per_launch(ranks, data, tmp_path):
    arguments = overrides(data, tmp_path / "run", "num_steps=2", "stop.time_limit_minutes=0")
    for step in (1, 2):
        train(ranks, arguments)
        assert saved_step(tmp_path / "run") == step
        assert (tmp_path / "run" / MARKER).exists() == (step != 2)


def test_a_time_limit_leaves_room_for_the_longest_step_and_the_margin(tmp_path, monkeypatch):
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    monkeypatch.setattr(stop, "_began", 0.0)
    ending = Stop(tmp_path, SimpleNamespace(is_reporter=True), time_limit_minutes=10, margin_minutes=2)
    late = []
    # The longest step so far takes 120 s, and so does the margin: of 600 s, 360 s are for steps.
    for then in (100.0, 190.0, 200.0, 320.0, 359.0, 361.0):
        now = then
        late.append(ending._is_late())
    assert late == [False] * 5 + [True]


def test_the_end_of_a_slurm_job_comes_from_its_environment_or_from_squeue(tmp_path, monkeypatch):
    monkeypatch.setattr(time, "time", lambda: 900.0)
    assert seconds_left_in_slurm({"SLURM_JOB_END_TIME": "1000"}) == 100
    squeue = tmp_path / "squeue"
    squeue.write_text('#!/bin/sh\n[ "$*" = "--noheader --jobs=7 --format=%L" ] && echo 1:30\n')
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert seconds_left_in_slurm({"SLURM_JOB_ID": "7"}) == 90
    durations = {"2:03": 123, "1:02:03": 3723, "2-00:00:01": 172801, "0:00": 0, "UNLIMITED": None}
    assert [seconds_of(text) for text in durations] == list(durations.values())


def test_signals_are_noted_before_torch_is_imported():
    code = (
        "import os, signal, sys\n"
        "from megatron_selfdistill import config, train; from megatron_selfdistill.distributed import stop\n"
        "def load(*args):\n"
        "    assert 'torch' not in sys.modules\n"
        "    os.kill(os.getpid(), signal.SIGUSR1), os.kill(os.getpid(), signal.SIGTERM)\n"
        "    raise config.ConfigError(f'noted {sorted(stop._received)}')\n"
        "config.load = load\n"
        "sys.exit(train.main([]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2 and "noted [10, 15]" in done.stderr, done.stderr


PRESSES = """
import os, signal, sys, threading, time
from megatron_selfdistill.distributed import stop

def press(*numbers):
    for number in numbers:
        os.kill(os.getpid(), number)

def press_again_and_again():
    while True:
        time.sleep(0.1)
        press(signal.SIGINT)

stop._SAME_PRESS_S = 0.0  # two presses are two, however soon the second one comes
with stop.listening(), stop.interruptible(), stop.at_sudden_end(lambda: print("released", flush=True)):
    {body}
    print("noted", sorted(stop._received))
"""
WAIT_FOR_THE_END = "; time.sleep(600)"


def presses(body: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run ``body`` in a process in which Ctrl-C is handled; the process reports the signals that it has noted."""
    command = [sys.executable, "-c", PRESSES.format(body=body)]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)


def test_the_first_ctrl_c_is_noted_and_the_second_ends_the_process_with_one_line_and_130():
    one = presses("press(signal.SIGINT)")
    assert (one.returncode, one.stdout) == (0, "noted [2]\n")
    assert len(one.stderr.splitlines()) == 1
    two = presses("press(signal.SIGINT, signal.SIGINT)" + WAIT_FOR_THE_END)
    assert (two.returncode, two.stdout) == (stop.EXIT_INTERRUPTED, "released\n")
    assert len(two.stderr.splitlines()) == 2


def test_the_second_ctrl_c_ends_a_process_whose_main_thread_is_in_foreign_code():
    lines = "libc = ctypes.CDLL(None); box = ctypes.create_string_buffer(64); libc.pthread_mutex_init(box, None)"
    body = f"import ctypes; {lines}; libc.pthread_mutex_lock(box)\n    "
    body += "threading.Thread(target=press_again_and_again, daemon=True).start(); libc.pthread_mutex_lock(box)"
    assert presses(body).returncode == stop.EXIT_INTERRUPTED


@pytest.mark.parametrize(
    "body",
    [
        "stop._SAME_PRESS_S = 60.0; press(signal.SIGINT, signal.SIGINT)",
        "child = os.fork()\n    if not child: press(signal.SIGINT); os._exit(0)\n"
        "    os.waitpid(child, 0); press(signal.SIGINT)",
    ],
    ids=["arrives twice", "a forked writer gets it too"],
)
def test_one_press_is_one(body):
    pressed = presses(body)
    assert (pressed.returncode, pressed.stdout) == (0, "noted [2]\n")


def test_term_after_ctrl_c_is_torchruns_second_press_and_no_signal_elsewhere():
    both = "press(signal.SIGINT, signal.SIGTERM)"
    assert presses(both + WAIT_FOR_THE_END, TORCHELASTIC_RUN_ID="x").returncode == stop.EXIT_INTERRUPTED
    assert presses(both).stdout == "noted [2, 15]\n"
    by_slurm = presses(both, TORCHELASTIC_RUN_ID="x", TORCHELASTIC_SIGNALS_TO_HANDLE="SIGINT")
    assert by_slurm.stdout == "noted [2, 15]\n", "torchrun does not hand on TERM there, so it is Slurm's"
    assert presses("press(signal.SIGTERM, signal.SIGTERM)", TORCHELASTIC_RUN_ID="x").stdout == "noted [15]\n"


def test_a_signal_counts_until_the_process_listens_no_more():
    with listening():
        assert not stop.asked()
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.asked()
    assert not stop.asked()
