# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The scripts that time steps and sampling beside peers run with what is installed, and time each part."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any


def timed(script: str, directory: Path, *more: str) -> Any:
    """Return what a script of tools/benchmarks writes about the smallest sizes."""
    sizes = "--layers 1 --batch 2 --prompt 8 --hint 4 --new-tokens 4 --repeats 1".split()
    path = Path(__file__).resolve().parents[2] / "tools" / "benchmarks" / script
    subprocess.run([sys.executable, path, *sizes, *more, "--json", directory / "seconds.json"], check=True)
    return json.loads((directory / "seconds.json").read_text())


def test_every_contender_takes_every_part_of_a_step(tmp_path):
    [found] = timed("peers_step.py", tmp_path)["rounds"]
    assert found.keys() == {"anchored", "mix", "TRL", "TRL, whole rows", "transformers"}
    assert all(seconds > 0 for parts in found.values() for part, seconds in parts.items() if part != "rest")
