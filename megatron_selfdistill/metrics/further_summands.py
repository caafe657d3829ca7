# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The summands of the metrics that not every step has: those of its coefficients and of its measures."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megatron_selfdistill.loss.weighting import Coefficients

if TYPE_CHECKING:  # the metrics of a run are also read without Megatron
    from megatron_selfdistill.pipeline.token_measures import TokenMeasures


def coefficient_values(coefficients: Coefficients, weight_cap: float) -> dict[str, Tensor]:
    """Return the summands of `step_metrics` for the coefficients of the tokens, [R] float64 each."""
    weights = coefficients.divergence.double()
    one = torch.ones_like(weights)
    if coefficients.policy is None:
        capped = (weights >= weight_cap).double()
        return {"weighted": one, "correction/weight_mean": weights, "correction/capped": capped}
    policy = coefficients.policy.double()
    values = {
        "two_terms": one,
        "terms/divergence_mean": weights,
        "terms/policy_mean": policy,
        "terms/policy_abs_mean": policy.abs(),
        "terms/silent_share": ((weights == 0) & (policy == 0)).double(),
    }
    if coefficients.clipped is not None:
        values |= {"may_be_clipped": one, "terms/clipped_share": coefficients.clipped.double()}
    return values


def measured_values(measures: TokenMeasures) -> dict[str, Tensor]:
    """Return the summands [R] float64 of what a target asks for, with the counts of the tokens that have them."""
    one, reference = measures.measured.double(), measures.mass_on_rare_reference
    values = {"with_measures": one, "target/mass_on_rare_student": measures.mass_on_rare_student}
    if reference is not None:
        values |= {"with_reference": one, "target/mass_on_rare_reference": reference}
    if measures.kl_to_anchor is not None:
        of_target, of_teacher = measures.kl_to_anchor.unbind(1)
        values |= {"with_kl": one, "teacher/kl_to_anchor": of_teacher}
        values |= {"kl_to_anchor": of_teacher, "target/let_through": of_target}
    if measures.kl_of_control is not None:
        general, specific = measures.kl_of_control.unbind(1)
        values |= {"with_control": one, "control/general": general, "control/specific": specific}
    return values
