# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The benchmarks run as users run them, and count what they say they count; their times are nobody's claim here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parent.parent / "tools"


def run(tool: str, *arguments: str, launcher: Sequence[str] = ()) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, *launcher, str(TOOLS / tool), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def measured(folder: Path, *arguments: str) -> dict[str, list[dict]]:
    """Of each contender, in every size."""
    run("benchmark_loss.py", "--repeats=1", f"--out={folder}/found", *arguments)
    assert (folder / "found.md").read_text().count("collectives") > 0
    by_name: dict[str, list[dict]] = {}
    for size in json.loads((folder / "found.json").read_text())["sizes"]:
        for found in size["found"]:
            by_name.setdefault(found["name"], []).append(found)
    return by_name


def test_the_loss_is_measured_at_every_size_with_its_error_and_a_plot(tmp_path):
    found = measured(tmp_path, "--tokens", "40", "80", "--vocab", "1000", "3000", f"--plot={tmp_path}/loss.png")
    assert (tmp_path / "loss.png").stat().st_size > 10_000
    assert {len(sizes) for sizes in found.values()} == {3}
    for ours in (*found["torch"], *found["naive PyTorch"]):
        assert ours["loss_error"] < 1e-5 and ours["gradient_error"] < 1e-4 and ours["failure"] is None
    fast = found["torch, solver fast"][0]
    assert fast["gradient_error"] < 0.05 and fast["loss_error"] != found["torch"][0]["loss_error"]
    assert found["naive PyTorch"][0]["ops_u"] > 600 and found["naive PyTorch"][0]["peak_u"] > 10
    assert found["Megatron's fused cross entropy"][0]["collectives"] == 2


def test_the_fused_output_layer_is_measured_against_its_products(tmp_path):
    options = ["--tokens=512", "--vocab=4096", "--hidden=64", "--chunk=64", "--divergence=jsd"]
    found = {name: sizes[0] for name, sizes in measured(tmp_path, *options).items()}
    assert found["fused, keep_gradient"]["peak_u"] < 0.8 * found["materialised"]["peak_u"]
    assert found["fused, low_memory"]["peak_u"] < 0.7 * found["fused, keep_gradient"]["peak_u"]
    for name in ("materialised", "fused, keep_gradient", "fused, low_memory"):
        assert found[name]["gradient_error"] < 1e-4
    assert found["4 products alone"]["loss_error"] is None


@pytest.mark.parametrize("launcher", [[], ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]])
def test_a_step_is_measured_by_parts(tmp_path, launcher):
    sizes = "--layers=1 --hidden=64 --head-size=32 --vocab=256 --problems=2 --response=16 --tokens=256 --repeats=1"
    options = [f"--tp={2 if launcher else 1}", f"--json={tmp_path}/found", *sizes.split()]
    shown = run("benchmark_step.py", *options, launcher=launcher)
    assert "| self-distillation, whole step |" in shown
    (parts,) = json.loads((tmp_path / "found").read_text())["parts"]
    assert min(parts[name] for name in parts if name != "weight sync") > 0
    assert sorted(parts) == sorted(
        "rollout,teacher forward,student forward,output layer,loss,backward,optimizer,weight sync".split(",")
    )
