# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Rollouts within a run: the state after an engine fails, the weights of tokens, the choice of guided problems."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import tiny_run
from tiny_run import assert_equal_runs, overrides, reproducible_metrics, saved_step, train

from megatron_selfdistill.train import EXIT_NO_ROLLOUT


def start_with_an_engine_that_dies_in_the_fifth_step(arguments: list[str]) -> int:
    from megatron_selfdistill.errors import EngineError
    from megatron_selfdistill.rollout.megatron.megatron_sampler import MegatronSampler

    generate, calls = MegatronSampler.generate, []

    def generate_or_die(self: Any, requests: Any, params: Any) -> Any:
        calls.append(requests)
        if len(calls) == 5:
            raise EngineError("the engine on rank 0 died: expected 8 responses, got 3")
        return generate(self, requests, params)

    return tiny_run.start_with(arguments, MegatronSampler, "generate", generate_or_die)


@pytest.mark.full
def test_a_run_whose_engine_died_goes_on_as_if_it_had_not(ranks, data, tmp_path):
    train(ranks, overrides(data, tmp_path / "whole"), world_size=2)
    start, broken = start_with_an_engine_that_dies_in_the_fifth_step, overrides(data, tmp_path / "broken")
    train(ranks, broken, world_size=2, start=start, expected=EXIT_NO_ROLLOUT)
    assert saved_step(tmp_path / "broken") == 4, "the four steps that were done are kept"
    train(ranks, broken, world_size=2)
    assert_equal_runs(ranks, tmp_path / "whole", tmp_path / "broken")


def test_truncated_importance_weights_are_those_of_the_recorded_probabilities(ranks, data, tmp_path):
    """Replay responses with log-probs of 1.25 times or a third of the student's probability.

    The weights of their tokens are 1 / 1.25 and the cap.
    """
    options = ["num_steps=1", "loss.rollout_correction=truncated", "loss.rollout_correction_cap=1.5"]
    recorded, changed = tmp_path / "recorded.jsonl", tmp_path / "changed.jsonl"
    train(ranks, overrides(data, tmp_path / "plain", *options, f"tests.record={recorded}"))
    [plain] = reproducible_metrics(tmp_path / "plain")
    assert plain["correction/weight_mean"] == pytest.approx(1, abs=1e-5) and plain["correction/capped"] == 0
    num_tokens, num_small = 0, 0
    with changed.open("w") as lines:
        for number, record in enumerate(map(json.loads, recorded.read_text().splitlines())):
            factor = 1.25 if number % 2 else 1 / 3
            record["sampled_log_probs"] = [value + math.log(factor) for value in record["log_probs"]]
            num_tokens += len(record["token_ids"])
            num_small += 0 if number % 2 else len(record["token_ids"])
            lines.write(json.dumps(record) + "\n")
    replay = [f"tests.replay={changed}", "guards.max_log_prob_distance=null"]
    train(ranks, overrides(data, tmp_path / "weighted", *options, *replay), world_size=2)
    [weighted] = reproducible_metrics(tmp_path / "weighted")
    assert weighted["correction/capped"] == pytest.approx(num_small / num_tokens)
    mean = (1.5 * num_small + (num_tokens - num_small) / 1.25) / num_tokens
    assert weighted["correction/weight_mean"] == pytest.approx(mean, abs=1e-4)
    assert weighted["gradient_norm"] != pytest.approx(plain["gradient_norm"], rel=1e-3)
