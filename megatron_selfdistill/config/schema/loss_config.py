# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The section ``loss`` of the schema: the divergence from the target, and how it is computed."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_selfdistill.choices import DIVERGENCES, LOSS_BACKENDS, LOSS_FUSED, NORMALIZES, ROLLOUT_CORRECTIONS
from megatron_selfdistill.config.schema.field_checks import at_least, normalise, one_of, require


@dataclass(frozen=True)
class LossConfig:
    """The divergence between the target q and the student p, in nats per response token."""

    divergence: str = "reverse_kl"
    """The divergence: reverse_kl = KL(p || q), forward_kl = KL(q || p), or jsd (generalised Jensen-Shannon)."""
    guided_divergence: str | None = None
    """The divergence for the tokens of guided problems (rollout.guidance=mixed; with rollout.guide_below the problems
    below it); null is divergence."""
    jsd_lambda: float = 0.5
    """Weight of q in the mixture of the divergence jsd."""
    backend: str | None = None
    """The implementation of the loss: torch, or triton (kernels for NVIDIA GPUs).  Null takes triton where the logits
    are on a GPU and triton is installed, otherwise torch; the log names the choice and the reason."""
    rollout_correction: str = "none"
    """Importance weight of each token's divergence: none, truncated: min(p / mu, rollout_correction_cap), where p is
    the student's probability of the token and mu its probability under the distribution that sampled it (another
    engine, or the guided mix), or truncated_sequence: the same with the mean of p / mu over the tokens of the
    response."""
    rollout_correction_cap: float = 2.0
    """The largest importance weight under rollout_correction."""
    normalize: str = "tokens"
    """The things that the loss is a mean over: tokens (all response tokens alike), sequences (the tokens of each
    response, then the responses) or prompts (the sum over the tokens of all responses to a problem, then the
    problems)."""
    skip_first_tokens: int = 0
    """Number of tokens at the start of each response that are not trained on."""
    fused: str | None = None
    """The computation of the output layer: none (all logits of a microbatch, of student and teacher, exist at once), or
    together with the loss in chunks of tokens: keep_gradient (the gradient of the student's logits is kept until
    backward) or low_memory (backward computes the logits again, with half as many GEMMs more).  Null takes the first of
    none, keep_gradient and low_memory that stays within max_logits_gb, or low_memory.  Own solutions are scored in the
    same chunks.  Only self-distillation can be fused; the baselines cannot."""
    fused_chunk_tokens: int = 4096
    """Number of response tokens in a chunk of the fused output layer."""
    max_logits_gb: float | None = None
    """Memory that the logits of the largest microbatch may take on a rank under fused=null, in GiB; null is 1/20 of
    cluster.gpu_memory_gb."""

    def __post_init__(self) -> None:
        normalise("loss", self)
        if self.backend is not None:
            one_of("loss.backend", self.backend, LOSS_BACKENDS)
        if self.fused is not None:
            one_of("loss.fused", self.fused, LOSS_FUSED)
        at_least(1, "loss", self, "fused_chunk_tokens")
        at_least(0, "loss", self, "max_logits_gb skip_first_tokens")
        one_of("loss.normalize", self.normalize, NORMALIZES)
        one_of("loss.rollout_correction", self.rollout_correction, ROLLOUT_CORRECTIONS)
        require(
            self.rollout_correction_cap > 0,
            f"loss.rollout_correction_cap must be positive, got {self.rollout_correction_cap}",
        )
        one_of("loss.divergence", self.divergence, DIVERGENCES)
        if self.guided_divergence is not None:
            one_of("loss.guided_divergence", self.guided_divergence, DIVERGENCES)
        require(0 < self.jsd_lambda < 1, f"loss.jsd_lambda must lie in (0, 1), got {self.jsd_lambda}")
