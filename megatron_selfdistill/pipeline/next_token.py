# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The loss of the next token, which the baselines without a teacher train on."""

from __future__ import annotations

from dataclasses import fields

import torch
from torch import Tensor

from megatron_selfdistill.compat import repairs  # noqa: F401  isort: skip  (must come before megatron.core)
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

from megatron_selfdistill.loss.sharded.vocab_parallel import NO_OPTIONS, TokenOptions, TokenStats, VocabShard


def next_token(
    student: Tensor,
    teacher: Tensor | None,
    response_tokens: Tensor,
    vocab: VocabShard,
    options: TokenOptions = NO_OPTIONS,
) -> TokenStats:
    """Return -log p(response token) over the valid vocabulary, in nats, by Megatron's vocab-parallel cross entropy.

    ``loss`` and ``student_log_prob``, the same number with the other sign, are differentiable.
    The function overwrites ``student``: the padding becomes -inf, and in float32 the logits become the softmax and then
    the gradient.  In bf16 the softmax and the gradient take the place of a float32 copy
    (`model.forward.next_token_copies`).
    """
    with torch.no_grad():
        student[:, vocab.num_valid :] = float("-inf")
    loss = vocab_parallel_cross_entropy(student.float().unsqueeze(1), response_tokens.unsqueeze(1)).squeeze(1)
    unknown = torch.full_like(loss.detach(), float("nan"))
    values = {f.name: unknown for f in fields(TokenStats)}
    values |= {"loss": loss, "student_log_prob": -loss, "status": torch.zeros_like(response_tokens)}
    values |= {"grid_betas": unknown[:0], "grid_entropies": unknown.new_empty(len(loss), 0)}
    return TokenStats(**values)
