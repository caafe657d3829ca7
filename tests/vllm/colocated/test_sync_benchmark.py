# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""tools/benchmarks/weight_sync.py runs as users run it and counts the model's bytes; its times are no claim here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

TOOL = Path(__file__).resolve().parents[3] / "tools" / "benchmarks" / "weight_sync.py"


def test_a_colocated_sync_is_measured_against_a_copy_of_its_bytes(tmp_path):
    sizes = ["--layers=1", "--hidden=128", "--vocab=512", "--repeats=1"]
    command = [sys.executable, str(TOOL), "--placement=colocated", *sizes, "--profile", "--unpacked"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TORCHDYNAMO_DISABLE": "1"}
    done = subprocess.run(
        [*command, f"--json={tmp_path}/found.json"], capture_output=True, text=True, env=environment, timeout=600
    )
    assert done.returncode == 0, done.stderr
    assert "| sync |" in done.stdout and "  export: " in done.stdout
    found = json.loads((tmp_path / "found.json").read_text())
    # Embedding and output layer; q, k, v, o of 2 heads with one group; gate, up, down of 4 x 128; three norms.
    layer = 128 * (128 + 2 * 64 + 128) + 3 * 128 * 4 * 128 + 2 * 128
    assert found["bytes"] == 2 * (2 * 512 * 128 + layer + 128)
    assert found["profile"]["all"] >= found["profile"]["export"] > 0
