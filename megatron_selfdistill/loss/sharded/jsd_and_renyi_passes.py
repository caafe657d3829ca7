# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The passes over one vocabulary shard that only the Jensen-Shannon and the Renyi divergence need."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_selfdistill.loss.jsd_and_renyi import FAR, jsd_terms, log_mixture_over_p, renyi_sums
from megatron_selfdistill.loss.sharded.shard_sums import Chunk, Shard, TokenConstants, row_log_probs, row_probabilities
from megatron_selfdistill.loss.target import Divergence


def jsd_pass(shard: Shard, constants: TokenConstants, jsd_lambda: float) -> Tensor:
    """Return [num_parts, T, 2]: this shard's sums of the JSD and of KL(p || M)."""

    def work(rows: Chunk) -> Tensor:
        p, q, d = row_probabilities(shard, constants.rows(rows), rows)
        jsd = jsd_terms(p, q, d, jsd_lambda).sum(1)
        return torch.stack([jsd, log_mixture_over_p(d, jsd_lambda).mul_(p).sum(1).neg_()], dim=1)

    return shard.over_rows(work, 2)


def renyi_pass(shard: Shard, constants: TokenConstants, divergence: Divergence) -> Tensor:
    """Return [num_parts, T, 2]: this shard's Z - 1 and log Z of the Renyi divergence, see `divergence.renyi_sums`.

    A shard of padding only has 0 and a log Z that stands for -inf.
    """

    def work(rows: Chunk) -> Tensor:
        return renyi_sums(*row_log_probs(shard, constants.rows(rows), rows), divergence)

    sums = shard.over_rows(work, 2)
    if shard.student.shape[1] == 0:
        sums[..., 1] = -10 * FAR
    return sums
