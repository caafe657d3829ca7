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
from tests.gpu.results import Figure, Outcome, report
for check in sys.argv[2:]:
    report(check, Outcome((Figure("a figure", float(sys.argv[1]), 1.0),)))
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


def test_the_pages_have_the_results_of_every_stage_also_after_one_that_hangs(copy, monkeypatch, capsys):
    row = next(row for row in json.loads((copy / "docs" / "support.json").read_text())["rows"] if row["levels"])
    checks, python = row["levels"][0]["checks"], [sys.executable, "-c"]
    chosen = [
        Stage("hangs", [*python, "import time; time.sleep(600)"], 1.0, ["hangs"]),
        Stage("sound", [*python, REPORT, "0.5", *checks], 60.0, checks),
        Stage("wrong", [*python, REPORT, "1.5", "wrong"], 60.0, ["wrong"]),
    ]
    monkeypatch.setattr(stages, "chosen", lambda options: chosen)
    assert command.main([]) == 1
    assert "| 🟢" in (copy / "README.md").read_text()
    assert f"| {row['claim']} | {row['cpu']} | 🟢 1 x a GPU, " in (copy / "docs" / "support.md").read_text()
    written = [json.loads(line) for line in (copy / "docs" / "support.jsonl").read_text().splitlines()]
    verdicts = {one["check"]: one["verdict"] for one in written}
    assert verdicts == {"hangs": "FAILURE", **dict.fromkeys(checks, "ok"), "wrong": "FAILURE"}
    assert "was killed at its limit" in written[0]["note"] and "2 failed" in capsys.readouterr().out


def test_results_of_a_cpu_never_reach_the_file_of_gpus(copy, capsys):
    for name in ("docs/support.jsonl", "docs/../docs/support.jsonl"):
        with pytest.raises(SystemExit) as ended:
            command.main(["--device", "cpu", "--record", str(copy / name)])
        assert ended.value.code == 2 and "the results of GPUs only" in capsys.readouterr().err
    assert not (copy / "docs" / "support.jsonl").exists()
