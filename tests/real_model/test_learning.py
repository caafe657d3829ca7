# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The example with SmolLM2-135M-Instruct learns in two steps what it says, and the rest of the model stays."""

from __future__ import annotations

import json
from pathlib import Path

from scripts import load_script

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def test_an_instruction_moves_from_the_prompt_into_the_weights_of_a_real_model(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))  # as `python examples/...` does
    example = load_script(EXAMPLES / "12_real_model.py")
    monkeypatch.setattr(example, "NUM_HELD_OUT", 16)
    monkeypatch.setattr(example, "QUESTIONS", example.QUESTIONS[:8])
    assert example.main(["--directory", str(tmp_path), "--steps", "2"]) == 0
    figures = json.loads((tmp_path / "real_model" / "results.json").read_text())
    before, after = figures["before"], figures["after"]
    assert before["greedy_accuracy"] == 0.0 and after["greedy_accuracy"] >= 0.3
    assert after["greedy_mean_length"] < before["greedy_mean_length"]
    assert 0.9 < after["perplexity"] / before["perplexity"] < 1.1
