# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The command of ``make test-gpu`` in a copy of the repository's pages: what it writes, when, and where."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.gpu import command, stages
from tests.gpu.runner import Stage

REPOSITORY = Path(__file__).resolve().parents[2]
COPIED = ("README.md", "docs/support.json", "docs/support.md", "tools/support_table.py")
REPORT = """
import sys
from tests.gpu.results import report
from tests.gpu.outcome import Figure, Outcome
for check in sys.argv[2:]:
    report(check, Outcome((Figure("a figure", float(sys.argv[1]), 1.0),)))
"""
READS = """
import pathlib
for name in ("README.md", "docs/support.jsonl"):
    path = pathlib.Path(sys.argv[-1]) / name
    path.with_suffix(".seen").write_text(path.read_text())
"""


@pytest.fixture
def copy(tmp_path, monkeypatch) -> Path:
    """Return a directory with the tool of the support tables and pages without results; a GPU seems to be there."""
    for name in COPIED:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(REPOSITORY / name, tmp_path / name)
    subprocess.run([sys.executable, str(tmp_path / "tools" / "support_table.py")], check=True)
    monkeypatch.setattr(command, "REPOSITORY", tmp_path)
    monkeypatch.setattr(command, "device_name", lambda options: "1 x a GPU")
    monkeypatch.setattr(command.hidden_gpus, "number", lambda visible: 1)
    return tmp_path


def stage(name: str, code: str, *arguments: str, limit_s: float = 60.0, checks: list[str]) -> Stage:
    return Stage(name, [sys.executable, "-c", code, *arguments], limit_s, checks)


def table_of(copy: Path, name: str = "README.md") -> list[str]:
    """Return the lines of README's table."""
    return [line for line in (copy / name).read_text().splitlines() if line.startswith("| ")]


def test_the_pages_have_the_results_of_a_stage_before_the_next_one_begins(copy, monkeypatch, capsys):
    row = next(row for row in json.loads((copy / "docs" / "support.json").read_text())["rows"] if row["levels"])
    checks = row["levels"][0]["checks"]
    hangs = "import time; time.sleep(600)"
    monkeypatch.setattr(
        stages,
        "chosen",
        lambda options: [
            stage("hangs", hangs, limit_s=1.0, checks=["hangs"]),
            stage("sound", REPORT, "0.5", *checks, checks=checks),
            stage("reads", REPORT + READS, "0.5", str(copy), checks=[str(copy)]),
            stage("wrong", REPORT, "1.5", "wrong", checks=["wrong"]),
            stage("last", REPORT, "0.5", "last", checks=["last"]),
        ],
    )
    before = table_of(copy)
    assert command.main([]) == 1
    after = table_of(copy)
    assert len(before) == len(after) > 10
    changed = [(old, new) for old, new in zip(before, after, strict=True) if old != new]
    assert changed and all("| ⚪ |" in old and "| 🟢" in new for old, new in changed)
    assert table_of(copy, "README.seen") == after, "the first stage's result is on the page at once"
    assert f"| {row['claim']} | {row['cpu']} | 🟢 1 x a GPU, " in (copy / "docs" / "support.md").read_text()
    written = [json.loads(line) for line in (copy / "docs" / "support.jsonl").read_text().splitlines()]
    found = [(one["check"], one["verdict"]) for one in written]
    assert found[:1] + found[1 + len(checks) :] == [
        ("hangs", "FAILURE"),
        (str(copy), "ok"),
        ("wrong", "FAILURE"),
        ("last", "ok"),
    ]
    assert "was killed at its limit" in written[0]["note"]
    assert (copy / "docs" / "support.seen").read_text().count("\n") == 1 + len(checks)
    table = subprocess.run([sys.executable, str(copy / "tools" / "support_table.py"), "--check"])
    assert table.returncode == 0
    assert "2 failed" in capsys.readouterr().out


def test_results_of_a_cpu_never_reach_the_file_of_gpus(copy, capsys):
    for name in ("docs/support.jsonl", "docs/../docs/support.jsonl"):
        with pytest.raises(SystemExit) as ended:
            command.main(["--device", "cpu", "--record", str(copy / name)])
        assert ended.value.code == 2 and "the results of GPUs only" in capsys.readouterr().err
    assert not (copy / "docs" / "support.jsonl").exists()
