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

pytestmark = pytest.mark.full
TESTS = Path(__file__).resolve().parents[1]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
MODULE = ["-m", "megatron_selfdistill.train"]
LAUNCHER = [sys.executable, "-m", "megatron_selfdistill", "train", "--ranks", "2"]
ENDLESS = ("num_steps=1000000", "checkpoint.save_every=0")
FAULTY = """
import os, sys, time
from megatron_selfdistill import train
from megatron_selfdistill.data.run_data import RunData
from megatron_selfdistill.trainer import Trainer

where, fault, sign = sys.argv[1:4]
owner, name = {"load": (RunData, "load"), "third step": (Trainer, "pack")}[where]
original = getattr(owner, name)

def fail(*arguments):
    if where == "third step" and arguments[0].step < 2:
        return original(*arguments)
    with open(sign, "w") as file:
        file.write(where)
    if fault == "sleeps":
        time.sleep(600)
    raise (train.ConfigError if where == "load" else RuntimeError)("only here")

if os.environ["RANK"] == "1":
    setattr(owner, name, fail)
train.stop._SAME_PRESS_S = 0  # the presses of a test follow each other at once
if __name__ == "__main__":
    train.stop.ignore_signals()
    sys.exit(train.main(sys.argv[4:]))
"""
"""A script whose rank 1 fails; it writes the file ``sign`` as soon as it does."""


def started(command: list[str]) -> subprocess.Popen[str]:
    """Start a launch in a group of its own: Ctrl-C reaches torchrun, whose ranks are in sessions of their own."""
    paths = [str(TESTS / "support"), str(TESTS.parent), str(TESTS.parent / "examples")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo"}
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)


def faulty(directory: Path, where: str, fault: str) -> list[str]:
    """Return the command of a launch whose rank 1 has a fault; ``directory`` gets its script, and its sign."""
    (directory / "script.py").write_text(FAULTY)
    return [*TORCHRUN, str(directory / "script.py"), where, fault, str(directory / "sign")]


def failed(command: list[str], status: int = 1) -> str:
    """Launch two ranks that end by themselves; return the standard error of the ranks and of torchrun."""
    process = started(command)
    _, output = process.communicate()
    assert process.returncode == status and "SIGKILL" not in output, output
    return output


def lines_of_ranks(output: str) -> list[str]:
    return [line for line in output.splitlines() if line.startswith("[rank ")]


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    while not path.exists() or not path.read_text():
        assert process.poll() is None
        time.sleep(0.05)


@pytest.mark.parametrize("ranks_that_say_it", ["01", "1"])
def test_an_error_of_all_ranks_or_of_rank_1_alone_is_said_once_and_releases_all(data, tmp_path, ranks_that_say_it):
    (tmp_path / "bad" / "iter_0000001").mkdir(parents=True)
    everywhere, run = ranks_that_say_it == "01", overrides(data, tmp_path / "run")
    bad = [*TORCHRUN, *MODULE, *run, f"checkpoint.load={tmp_path}/bad/iter_0000001"]
    output = failed(bad if everywhere else [*faulty(tmp_path, "load", "raises"), *run])
    (line,) = lines_of_ranks(output)
    assert re.match(rf"\[rank [{ranks_that_say_it}]\] ", line)
    assert ("bad/iter_0000001" if everywhere else "only here") in line
    report = output.split("FAILED")[-1]
    assert report.count("exitcode  : 2 ") == report.count("exitcode  : ") == 2, report
    assert everywhere or not (tmp_path / "run").exists()


def test_an_error_of_one_rank_in_a_step_ends_the_launch_though_a_save_waits_for_all_ranks(data, tmp_path):
    keys = ["checkpoint.save_every=1", "checkpoint.async_save=true", "parallel.tensor_model_parallel_size=2"]
    output = failed([*faulty(tmp_path, "third step", "raises"), *overrides(data, tmp_path / "run", *keys)])
    assert output.count("RuntimeError: only here") == 1, output
    assert "exitcode  : 1 " in output.split("FAILED")[-1]


def test_ctrl_c_saves_and_stops_a_run_under_torchrun(data, tmp_path):
    run = tmp_path / "run"
    process = started([*TORCHRUN, *MODULE, *overrides(data, run, *ENDLESS)])
    wait_for(run / "metrics.jsonl", process)
    process.send_signal(signal.SIGINT)
    _, output = process.communicate()
    (line,) = lines_of_ranks(output)
    assert line.startswith("[rank 0] Ctrl-C: the run saves and ends after its present step; torchrun waits 30 s")
    assert saved_step(run) >= 1 and (run / "stopped").read_text() == f"step {saved_step(run)}: SIGINT\n"
    assert output.count("Traceback") == 1, "torchrun's own"
    assert not (run / "lock").exists()


@pytest.mark.scheduling
def test_a_second_ctrl_c_ends_a_run_at_once_also_while_its_ranks_wait_in_foreign_code(data, tmp_path):
    """Rank 0 waits in a collective, in C++, for rank 1, which sleeps; torchrun kills a rank that does not end."""
    run, lines = tmp_path / "run", []
    process = started([*faulty(tmp_path, "third step", "sleeps"), *overrides(data, run)])
    wait_for(tmp_path / "sign", process)
    assert process.stderr is not None
    for press in ("[rank 0] Ctrl-C:", "[rank 0] Ctrl-C again"):
        process.send_signal(signal.SIGINT)
        for line in process.stderr:
            lines.append(line)
            if line.startswith(press):
                break
    output = "".join([*lines, *process.stderr])
    process.wait()
    assert [line.partition(":")[0] for line in lines_of_ranks(output)] == ["[rank 0] Ctrl-C", "[rank 0] Ctrl-C again"]
    assert "SIGKILL" not in output
    assert not (run / "stopped").exists() and not (run / "lock").exists()


def test_the_launcher_of_the_program_passes_a_signal_on_and_ends_with_its_number(data, tmp_path):
    run = tmp_path / "run"
    process = started([*LAUNCHER, *overrides(data, run, *ENDLESS)])
    wait_for(run / "metrics.jsonl", process)
    process.send_signal(signal.SIGUSR1)
    _, output = process.communicate()
    assert process.returncode == 128 + signal.SIGUSR1 and "Traceback" not in output, output
    assert (run / "stopped").read_text() == f"step {saved_step(run)}: SIGUSR1\n"


def test_the_launcher_of_the_program_ends_with_the_status_of_its_ranks(data, tmp_path):
    stopped = ["guards.start.max_teacher_cross_entropy=0", "num_steps=2"]
    assert "Traceback" not in failed([*LAUNCHER, *overrides(data, tmp_path / "run", *stopped)], status=3)
