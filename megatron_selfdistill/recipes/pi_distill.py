# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""pi-Distill: the teacher's responses train the teacher by reward and the student by imitation, with shared weights."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_selfdistill.recipes.signals import Signals, Terms


def pi_distill(signals: Signals, advantages: Tensor, *, beta: float, alpha: float) -> Terms:
    """Return the terms of pi-Distill, whose responses occur twice: after the privileged prompt and after the plain one.

    With the teacher pi_T (after the privileged prompt), the student pi_S (after the plain prompt), rho = pi_S / pi_T,
    A = ``advantages [B]`` and sg = a constant, the objective is alpha J_T + (1 - alpha) J_S:

        J_T = E[A] - beta KL(pi_T || sg pi_S)        privileged: w = alpha beta,  advantage alpha A
        J_S = E[rho A] - beta KL(sg pi_T || pi_S)    plain: advantage (1 - alpha) A,  likelihood (1 - alpha) beta

    The divergence of the privileged response must be reverse KL to the model after the plain prompt, which is the
    teacher of that context.  All terms are doubled, because each objective is a mean over its own half of the tokens.
    Source: Penaloza et al. (arXiv 2602.04942).
    """
    privileged = signals.per_token(signals.privileged)
    advantage = signals.per_token(advantages)
    weight = 2 * torch.where(privileged, alpha, 1 - alpha).to(advantage)
    return Terms.of(
        signals.sampled_log_prob,
        divergence=torch.where(privileged, weight * beta, 0.0),
        advantage=weight * advantage,
        likelihood=torch.where(privileged, 0.0, weight * beta),
    )
