# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The example trains with every trainer, learns its task, and leaves a log that a report reads."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from scripts import load_script

from megatron_selfdistill.instruments.report.run_record import read_runs

REPOSITORY = Path(__file__).resolve().parents[2]
NEEDS_TRL = pytest.mark.skipif(os.environ.get("SELFDISTILL_TEST_TRL") != "1", reason="needs TRL (make test-trainers)")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.mark.full
@pytest.mark.parametrize("trainer", ["transformers", "peft", pytest.param("trl", marks=NEEDS_TRL), "megatron"])
def test_a_model_learns_subtraction_from_answers(trainer, root, capsys):
    example = load_script(REPOSITORY / "examples" / "13_your_trainer.py")
    assert example.main(["--trainer", trainer, "--directory", str(root)]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("greedy accuracy")]
    before, after = (float(word) for word in line.split() if word.startswith(("0.", "1.")))
    assert before < 0.5 and after > 0.9
    (run,) = read_runs([root / "your_trainer" / f"{trainer}-seed5"])
    assert run.last_step == 100 and sum(run.values("loss/mean")[-10:]) < 0.5 * sum(run.values("loss/mean")[:10])
    assert len(run.values("gradient_norm")) == 100
