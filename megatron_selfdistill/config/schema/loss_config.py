# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The section ``loss`` of the schema: the divergence from the target, and how it is computed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from megatron_selfdistill.choices import DIVERGENCES, LOSS_BACKENDS, LOSS_FUSED, NORMALIZES, ROLLOUT_CORRECTIONS
from megatron_selfdistill.config.schema.field_checks import check_fields
from megatron_selfdistill.config.schema.ranges import (
    NonNegativeFloat,
    NonNegativeInt,
    OneOf,
    PositiveFloat,
    PositiveInt,
    above,
    below,
)


@dataclass(frozen=True)
class LossConfig:
    """The divergence between the target q and the student p, in nats per response token."""

    divergence: Annotated[str, OneOf(DIVERGENCES)] = "reverse_kl"
    """The divergence: reverse_kl = KL(p || q), forward_kl = KL(q || p), or jsd (generalised Jensen-Shannon)."""
    guided_divergence: Annotated[str, OneOf(DIVERGENCES)] | None = None
    """The divergence for the tokens of guided problems (rollout.guidance=mixed; with rollout.guide_below the problems
    below it); null is divergence."""
    jsd_lambda: Annotated[float, above(0), below(1)] = 0.5
    """Weight of q in the mixture of the divergence jsd."""
    backend: Annotated[str, OneOf(LOSS_BACKENDS)] | None = None
    """The implementation of the loss: torch, or triton (kernels for NVIDIA GPUs).  Null takes triton where the logits
    are on a GPU and triton is installed, otherwise torch; the log names the choice and the reason."""
    rollout_correction: Annotated[str, OneOf(ROLLOUT_CORRECTIONS)] = "none"
    """Importance weight of each token's divergence: none, truncated: min(p / mu, rollout_correction_cap), where p is
    the student's probability of the token and mu its probability under the distribution that sampled it (another
    engine, or the guided mix), or truncated_sequence: the same with the mean of p / mu over the tokens of the
    response."""
    rollout_correction_cap: PositiveFloat = 2.0
    """The largest importance weight under rollout_correction."""
    normalize: Annotated[str, OneOf(NORMALIZES)] = "tokens"
    """The things that the loss is a mean over: tokens (all response tokens alike), sequences (the tokens of each
    response, then the responses) or prompts (the sum over the tokens of all responses to a problem, then the
    problems)."""
    skip_first_tokens: NonNegativeInt = 0
    """Number of tokens at the start of each response that are not trained on."""
    fused: Annotated[str, OneOf(LOSS_FUSED)] | None = None
    """The computation of the output layer: none (all logits of a microbatch, of student and teacher, exist at once), or
    together with the loss in chunks of tokens: keep_gradient (the gradient of the student's logits is kept until
    backward) or low_memory (backward computes the logits again, with half as many GEMMs more).  Null takes the first of
    none, keep_gradient and low_memory that stays within max_logits_gb, or low_memory.  Own solutions are scored in the
    same chunks.  Only self-distillation can be fused; the baselines cannot."""
    fused_chunk_tokens: PositiveInt = 4096
    """Number of response tokens in a chunk of the fused output layer."""
    max_logits_gb: NonNegativeFloat | None = None
    """Memory that the logits of the largest microbatch may take on a rank under fused=null, in GiB; null is 1/20 of
    cluster.gpu_memory_gb."""

    def __post_init__(self) -> None:
        check_fields("loss", self)
