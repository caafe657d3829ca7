# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The target that guided responses are sampled from is the target of their tokens in the loss."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from megatron_selfdistill.config import Config, RolloutConfig, TargetConfig
from megatron_selfdistill.loss.target import Target
from megatron_selfdistill.sources.configured_source import step_sampling

RUN_DATA = SimpleNamespace(stop_token_ids=(1,), num_sampled_ids=9, num_controls=0)


def sampled_target(batch_k: float | None = None, rule: str = "entropy_matched", **teachers: object) -> Target:
    """Return the target of the sampling parameters of a run with the anchor reference and ``teachers``."""
    target, rollout = TargetConfig(rule=rule, anchor="reference"), RolloutConfig(guidance="mixed")
    return step_sampling(Config(target=target, rollout=rollout, teachers=teachers), RUN_DATA, batch_k).target


def test_guided_tokens_are_sampled_with_the_weight_of_the_teacher_that_guides() -> None:
    assert sampled_target() == Target(anchor="reference", teacher_weight=0.75)
    own = sampled_target(math={"weight": 2.0}, default={}, guide="math")
    assert own == Target(anchor="reference", teacher_weight=2.0) and own.k_bound == 3.0
    assert sampled_target(math={"weight": 2.0}, default={}, guide="default") == sampled_target()


def test_guided_tokens_are_sampled_with_the_k_of_the_step() -> None:
    assert [sampled_target(k, rule="batch").k for k in (1.4, None)] == [1.4, None]


def test_a_number_that_belongs_to_one_weight_is_refused() -> None:
    for target in (
        Target(k_max=1.5, anchor="student"),
        Target("fixed", k=1.5, anchor="student"),
        Target("batch", k_max=2, k=1.1, anchor="student"),
    ):
        with pytest.raises(ValueError, match="must not be a number where tokens have different teacher weights"):
            target.with_teacher_weight(2.0)
    assert Target("fixed", k_max=1.5, anchor="student").with_teacher_weight(2.0).geometric_k == 3.0
