# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""CI compares each stage with its recorded seconds, as this machine would take them."""

from __future__ import annotations

import json
import re
import sys

import pytest
from tiny_run import REPOSITORY

sys.path.append(str(REPOSITORY / "tools"))
import stage_times

RECORDED = {"calibration": 2.0, "stages": {"make test": 400, "make docs": 10, "Slurm": 20}}


@pytest.mark.parametrize(
    ("name", "seconds", "calibration", "has_grown"),
    [
        ("make test", 590, 2.0, False),
        ("make test", 610, 2.0, True),
        ("make test", 1100, 4.0, False),  # a machine of half the speed
        ("make test", 310, 1.0, True),  # a machine of twice the speed
        ("make docs", 39, 2.0, False),  # 29 s more than the recorded 10 s
        ("make docs", 41, 2.0, True),
        ("Slurm", 300, 2.0, False),  # the network's seconds
        ("make new", 900, 2.0, False),  # nothing recorded
    ],
)
def test_a_stage_has_grown_if_it_takes_half_more_than_it_would_have_taken_here(name, seconds, calibration, has_grown):
    assert (name in stage_times.grown({name: seconds}, RECORDED, calibration)) == has_grown


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Return the file of a session of CI, with `RECORDED` as the recorded seconds."""
    recorded = tmp_path / "recorded.json"
    recorded.write_text(json.dumps(RECORDED))
    monkeypatch.setattr(stage_times, "RECORDED", recorded)
    file = tmp_path / "stages"
    file.write_text("make test\t500\nmake docs\t12\nmake test\t150\nmake new\t3\n")
    return file


def test_a_grown_stage_fails_only_if_a_second_calibration_confirms_it(files, monkeypatch, capsys):
    monkeypatch.setattr(stage_times, "calibrate", lambda: 2.0)
    assert stage_times.main(["compare", str(files), "2.0"]) == 1
    printed = capsys.readouterr()
    assert "[ci] make test: 650 s, 400 s recorded" in printed.out and "make new: 3 s, not recorded" in printed.out
    assert "the stage 'make test' took 650 s, expected about 400 s" in printed.err
    monkeypatch.setattr(stage_times, "calibrate", lambda: 3.0)
    assert stage_times.main(["compare", str(files), "2.0"]) == 0


def test_recorded_seconds_are_those_of_the_next_comparison(files, capsys):
    assert stage_times.main(["record", str(files), "2.5"]) == 0
    assert stage_times.main(["compare", str(files), "2.5"]) == 0
    assert "make test: 650 s, 650 s recorded" in capsys.readouterr().out


@pytest.mark.parametrize(("name", "seconds"), [("make test", "600"), ("Slurm", "30"), ("make new", "0")])
def test_a_stage_is_expected_to_take_its_recorded_seconds_on_this_machine(files, capsys, name, seconds):
    assert stage_times.main(["expect", name, "3.0"]) == 0
    assert capsys.readouterr().out == f"{seconds}\n"


def test_a_stage_without_time_keeps_its_seconds_in_the_record(files, capsys):
    assert stage_times.main(["record", str(files), "3.0"]) == 0
    stages = json.loads(stage_times.RECORDED.read_text())["stages"]
    assert stages == {"make test": 650, "make docs": 12, "make new": 3, "Slurm": 30}


def test_ci_writes_every_stage_to_the_file_that_it_compares_at_the_end():
    script = (REPOSITORY / ".ci" / "run").read_text(encoding="utf-8")
    body = re.search(r"^stage\(\) \{\n(.*?)^\}", script, re.MULTILINE | re.DOTALL)
    assert body is not None and '>>"$times"' in body[1]
    assert "tools/stage_times.py" in script.rpartition("\nfinish\n")[2], "after the stages beside the others"
    assert set(json.loads((REPOSITORY / ".ci" / "stage_seconds.json").read_text())) == {"calibration", "stages"}


def test_ci_asks_for_the_seconds_of_stages_that_it_runs():
    script = (REPOSITORY / ".ci" / "run").read_text(encoding="utf-8")
    in_turn = re.search(r"^IN_TURN=\(\n(.*?)^\)", script, re.MULTILINE | re.DOTALL)
    assert in_turn is not None
    lines = [line.strip().strip('"').partition(" ") for line in in_turn[1].splitlines()]
    recorded = json.loads((REPOSITORY / ".ci" / "stage_seconds.json").read_text())["stages"]
    assert len(lines) > 4 and {name for _, _, name in lines} <= set(recorded)
    for function, _, _ in lines:
        assert re.search(rf"^{function}\(\) \{{", script, re.MULTILINE), function


def test_ci_names_tests_that_exist():
    script = (REPOSITORY / ".ci" / "run").read_text(encoding="utf-8")
    named = re.findall(r"tests/[\w/]+(?:\.py::\w+)?", script)
    assert len(named) > 5
    for file, _, function in (name.partition("::") for name in named):
        assert (REPOSITORY / file).exists(), file
        assert not function or f"def {function}(" in (REPOSITORY / file).read_text(encoding="utf-8"), function
