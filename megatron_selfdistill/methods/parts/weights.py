# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The weights of response tokens from the signals of a step: by a name, or by a function of the user."""

from __future__ import annotations

from copy import deepcopy

from torch import Tensor

from megatron_selfdistill.config import RolloutConfig
from megatron_selfdistill.config.functions import function_named
from megatron_selfdistill.errors import VerifierError
from megatron_selfdistill.loss.token_weights import evidence, iw_opd
from megatron_selfdistill.methods.parts.settings import WeightSettings
from megatron_selfdistill.sources.signals import Signals, reach_of


def weights_by_name(settings: WeightSettings, rollout: RolloutConfig, signals: Signals) -> Tensor:
    """Return the weights [R] float64 that ``settings.token_weights`` names (loss/token_weights.py); see `reach_of`.

    q is the target of the loss, which with a target of the teacher alone is the teacher.
    """
    target, student = signals.target_log_prob, signals.student_log_prob
    assert target is not None and student is not None, "the weights need a measuring pass"
    if settings.token_weights == "reach":
        return reach_of(signals, rollout, exponent=settings.reach_exponent)
    if settings.token_weights == "iw_opd":
        return iw_opd(target, student, signals.lengths.tolist(), gain=settings.iw_gain)
    return evidence(target, student, margin=settings.evidence_margin)


def weights_of_function(name: str, signals: Signals) -> Tensor:
    """Return the weights [R] float64 of the user's function ``name``.

    Raises: `VerifierError` where the function fails, or returns anything but one finite number of at least 0 per token.
    """
    weights = function_named("method.token_weights", name, {}, VerifierError)(deepcopy(signals))
    number = len(signals.sampled_log_prob)
    expected = f"method.token_weights={name}: expected a tensor of {number} finite numbers of at least 0"
    if not isinstance(weights, Tensor) or weights.shape != signals.sampled_log_prob.shape:
        got = f"shape {tuple(weights.shape)}" if isinstance(weights, Tensor) else type(weights).__name__
        raise VerifierError(f"{expected}, got {got}")
    weights = weights.to(signals.sampled_log_prob)
    if not bool((weights.isfinite() & (weights >= 0)).all()):
        raise VerifierError(f"{expected}, got {weights.min().item():g} to {weights.max().item():g}")
    return weights
