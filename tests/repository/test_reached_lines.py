# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Lines that only a GPU reaches: how they are found, and the functions that docs/gpu.md names."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest
from scripts import load_script

from tests.gpu import command, stages

REPOSITORY = Path(__file__).resolve().parents[2]
SOURCE = """
import torch


def work(device):
    if device.type == "cuda":
        waits()
        return 1
    for _ in range(2):
        device = [
            x
            for x in (device,)
        ]
    return helper(device)


def early():
    if not torch.cuda.is_available():
        return 0
    return waits() + common()


def waits():
    return 5


def common():
    return 6


def helper(device):
    def inner():
        return common()

    return 7
"""


@pytest.fixture(scope="module")
def tool():
    return load_script(REPOSITORY / "tools" / "reached_lines.py")


@pytest.fixture(scope="module")
def functions(tool, tmp_path_factory):
    path = tmp_path_factory.mktemp("source") / "some.py"
    path.write_text(SOURCE)
    return tool.functions_of(path)


def test_the_lines_of_a_function_are_those_of_its_body(functions):
    lines = {function.name: sorted(function.lines) for function in functions}
    assert lines == {
        "work": [6, 7, 8, 9, 10, 11, 12, 14],
        "early": [18, 19, 20],
        "waits": [24],
        "common": [28],
        "helper": [32, 35],
        "helper.inner": [33],
    }


def test_lines_of_the_device_are_behind_its_condition_or_in_functions_that_only_these_name(tool, functions):
    executed = {"some.py": {6, 9, 10, 11, 12, 14, 18, 19, 32, 35}}
    assert tool.report(functions, executed, everything=False) == [
        "some.py: work: 7-8",
        "some.py: early: 20",
        "some.py: waits: 24",
        "4 of 16 lines in 3 functions were not executed and depend on the device",
    ]
    assert tool.report(functions, executed, everything=True)[3:] == [
        "some.py: common: 28",
        "some.py: helper.inner: 33",
        "6 of 16 lines in 5 functions were not executed",
    ]
    executed["some.py"] |= {7, 8, 20, 24}
    assert tool.report(functions, executed, everything=False)[-1].startswith("0 of 16 lines")


PROGRAM = """
import os, sys
from megatron_selfdistill import terminal
if os.fork() == 0:
    terminal.visible("a")
    os._exit(0)
os.wait()
os.kill(os.getpid(), 9)
"""


def test_forks_and_killed_processes_have_noted_what_they_reached(tool, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")]))
    assert tool.main(["run", str(tmp_path), "--", sys.executable, "-c", PROGRAM]) == -9
    (visible,) = [
        f for f in tool.functions_of(REPOSITORY / "megatron_selfdistill" / "terminal.py") if f.name == "visible"
    ]
    found = tool.reached(tmp_path)["megatron_selfdistill/terminal.py"]
    assert visible.lines & found


def rows() -> list[list[str]]:
    """Return the cells of the table of functions that no CPU reaches."""
    text = (REPOSITORY / "docs" / "gpu.md").read_text(encoding="utf-8")
    section = text.split("## What no CPU reaches\n")[1].split("\n## ")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line[:3] == "| `"]


def test_the_page_names_functions_that_exist_and_stages_that_run_them(tool):
    chosen = stages.chosen(command.parsed(["--gpus", "8"]))
    names = {stage.name for stage in chosen}
    assert len(rows()) > 10
    for place, functions, _, covered in rows():
        path = REPOSITORY / "megatron_selfdistill" / place.strip("`")
        existing = {function.name for function in tool.functions_of(path)}
        named = set(re.findall(r"`([^`]+)`", functions))
        assert named and named <= existing, f"{place} has no {named - existing}"
        assert covered == "none" or set(re.findall(r"[^,]+", covered.replace(", ", ","))) <= names, covered
