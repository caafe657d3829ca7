# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""A step that trains on no token is a warning that names the keys that can cause it."""

from __future__ import annotations

import pytest
from omegaconf import OmegaConf

from megatron_selfdistill.config import from_mapping
from megatron_selfdistill.metrics.untrained_step import warning_of_an_untrained_step

TRAINED = {"tokens/response": 40.0, "loss/mean": 0.1}


def warning(metrics: dict[str, float], *keys: str) -> str | None:
    return warning_of_an_untrained_step(from_mapping(OmegaConf.from_dotlist(list(keys))), 3, metrics)


@pytest.mark.parametrize(
    ("metrics", "keys", "words"),
    [
        ({"correction/weight_mean": 0.0}, ["loss.skip_first_tokens=50"], "look at loss.skip_first_tokens=50"),
        (
            {"terms/silent_share": 1.0},
            ["policy.weight=1", "rollout.num_samples=2", "loss.skip_first_tokens=2"],
            "look at loss.skip_first_tokens=2, policy.reward=null (equal rewards train nothing)",
        ),
        (
            {"terms/silent_share": 1.0},
            ["rollout.select=balance", "rollout.num_samples=2"],
            "look at rollout.select=balance",
        ),
    ],
)
def test_a_step_whose_tokens_all_have_no_weight_is_a_warning_with_the_keys_that_can_cause_it(metrics, keys, words):
    text = warning(TRAINED | metrics, *keys) or ""
    assert text.startswith("warning: step 3 trains on nothing") and "got 40 tokens without one" in text
    assert text.endswith(words)


def test_a_step_without_any_response_is_a_warning():
    assert "got 0 tokens without one; look at data.on_long_context=drop" in (
        warning({"tokens/rollout": 0.0}, "data.on_long_context=drop") or ""
    )


@pytest.mark.parametrize("metrics", [{}, {"correction/weight_mean": 0.01}, {"terms/silent_share": 0.99}])
def test_a_step_that_trains_on_one_token_is_no_warning(metrics):
    assert warning(TRAINED | metrics, "loss.skip_first_tokens=50") is None
