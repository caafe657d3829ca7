# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The two objectives of pi-Distill as a pure function of arrays."""

from __future__ import annotations

import pytest
import torch
from term_arrays import signals, tensor

from megatron_selfdistill.methods.parts.terms import group_advantages
from megatron_selfdistill.methods.pi_distill import pi_distill
from megatron_selfdistill.sources.signals import Clip
from megatron_selfdistill.sources.step_terms import RatioTerms


def test_pi_distill_trains_the_teacher_by_reward_and_the_student_by_imitation():
    """Two responses of the teacher, once after its own prompt and once after the plain one."""
    mu = [-0.2, -0.4, -0.1, -0.3, -0.2, -0.6]
    plain = [-0.9, -0.6, -0.3, -0.5, -0.2, -1.4]
    both = signals([1, 0, 1, 0], groups=[0, 0, 1, 1], lengths=[3] * 4, privileged=[True] * 2 + [False] * 2, mu=mu + mu)
    terms = pi_distill(both, group_advantages(both, "none"), beta=0.25, alpha=0.75)
    assert terms.divergence.tolist() == [2 * 0.75 * 0.25] * 6 + [0.0] * 6
    found = RatioTerms(terms, both.sampled_log_prob, None, Clip(ratio_cap=2.0))(tensor(*mu, *plain), torch.arange(12))
    share, ratios = 2 * 0.25, [0.496585, 0.818731, 0.818731, 0.818731, 1.0, 0.449329]
    advantages = [0.5] * 3 + [-0.5] * 3
    imitation = [share * (rho * advantage + 0.25) for rho, advantage in zip(ratios, advantages, strict=True)]
    assert found.policy.tolist() == pytest.approx([0.75] * 3 + [-0.75] * 3 + imitation, abs=1e-6)
