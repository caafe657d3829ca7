# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""tools/benchmarks/weight_sync.py runs as users run it and counts the model's bytes; its times are no claim here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

TOOLS = Path(__file__).resolve().parents[3] / "tools" / "benchmarks"
TOOL = TOOLS / "weight_sync.py"
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TORCHDYNAMO_DISABLE": "1"}


def test_a_colocated_sync_is_measured_against_a_copy_of_its_bytes(tmp_path):
    sizes = ["--layers=1", "--hidden=128", "--vocab=512", "--repeats=1"]
    command = [sys.executable, str(TOOL), "--placement=colocated", *sizes, "--profile", "--unpacked"]
    environment = os.environ | ENVIRONMENT
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


def test_a_sync_of_adapters_moves_their_factors_alone(tmp_path):
    sizes = ["--layers=1", "--hidden=128", "--vocab=512", "--repeats=1", "--adapter-rank=8"]
    command = [sys.executable, str(TOOL), "--placement=colocated", *sizes, f"--json={tmp_path}/found.json"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | ENVIRONMENT, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "factors of rank 8 alone" in done.stdout
    # A of q, k and v, of gate and up, under each name.
    rows = (128 + 128) + 2 * (128 + 64) + (128 + 128) + 2 * (128 + 512) + (512 + 128)
    assert json.loads((tmp_path / "found.json").read_text())["bytes"] == 2 * 8 * rows


def test_factors_beside_the_weights_change_less_than_weights_that_were_rounded(tmp_path):
    sizes = ["--layers=1", "--hidden=128", "--vocab=512", "--responses=4", "--tokens=8", "--precision=fp32"]
    command = [sys.executable, str(TOOLS / "adapter_error.py"), *sizes, f"--json={tmp_path}/found.json"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | ENVIRONMENT, timeout=600)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    beside, merged = found["factors beside the weights"]["kl"], found["factors merged into the weights"]["kl"]
    assert beside < merged / 100
