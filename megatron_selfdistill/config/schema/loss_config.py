# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The section loss: the distance to the target, and how it is computed."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_selfdistill.choices import DIVERGENCES, LOSS_BACKENDS, LOSS_FUSED, ROLLOUT_CORRECTIONS
from megatron_selfdistill.config.schema.field_checks import at_least, normalise, one_of, require


@dataclass(frozen=True)
class LossConfig:
    """The divergence between the target q and the student p, in nats per response token."""

    divergence: str = "reverse_kl"
    """reverse_kl = KL(p || q), forward_kl = KL(q || p), or jsd (generalised Jensen-Shannon)."""
    jsd_lambda: float = 0.5
    """The mixture weight of q in the generalised Jensen-Shannon divergence."""
    backend: str | None = None
    """torch, or triton (kernels for NVIDIA GPUs).  null: triton where the logits are on a GPU and triton is installed,
    else torch; the log says which and why."""
    rollout_correction: str = "none"
    """none, or truncated: each token's loss is weighted by min(p / mu, rollout_correction_cap), p the student's
    probability of the token and mu that of the distribution it was drawn from (another engine's, or the guided mix)."""
    rollout_correction_cap: float = 2.0
    """Largest importance weight."""
    fused: str | None = None
    """The output layer: none (all logits of a microbatch exist at once, student's and teacher's), or fused with the
    loss in chunks of tokens: keep_gradient (the gradient of the student's logits is kept until backward) or low_memory
    (backward makes the logits again: half as many GEMMs more).  Null: none if that stays within max_logits_gb, else
    keep_gradient if that does, else low_memory.  Where it is fused, own solutions are scored in such chunks, too.
    Self-distillation only; baselines are never fused."""
    fused_chunk_tokens: int = 4096
    """Response tokens of a chunk."""
    max_logits_gb: float | None = None
    """With fused=null: what the logits of the largest microbatch may take on a rank, in GiB; null: 1/20 of
    cluster.gpu_memory_gb."""

    def __post_init__(self) -> None:
        normalise("loss", self)
        if self.backend is not None:
            one_of("loss.backend", self.backend, LOSS_BACKENDS)
        if self.fused is not None:
            one_of("loss.fused", self.fused, LOSS_FUSED)
        at_least(1, "loss", self, "fused_chunk_tokens")
        at_least(0, "loss", self, "max_logits_gb")
        one_of("loss.rollout_correction", self.rollout_correction, ROLLOUT_CORRECTIONS)
        require(
            self.rollout_correction_cap > 0,
            f"loss.rollout_correction_cap must be positive, got {self.rollout_correction_cap}",
        )
        one_of("loss.divergence", self.divergence, DIVERGENCES)
        require(0 < self.jsd_lambda < 1, f"loss.jsd_lambda must lie in (0, 1), got {self.jsd_lambda}")
