# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The scripts that time steps and sampling beside peers run with what is installed, and time each part."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path


def test_every_contender_takes_every_part_of_a_step(tmp_path):
    sizes = "--layers 1 --batch 2 --prompt 8 --hint 4 --new-tokens 4 --repeats 1".split()
    script = Path(__file__).resolve().parents[2] / "tools" / "benchmarks" / "peers_step.py"
    subprocess.run([sys.executable, script, *sizes, "--json", tmp_path / "seconds.json"], check=True)
    [found] = json.loads((tmp_path / "seconds.json").read_text())["rounds"]
    assert found.keys() == {"anchored", "mix", "TRL", "TRL, whole rows", "transformers"}
    assert all(seconds > 0 for parts in found.values() for part, seconds in parts.items() if part != "rest")
