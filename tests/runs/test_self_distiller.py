# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""A run as an object of Python: the same run as that of the commands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_run import overrides, reproducible_metrics, train

from megatron_selfdistill import SelfDistiller
from megatron_selfdistill.commands import self_distiller


def from_python(data: Path, run_dir: Path) -> dict[str, Any]:
    """Return what the methods return: train two steps, go on to the third, evaluate, and write the report."""
    words = overrides(data, run_dir)[1:]
    begun = SelfDistiller(*words, run_dir=run_dir, steps=2).train()
    run = SelfDistiller(*words, run_dir=run_dir, steps=3)
    last, summary = (
        run.train(),
        run.evaluate(data / "problems.jsonl", "--num-samples", "2", "evaluation.verifier=exact_match"),
    )
    with pytest.raises(RuntimeError, match="selfdistill train ended with status 2"):
        SelfDistiller(*words, "traget.rule=fixed", run_dir=run_dir).train()
    return {"steps": (begun["step"], last["step"]), "summary": summary, "losses": run.figures()["loss/mean"]} | {
        "report": run.report().is_file()
    }


def test_an_object_trains_evaluates_and_reports_the_run_of_the_commands(ranks, data, tmp_path):
    [found] = ranks.run(from_python, data, tmp_path / "python", world_size=1)
    assert found["steps"] == (2, 3) and found["report"]
    assert 0 <= found["summary"]["metrics"]["greedy_accuracy"] <= 1
    train(ranks, overrides(data, tmp_path / "command", "num_steps=3"))
    expected = [(line["step"], line["loss/mean"]) for line in reproducible_metrics(tmp_path / "command")]
    assert found["losses"] == expected


def test_the_settings_of_a_file_are_those_of_the_evaluation(tmp_path, monkeypatch):
    (tmp_path / "my.yaml").write_text("rollout: {top_k: 5}\ndata: {path: a.jsonl}\n")
    (tmp_path / "summary.json").write_text("{}")
    seen = []
    monkeypatch.setattr(self_distiller, "_run", lambda *words: seen.extend(words))
    SelfDistiller(f"{tmp_path}/my.yaml", run_dir="run").evaluate("test.jsonl", out=tmp_path)
    assert "rollout.top_k=5" in seen and "data.path='a.jsonl'" not in seen
