# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Measures of the target beside the loss, on vocabulary shards: two passes of their own, in PyTorch on every device."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_selfdistill.loss.sharded.shard_sums import Chunk, mix_unit
from megatron_selfdistill.loss.sharded.vocab_parallel import VocabShard, gather_parts, make_shard
from megatron_selfdistill.loss.target import Target, check_arguments, mixed_logits

RARE = 1e-3
"""The probability below which a model counts a token as rare."""


class TargetMeasures(NamedTuple):
    """What a target q asks for, as seen from the models that it mixes, for T tokens; float64."""

    mass_on_rare: Tensor
    """The sum of q over the columns with p < `RARE`, and with a reference the same for its r in place of p; [T, 1] or
    [T, 2]."""
    kl_to_anchor: Tensor | None
    """KL(q || a) and KL(t || a) in nats, [T, 2], where a is the reference, or without one the student, and t the
    teacher alone; their ratio is the share of the teacher's news that the target lets through.  None if t is not
    given."""
    kl_of_control: Tensor | None = None
    """KL(c || a) and KL(t || c) in nats, [T, 2], with the mean c of the controls: what any hint makes the model do, and
    what only this one says.  None if c or t is not given."""


@torch.no_grad()
def target_measures(
    student_logits: Tensor,
    teacher_logits: Tensor,
    beta: Tensor,
    *,
    target: Target,
    vocab: VocabShard,
    reference_logits: Tensor | None = None,
    own_teacher_logits: Tensor | None = None,
    teacher_weights: Tensor | None = None,
    control_log_probs: Tensor | None = None,
) -> TargetMeasures:
    """Return the `TargetMeasures` of T tokens, equal on all ranks of ``vocab.group``.

    Shapes: all logits [T, vocab.size], any float dtype; beta [T]: `TokenStats.beta` of the same tokens and target.
    Reference: with ``target.is_anchored`` the teacher's logits are those of the mix, and ``teacher_weights [T]`` the w
    of each token, None the target's; as for `distillation_loss`.  ``own_teacher_logits``: those of the teacher alone.
    ``control_log_probs [T, vocab.size]``: c, or c and a number per token, with ``own_teacher_logits`` only.
    -inf: a column with -inf in the student counts as rare; one with -inf in a, where q or t has mass, gives inf.
    NaN: a token with NaN in its logits or beta gives NaN.
    Collectives: two all-gathers over ``vocab.group``, none for T = 0.
    Raises: ValueError if shapes do not fit.
    """
    check_arguments("target_measures", locals())
    optional = [logits for logits in (reference_logits, own_teacher_logits, control_log_probs) if logits is not None]
    shard = make_shard(student_logits, teacher_logits, target, vocab)
    models = [logits[:, : vocab.num_valid] for logits in (student_logits, *optional)]
    num_considered = 1 if reference_logits is None else 2
    mix_beta = beta.double() * mix_unit(target, teacher_weights)

    def scaled(rows: Chunk) -> list[tuple[Tensor, Tensor]]:
        """Return beta m and the logits of each model, as `_shifted` returns them."""
        (y, y_top), (z, z_top) = (_shifted(logits[rows], shard.dtype) for logits in (shard.student, shard.teacher))
        mix, top = mixed_logits(y, z, *shard.mix_weights), mixed_logits(y_top, z_top, *shard.mix_weights)
        here = mix_beta[rows]
        return [(here[:, None].to(shard.dtype) * mix, here * top), *(_shifted(m[rows], shard.dtype) for m in models)]

    def log_sums(rows: Chunk) -> Tensor:
        return torch.stack([values.logsumexp(1).double() + top for values, top in scaled(rows)], 1)

    parts = shard.over_rows(log_sums, 1 + len(models), empty=-math.inf, dtype=torch.float64)
    log_normalisers = gather_parts(parts, vocab.group).logsumexp(0)

    def measures(rows: Chunk) -> Tensor:
        (log_q, *log_probs) = (
            values + (top - log_normaliser)[:, None].to(values.dtype)
            for (values, top), log_normaliser in zip(scaled(rows), log_normalisers[rows].unbind(1), strict=True)
        )
        q, considered = log_q.exp(), log_probs[:num_considered]
        sums = [(q * (log_p < math.log(RARE))).sum(1) for log_p in considered]
        if own_teacher_logits is not None:
            log_t, anchor = log_probs[num_considered], considered[-1]
            pairs = [(log_q, anchor), (log_t, anchor)]
            if control_log_probs is not None:
                pairs += [(log_probs[-1], anchor), (log_t, log_probs[-1])]
            sums += [_kl_summands(*pair).sum(1) for pair in pairs]
        return torch.stack([column.double() for column in sums], 1)

    num_columns = num_considered + (0 if own_teacher_logits is None else 2 if control_log_probs is None else 4)
    found = gather_parts(shard.over_rows(measures, num_columns, dtype=torch.float64), vocab.group).sum(0)
    found = found.masked_fill(log_normalisers.isnan().any(1, keepdim=True), math.nan)
    masses, divergences = found[:, :num_considered], found[:, num_considered:]
    return TargetMeasures(
        masses,
        None if own_teacher_logits is None else divergences[:, :2],
        None if control_log_probs is None else divergences[:, 2:],
    )


def _kl_summands(log_p: Tensor, log_a: Tensor) -> Tensor:
    """Return p (log p - log a) per column, 0 where p is 0."""
    p = log_p.exp()
    return torch.where(p == 0, 0.0, p * (log_p - log_a))


def _shifted(logits: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return a chunk [n, columns] less the maximum of each row, and these maxima [n] float64; 0 for a row of -inf."""
    values = logits.to(dtype)
    top = values.amax(1)
    top = torch.where(torch.isneginf(top), 0.0, top)
    return values - top[:, None], top.double()
