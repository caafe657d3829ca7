# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The mass that the target puts on tokens to which the student or the reference gives almost no probability.

The training passes do not compute this mass: two passes over the logits of their own take it, in PyTorch on every
device, on the steps that measure it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megatron_selfdistill.loss.sharded.beta_grid import mix_unit
from megatron_selfdistill.loss.sharded.shard_sums import Chunk
from megatron_selfdistill.loss.sharded.vocab_parallel import VocabShard, gather_parts, make_shard
from megatron_selfdistill.loss.target import Target, mixed_logits

RARE = 1e-3
"""The probability below which a model counts a token as rare."""


@torch.no_grad()
def mass_on_rare(
    student_logits: Tensor,
    teacher_logits: Tensor,
    beta: Tensor,
    *,
    target: Target,
    vocab: VocabShard,
    reference_logits: Tensor | None = None,
    teacher_weights: Tensor | None = None,
) -> Tensor:
    """Return the sum of q over the columns with p < `RARE`, and the same for the reference's r in place of p.

    The result is [T, 1] float64, or [T, 2] with ``reference_logits``, equal on all ranks of ``vocab.group``.
    Shapes: all logits [T, vocab.size], any float dtype; beta [T]: `TokenStats.beta` of the same tokens and target.
    Reference: with ``target.is_anchored`` the teacher's logits are those of the mix, and ``teacher_weights [T]`` the w
    of each token, None the target's; as for `distillation_loss`.
    -inf: a column with -inf in the student counts as rare.  NaN: a token with NaN in its logits or beta gives NaN.
    Collectives: two all-gathers over ``vocab.group``, none for T = 0.
    Raises: ValueError if shapes do not fit.
    """
    expected = (len(beta), vocab.size)
    given = [logits for logits in (student_logits, teacher_logits, reference_logits) if logits is not None]
    if any(tuple(logits.shape) != expected for logits in given):
        raise ValueError(
            f"mass_on_rare: all logits must be {list(expected)}, a row per beta and the columns of this VocabShard; "
            f"got {[tuple(logits.shape) for logits in given]}."
        )
    shard = make_shard(student_logits, teacher_logits, target, vocab)
    models = [logits[:, : vocab.num_valid] for logits in (student_logits, reference_logits) if logits is not None]
    mix_beta = beta.double() * (mix_unit(target) if teacher_weights is None else 1 + teacher_weights.double())

    def scaled(rows: Chunk) -> list[tuple[Tensor, Tensor]]:
        """Return beta m and the logits of each model, as `_shifted` returns them."""
        (y, y_top), (z, z_top) = (_shifted(logits[rows], shard.dtype) for logits in (shard.student, shard.teacher))
        mix, top = mixed_logits(y, z, *shard.mix_weights), mixed_logits(y_top, z_top, *shard.mix_weights)
        here = mix_beta[rows]
        return [(here[:, None].to(shard.dtype) * mix, here * top), *(_shifted(m[rows], shard.dtype) for m in models)]

    def log_sums(rows: Chunk) -> Tensor:
        return torch.stack([values.logsumexp(1).double() + top for values, top in scaled(rows)], 1)

    num_models = len(models)
    parts = shard.over_rows(log_sums, 1 + num_models, empty=-math.inf, dtype=torch.float64)
    log_normalisers = gather_parts(parts, vocab.group).logsumexp(0)

    def masses(rows: Chunk) -> Tensor:
        (log_q, *log_probs) = (
            values + (top - log_normaliser)[:, None].to(values.dtype)
            for (values, top), log_normaliser in zip(scaled(rows), log_normalisers[rows].unbind(1), strict=True)
        )
        q = log_q.exp()
        return torch.stack([(q * (log_p < math.log(RARE))).sum(1).double() for log_p in log_probs], 1)

    mass = gather_parts(shard.over_rows(masses, num_models, dtype=torch.float64), vocab.group).sum(0)
    return mass.masked_fill(log_normalisers.isnan().any(1, keepdim=True), math.nan)


def _shifted(logits: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return a chunk [n, columns] less the maximum of each row, and these maxima [n] float64; 0 for a row of -inf."""
    values = logits.to(dtype)
    top = values.amax(1)
    top = torch.where(torch.isneginf(top), 0.0, top)
    return values - top[:, None], top.double()
