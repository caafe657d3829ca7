# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The target that guided responses are sampled from is the target of their tokens in the loss."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from megatron_selfdistill.config import Config, RolloutConfig, TargetConfig
from megatron_selfdistill.loss.target import Target
from megatron_selfdistill.rollout.factory import sampling_params

RUN_DATA = SimpleNamespace(stop_token_ids=(1,), num_sampled_ids=9, num_controls=0)


def sampled_target(batch_k: float | None = None, **target: object) -> Target:
    """Return the target of the sampling parameters under ``target`` with the anchor reference."""
    rollout = RolloutConfig(guidance="mixed")
    config = Config(target=TargetConfig(anchor="reference", **target), rollout=rollout)
    return sampling_params(config, RUN_DATA, batch_k).target


def test_guided_tokens_are_sampled_with_their_own_weight_of_the_teacher() -> None:
    assert sampled_target() == Target(anchor="reference", teacher_weight=0.75)
    own = sampled_target(guided_teacher_weight=2.0)
    assert own == Target(anchor="reference", teacher_weight=2.0)
    assert own.k_bound == 3.0


def test_the_k_of_a_step_is_in_proportion_to_1_plus_w() -> None:
    assert sampled_target(1.4, rule="batch", guided_teacher_weight=2.5).k == pytest.approx(2.8)
    assert sampled_target(None, rule="batch", guided_teacher_weight=2.5).k is None
    assert sampled_target(1.4, rule="batch").k == 1.4


def test_a_number_that_belongs_to_one_weight_is_refused() -> None:
    for target in (
        Target(k_max=1.5, anchor="student"),
        Target("fixed", k=1.5, anchor="student"),
        Target("batch", k_max=2, k=1.1, anchor="student"),
    ):
        with pytest.raises(ValueError, match="must not be a number where tokens have different teacher weights"):
            target.with_teacher_weight(2.0)
    assert Target("fixed", k_max=1.5, anchor="student").with_teacher_weight(2.0).geometric_k == 3.0
