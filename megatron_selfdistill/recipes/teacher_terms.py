# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The teacher's signal with one weight for every token of a response with a hint."""

from __future__ import annotations

from megatron_selfdistill.recipes.signals import Signals, Terms


def uniform(signals: Signals, *, weight: float, signal: str) -> Terms:
    """Return ``weight`` for the tokens of all responses with a hint, and 0 for the others, as one of three signals.

    full: the divergence over the whole vocabulary.  sampled: its form for the sampled token, `Terms.sampled_kl`, which
    has the expectation of the reverse KL's gradient and more variance.  advantage: log q - log mu as an advantage, to
    which the clip applies (on-policy distillation as reinforcement learning).
    The second and third need `Signals.target_log_prob`.
    """
    like = signals.sampled_log_prob
    weights = weight * signals.per_token(signals.hinted.to(like))
    if signal == "full":
        return Terms.of(like, divergence=weights)
    if signal == "sampled":
        return Terms.of(like, sampled_kl=weights)
    assert signals.target_log_prob is not None, "the signal advantage needs a measuring pass"
    return Terms.of(like, advantage=weights * (signals.target_log_prob - like))
