# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The runner of ``make test-gpu``: a stage that hangs or fails leaves the others alone, and the table says which."""

from __future__ import annotations

import runpy
import sys
import time

import psutil
import pytest

from megatron_selfdistill.instruments.selftest.outcome import Figure, Outcome
from tests.gpu.results import FAILED, OK, SKIPPED, Result, results_of
from tests.gpu.runner import Stage, run_stages, table

REPORT = """
import sys
from tests.gpu.results import report
from megatron_selfdistill.instruments.selftest.outcome import Figure, Outcome
report(sys.argv[1], Outcome((Figure("a figure", float(sys.argv[2]), 1.0),)))
"""


def stage(name: str, code: str, *arguments: str, limit_s: float = 60.0, checks: tuple[str, ...] = ()) -> Stage:
    return Stage(name, [sys.executable, "-c", code, *arguments], limit_s, checks or (name,))


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


def test_a_stage_that_reports_nothing_has_failed():
    (result,) = run_stages([stage("mute", "pass")], lambda line: None)
    assert result.verdict == FAILED and "without a word" in result.note


def test_what_a_stage_does_not_use_of_its_limit_is_left_for_the_next_one():
    lines: list[str] = []
    late = stage("late", "import time; time.sleep(1.0)" + REPORT, "late", "0", limit_s=0.5)
    found = run_stages([stage("quick", REPORT, "quick", "0", limit_s=60.0), late], lines.append)
    assert [result.verdict for result in found] == [OK, OK], lines


def test_a_stage_knows_the_time_that_earlier_ones_have_left_it():
    code = "from tests.gpu.results import seconds_left\nprint('left', seconds_left(), flush=True)\n"
    lines: list[str] = []
    run_stages([stage("quick", "pass", limit_s=300.0), stage("next", code, limit_s=100.0)], lines.append)
    (left,) = [float(line.split()[-1]) for line in lines if "] left " in line]
    assert 300 < left < 400


def test_an_outcome_becomes_rows():
    passed, failed = Figure("a", 0.5, 1.0), Figure("b", 0.5, 1.0, at_least=True, where="TP 2")
    assert [(r.verdict, r.bound, r.note) for r in results_of("c", Outcome((passed, failed)))] == [
        (OK, "<= 1", ""),
        (FAILED, ">= 1", "TP 2"),
    ]
    assert results_of("c", Outcome(not_done="no GPU"))[0].verdict == SKIPPED
    assert results_of("c", Outcome(error="it broke"))[0].verdict == FAILED
    assert results_of("c", Outcome())[0].verdict == FAILED


def test_the_table_names_the_row_the_figure_the_bound_and_where_it_ran():
    where = {"device": "a GPU", "date": "2026-01-02", "commit": "abc1234"}
    heading, row = table(
        [Result("layouts", "gradients", 2e-6, "<= 1e-05", OK)], {"layouts": ["TP"]}, where
    ).splitlines()
    assert heading.split() == "README row check figure value bound verdict device date commit".split()
    assert row.split() == "TP layouts gradients 2e-06 <= 1e-05 ok a GPU 2026-01-02 abc1234".split()


@pytest.mark.parametrize(("value", "status"), [("0.5", 0), ("1.5", 1)])
def test_the_command_ends_with_1_where_a_check_failed(tmp_path, monkeypatch, value, status):
    from tests.gpu import stages

    monkeypatch.setattr(stages, "chosen", lambda options: [stage("one", REPORT, "one", value)])
    monkeypatch.setattr(sys, "argv", ["gpu", "--device", "cpu", "--record", str(tmp_path / "out.jsonl")])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("tests.gpu", run_name="__main__")
    assert ended.value.code == status
    assert '"check": "one"' in (tmp_path / "out.jsonl").read_text()


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


def test_the_first_five_minutes_answer_the_most():
    from tests.gpu import command, stages

    first = stages.chosen(command.parsed([]))[:5]
    assert [one.name for one in first] == ["kernels", "fused-layer", "step", "colocated", "speed"]
    assert sum(one.limit_s for one in first) <= 300
    on_cpu = stages.chosen(command.parsed(["--device", "cpu"]))
    assert [one.name for one in on_cpu] == [one.name for one in stages.chosen(command.parsed([]))]
