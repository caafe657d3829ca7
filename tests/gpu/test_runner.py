# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The runner of ``make test-gpu``: a stage that hangs leaves the others alone; NaN and an empty check have failed."""

from __future__ import annotations

import math
import sys
import time

import psutil
import pytest

from tests.gpu.results import FAILED, OK, Figure, Outcome, largest
from tests.gpu.runner import Stage, run_stages

REPORT = """
import sys
from tests.gpu.results import Figure, Outcome, report
report(sys.argv[1], Outcome((Figure("a figure", float(sys.argv[2]), 1.0),)))
"""


def stage(name: str, code: str, *arguments: str, limit_s: float = 60.0, checks: tuple[str, ...] = ()) -> Stage:
    return Stage(name, [sys.executable, "-c", code, *arguments], limit_s, checks or (name,))


@pytest.mark.full
def test_a_stage_beyond_its_limit_is_killed_with_all_its_processes_and_the_next_ones_run(tmp_path):
    pids = tmp_path / "pids"
    hangs = (
        "import os, subprocess, sys, time\n"
        "command = [sys.executable, '-c', 'import time; time.sleep(600)']\n"
        "mine = [subprocess.Popen(command), subprocess.Popen(command, start_new_session=True)]\n"
        "open(sys.argv[1], 'w').write(' '.join(str(p.pid) for p in mine))\n"
        "print('still here', flush=True)\n"
        "time.sleep(600)\n"
    )
    lines: list[str] = []
    began = time.monotonic()
    found = run_stages(
        [stage("hangs", hangs, str(pids), limit_s=3.0), stage("sound", REPORT, "sound", "0.5")], lines.append
    )
    assert time.monotonic() - began < 60
    assert [(result.check, result.verdict) for result in found] == [("hangs", FAILED), ("sound", OK)]
    assert found[0].note == "the stage was killed at its limit of 3 s before this check was reported"
    assert any(line.startswith("[hangs") and line.endswith("still here") for line in lines)
    for pid in map(int, pids.read_text().split()):
        assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_a_stage_that_dies_keeps_what_it_reported_and_fails_the_rest():
    code = REPORT + "\nimport os\nos._exit(7)\n"
    found = run_stages(
        [stage("dies", code, "one", "0.5", checks=("one", "two")), stage("bad", REPORT, "bad", "1.5")],
        lambda line: None,
    )
    assert [(result.check, result.verdict) for result in found] == [("one", OK), ("two", FAILED), ("bad", FAILED)]
    assert found[1].note == "the stage ended with status 7 before this check was reported"
    assert found[2].value == 1.5 and found[2].bound == "<= 1"


def test_the_stages_of_one_gpu_take_at_most_eleven_minutes_and_name_every_check_once():
    from tests.gpu import command, stages

    for arguments in (["--device", "cuda"], ["--device", "cpu"]):
        chosen = stages.chosen(command.parsed(arguments))
        checks = [check for one in chosen for check in one.checks]
        assert len(set(checks)) == len(checks) > 20
        assert len({one.name for one in chosen}) == len(chosen)
    one = stages.chosen(command.parsed([]))
    assert sum(stage.limit_s for stage in one) <= 11 * 60
    eight = stages.chosen(command.parsed(["--device", "cuda", "--gpus", "8"]))
    assert sum(stage.limit_s for stage in eight[len(one) :]) <= 15 * 60
    assert len({stage.name for stage in eight}) == len(eight)


def test_a_figure_passes_within_its_bound_only_and_never_unmeasured():
    for value, at_least, passes in (
        (1.0, False, True),
        (1.1, False, False),
        (math.nan, False, False),
        (None, False, False),
        (1.0, True, True),
        (0.9, True, False),
        (math.nan, True, False),
    ):
        figure = Figure("", value, 1.0, at_least)
        assert figure.passed is passes and Outcome((figure,)).passed is passes
    assert math.isnan(largest("", {"a": 2.0, "b": math.nan, "c": 3.0}, 1.0).value)
    assert not Outcome().passed and Outcome(not_done="no GPU").passed
