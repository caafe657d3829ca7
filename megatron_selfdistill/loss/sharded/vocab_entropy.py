# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The entropy of a model's own softmax over a sharded vocabulary, from the first pass of the loss alone."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_selfdistill.loss.sharded.backend import chosen
from megatron_selfdistill.loss.sharded.beta_grid import BetaGrid
from megatron_selfdistill.loss.sharded.shard_sums import FIRST_PASS, Shard
from megatron_selfdistill.loss.sharded.token_statistics import Softmax
from megatron_selfdistill.loss.sharded.vocab_parallel import VocabShard, gather_parts
from megatron_selfdistill.loss.target import Target

_COLUMNS = [FIRST_PASS.index(f"student_{name}") for name in ("max", "tail", "first", "argmax")]


@torch.no_grad()
def vocab_entropy(logits: Tensor, vocab: VocabShard, *, backend: str | None = None) -> Tensor:
    """Return H(softmax(logits)) of T tokens in nats, [T] float64, equal on all ranks of ``vocab.group``.

    Shapes, ranks, backend, -inf and NaN: as `distillation_loss`.
    Collectives: one all-gather over ``vocab.group``, none for T = 0.
    Raises: ValueError if the shape does not fit, or for a backend that cannot run.
    """
    if logits.dim() != 2 or logits.shape[1] != vocab.size:
        raise ValueError(f"vocab_entropy: logits must be [T, {vocab.size}]; got {tuple(logits.shape)}.")
    dtype = torch.promote_types(logits.dtype, torch.float32)
    backend_in_use, valid = chosen(backend, logits, logits), logits[:, : vocab.num_valid]
    num_parts = backend_in_use.num_parts(len(logits), vocab.size)
    shard = Shard(valid, valid, (1.0, 0.0), dtype, num_parts)
    sums, _ = backend_in_use.first_pass(shard, BetaGrid.of(Target("teacher_alone"), dtype), None, vocab.start)
    parts = gather_parts(sums[..., _COLUMNS], vocab.group).double()
    return Softmax.merge(*parts.unbind(2)).entropy
