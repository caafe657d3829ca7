# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The script that measures a weight sync to a real server runs and reports each transfer."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[3] / "tools" / "benchmarks" / "server_sync.py"


def test_each_transfer_has_a_row_with_its_ratio(tmp_path):
    numbers = tmp_path / "numbers.json"
    tiny = ["--layers=1", "--hidden=64", "--vocab=128", "--repeats=1", f"--json={numbers}"]
    command = [sys.executable, str(SCRIPT), *tiny, "--server-python", os.environ["SELFDISTILL_VLLM_PYTHON"]]
    table = subprocess.run(command, check=True, capture_output=True, text=True, timeout=600).stdout
    rows = re.findall(r"^\| (\w+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", table, re.MULTILINE)
    assert [row[0] for row in rows] == ["shared_memory", "gloo"]
    found = json.loads(numbers.read_text())
    assert found["bytes"] > 0
    assert all(len(found["syncs"][row[0]]) == 1 and min(found["syncs"][row[0]]) > 0 for row in rows)
