# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""A short run whose episodes an environment of another project plays, and the same run killed and resumed."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import pytest
from ranks import RankError, RankPool
from tiny_run import assert_equal_runs, overrides, reproducible_metrics, saved_step, train

NUM_EPISODES = 6 * 5 * 2
"""Six steps of five problems, each played twice."""


def write_tokenizer_of_characters(directory: Path) -> None:
    """Write a tokenizer whose tokens are the printable characters, an end and a padding."""
    from _lib.pretraining import write_tokenizer

    write_tokenizer(directory / "tokenizer", "".join(dict.fromkeys(string.printable[:95] + "\n$_")))


def told_by_a_killed_run(ranks: RankPool, data: Path, tmp_path: Path, *options: str) -> list[dict[str, Any]]:
    """Return the responses of a run, which equals a killed and resumed one; ``options`` name the environment."""

    def arguments(run_dir: Path) -> list[str]:
        return [
            *overrides(data, run_dir, "data.global_batch_size=5", "rollout.num_samples=2", "environment.max_turns=3"),
            *("num_steps=6", "checkpoint.save_every=2", "optimizer.lr_warmup_steps=0", "method.name=opsd_rl"),
            *("data.teacher_template='{problem}\\n{solution}\\n'", *options),
        ]

    whole = tmp_path / "whole"
    train(ranks, [*arguments(whole), f"tests.record={whole}/responses.jsonl"])
    told = [json.loads(line) for line in (whole / "responses.jsonl").read_text().splitlines()]
    assert sum(record.get("turn", 0) == 0 for record in told) == NUM_EPISODES
    assert all(step["episodes/failed_share"] == 0 for step in reproducible_metrics(whole))
    assert any(record.get("turn", 0) > 0 for record in told)
    with pytest.raises(RankError, match="ended with exit code -9"):
        train(ranks, arguments(tmp_path / "killed"), kill_at="step")
    assert saved_step(tmp_path / "killed") == 4
    train(ranks, arguments(tmp_path / "killed"))
    assert_equal_runs(ranks, whole, tmp_path / "killed")
    return told
