# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Under a real torchrun: each error is printed once and leaves its status, and Ctrl-C saves at the first press."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_run import overrides, saved_step

TESTS = Path(__file__).resolve().parents[1]


LAUNCHER = [sys.executable, "-m", "megatron_selfdistill", "train", "--ranks", "2"]


def torchrun(
    arguments: list[str], script: list[str] | None = None, launcher: list[str] | None = None
) -> subprocess.Popen[str]:
    """Start two ranks of the run with torchrun, or with ``launcher``."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(TESTS / "support"), str(TESTS.parent), str(TESTS.parent / "examples")]),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo",
    }
    if launcher is None:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        launcher += script or ["-m", "megatron_selfdistill.train"]
    command = launcher + arguments
    # A group of its own: Ctrl-C in a terminal reaches torchrun, whose ranks are in sessions of their own.
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)


def failed(arguments: list[str], script: list[str] | None = None) -> str:
    """Launch two ranks that fail; return the standard error of the ranks and of torchrun."""
    process = torchrun(arguments, script)
    _, output = process.communicate(timeout=200)
    assert process.returncode == 1, output
    return output


def lines_of_ranks(output: str) -> list[str]:
    return [line for line in output.splitlines() if line.startswith("[rank ")]


def assert_reported_once(output: str, ranks: str, words: str, statuses: int = 2) -> None:
    """Assert that one of ``ranks``, a set of digits, has printed ``words``, and that all ranks end with status 2."""
    (line,) = lines_of_ranks(output)
    assert re.match(rf"\[rank [{ranks}]\] ", line) and words in line
    report = output.split("FAILED")[-1]
    assert report.count("exitcode  : 2 ") == report.count("exitcode  : ") == statuses, report


@pytest.mark.full
def test_an_error_that_all_ranks_have_is_said_once(data, tmp_path):
    (tmp_path / "bad" / "iter_0000001").mkdir(parents=True)
    output = failed(overrides(data, tmp_path / "run", f"checkpoint.load={tmp_path}/bad/iter_0000001"))
    assert_reported_once(output, "01", "bad/iter_0000001")


@pytest.mark.timing
@pytest.mark.full
def test_an_error_that_only_rank_1_has_is_said_by_it_and_releases_rank_0(data, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys\n"
        "from megatron_selfdistill import train\n"
        "from megatron_selfdistill.data.run_data import RunData\n"
        "def load(config):\n"
        "    raise train.ConfigError('only here')\n"
        "if os.environ['RANK'] == '1': RunData.load = load\n"
        "if __name__ == '__main__':\n"
        "    train.stop.ignore_signals()\n"
        "    sys.exit(train.main(sys.argv[1:]))\n"
    )
    began = time.monotonic()
    output = failed(overrides(data, tmp_path / "run"), [str(script)])
    assert_reported_once(output, "1", "only here")
    assert time.monotonic() - began < 100 and not (tmp_path / "run").exists()


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 150
    while not path.exists() or not path.read_text():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)


@pytest.mark.timing
@pytest.mark.full
def test_an_error_of_one_rank_in_a_step_ends_the_launch_though_a_save_waits_for_all_ranks(data, tmp_path):
    began = time.monotonic()
    keys = ["checkpoint.save_every=1", "checkpoint.async_save=true", "parallel.tensor_model_parallel_size=2"]
    output = failed(
        overrides(data, tmp_path / "run", *keys), [str(TESTS / "support" / "hanging_run.py"), "raises", "1"]
    )
    assert output.count("RuntimeError: only here") == 1, output
    assert "exitcode  : 1 " in output.split("FAILED")[-1]
    assert time.monotonic() - began < 100


@pytest.mark.full
def test_ctrl_c_saves_and_stops_a_run_under_torchrun(data, tmp_path):
    run = tmp_path / "run"
    process = torchrun(overrides(data, run, "num_steps=1000000", "checkpoint.save_every=0"))
    wait_for(run / "metrics.jsonl", process)
    process.send_signal(signal.SIGINT)
    _, output = process.communicate(timeout=100)
    (line,) = lines_of_ranks(output)
    assert line.startswith("[rank 0] Ctrl-C: the run saves and ends after its present step; torchrun waits 30 s")
    assert saved_step(run) >= 1 and (run / "stopped").read_text() == f"step {saved_step(run)}: SIGINT\n"
    assert output.count("Traceback") == 1, "torchrun's own"
    assert not (run / "lock").exists()


@pytest.mark.timing
@pytest.mark.full
def test_a_second_ctrl_c_ends_a_run_at_once_also_while_its_ranks_wait_in_foreign_code(data, tmp_path):
    """Rank 0 waits in a collective, in C++, for rank 1, which sleeps."""
    run = tmp_path / "run"
    script = [str(TESTS / "support" / "hanging_run.py"), "sleeps", "1"]
    process = torchrun(overrides(data, run), script)
    wait_for(run / "metrics.jsonl", process)
    time.sleep(2.0)
    process.send_signal(signal.SIGINT)
    time.sleep(3.0)  # a busy rank that hears both presses late would take them for one
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, output = process.communicate(timeout=100)
    assert time.monotonic() - began < 20, "torchrun would kill the ranks after 30 s"
    assert [line.partition(":")[0] for line in lines_of_ranks(output)] == ["[rank 0] Ctrl-C", "[rank 0] Ctrl-C again"]
    assert not (run / "stopped").exists() and not (run / "lock").exists()


@pytest.mark.full
def test_the_launcher_of_the_program_passes_a_signal_on_and_ends_with_its_number(data, tmp_path):
    run = tmp_path / "run"
    process = torchrun(overrides(data, run, "num_steps=1000000", "checkpoint.save_every=0"), launcher=LAUNCHER)
    wait_for(run / "metrics.jsonl", process)
    process.send_signal(signal.SIGUSR1)
    _, output = process.communicate(timeout=100)
    assert process.returncode == 128 + signal.SIGUSR1 and "Traceback" not in output, output
    assert (run / "stopped").read_text() == f"step {saved_step(run)}: SIGUSR1\n"


@pytest.mark.full
def test_the_launcher_of_the_program_ends_with_the_status_of_its_ranks(data, tmp_path):
    stopped = ["guards.start.max_teacher_cross_entropy=0", "num_steps=2"]
    process = torchrun(overrides(data, tmp_path / "run", *stopped), launcher=LAUNCHER)
    _, output = process.communicate(timeout=200)
    assert process.returncode == 3 and "Traceback" not in output, output
