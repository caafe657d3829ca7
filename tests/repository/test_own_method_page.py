# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The page about a method of one's own: its code, its test and its command run as they stand."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny_run

REPOSITORY = Path(__file__).resolve().parents[2]
PAGE = REPOSITORY / "docs" / "your_model.md"
OWN = ["method.name=my_method.WrongFirst", "method.right_weight=0.5"]


@pytest.fixture
def written(tmp_path) -> Path:
    """Write the code blocks of the section about an own method into a directory."""
    section = PAGE.read_text(encoding="utf-8").partition("\n## Your own method\n")[2]
    blocks = re.findall(r"^```python\n(.*?)^```$", section, re.DOTALL | re.MULTILINE)
    for name, text in zip(("my_method.py", "test_my_method.py"), blocks, strict=True):
        (tmp_path / name).write_text(text)
    return tmp_path


@pytest.fixture
def importable(written, monkeypatch) -> Iterator[None]:
    """Let this process import the method of the page, and forget the method afterwards."""
    monkeypatch.syspath_prepend(written)
    yield
    sys.modules.pop("my_method", None)


def run(directory: Path, *arguments: str) -> str:
    """Run Python in ``directory``, which it can import from; return its output."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(directory), str(REPOSITORY)])}
    command = [sys.executable, "-m", *arguments]
    done = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_method_and_its_test_are_short_and_the_test_passes(written, importable):
    lines = {path.name: path.read_text().split("\n\n\n", 1)[1].split("\n") for path in written.iterdir()}
    assert max(map(len, lines.values())) <= 22
    tests = [test for name, test in runpy.run_path(str(written / "test_my_method.py")).items() if name[:5] == "test_"]
    assert len(tests) == 1
    tests[0]()


@pytest.mark.full
def test_the_command_of_the_page_trains(written):
    assert all(word in PAGE.read_text(encoding="utf-8") for word in OWN)
    tiny_run.write_data(written, 4)
    arguments = tiny_run.overrides(written, written / "run", *OWN, "num_steps=1", "rollout.max_new_tokens=6")
    run(written, "megatron_selfdistill", *arguments)
    steps = [json.loads(line) for line in (written / "run" / "metrics.jsonl").read_text().splitlines()]
    assert any("rewards/mean" in step for step in steps)
