# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""How one guided token is drawn: from the mixed target of what the same weights say behind two prompts.

    q = softmax(beta (w l_T + l_S)),  beta as in the loss

l_S are the logits behind the student's prompt and l_T those behind the teacher's, both with the same response so
far.  Needs torch only, so it also runs inside other engines' processes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_selfdistill.loss.sharded.vocab_parallel import VocabShard, solve_target
from megatron_selfdistill.loss.target import Target, mixed_logits
from megatron_selfdistill.rollout.base import Request, SamplingParams, invert_cdf, token_log_probs

# Elements of one float64 temporary: about what a core keeps in its cache, or what fills an accelerator.
_MAX_ELEMENTS = {"cpu": 2**20, "other": 2**24}


@dataclass(frozen=True)
class MixedTokens:
    """One token for each of b pairs; log-probabilities ``[b]`` float64, in nats."""

    token_ids: Tensor
    """``[b]`` int64."""
    student_log_probs: Tensor
    """log softmax(l_S) of the token."""
    teacher_log_probs: Tensor
    """log softmax(l_T) of the token."""
    mixed_log_probs: Tensor
    """log q of the token; 0 where greedy."""


def select_mixed_tokens(
    student_logits: Tensor,
    teacher_logits: Tensor,
    uniforms: Tensor,
    target: Target,
    *,
    greedy: bool,
    backend: str | None = None,
) -> MixedTokens:
    """Draw one token per pair of rows from the mixed target, by inverting its CDF in float64.

    token = min {v : sum_{i <= v} q_i > uniform}, with log q = log_softmax(beta m), m = w l_T + l_S and the beta that
    `loss.solve_target` finds, whatever rule ``target`` names; greedy: the argmax of m, the lowest id among equals.
    Equal logits in both rows give q = softmax(l_S), so what `base.select_tokens` draws.

    Shapes: both logits ``[b, V]`` of the valid vocabulary, any float dtype; uniforms ``[b]`` float64 in [0, 1), unused
    when greedy.  A row with NaN gives some valid token with log-probability NaN.  ``backend``: that of `solve_target`.
    Raises: ValueError if shapes do not fit.
    """
    if student_logits.dim() != 2 or student_logits.shape != teacher_logits.shape:
        raise ValueError(
            "select_mixed_tokens: both logits must be [b, V] of one shape; "
            f"got student {tuple(student_logits.shape)} and teacher {tuple(teacher_logits.shape)}."
        )
    if uniforms.shape != student_logits.shape[:1]:
        raise ValueError(
            f"select_mixed_tokens: uniforms must hold one number per row, ({student_logits.size(0)},); "
            f"got {tuple(uniforms.shape)}."
        )
    limit = _MAX_ELEMENTS["cpu" if student_logits.device.type == "cpu" else "other"]
    rows = max(1, limit // max(1, student_logits.size(1)))
    groups = zip(student_logits.split(rows), teacher_logits.split(rows), uniforms.split(rows), strict=True)
    drawn = [_select(student, teacher, some, target, greedy, backend) for student, teacher, some in groups]
    token_ids, student_log_probs, teacher_log_probs, mixed_log_probs = map(torch.cat, zip(*drawn, strict=True))
    return MixedTokens(token_ids, student_log_probs, teacher_log_probs, mixed_log_probs)


def refuse_unguidable(params: SamplingParams) -> None:
    """Raise ValueError where ``params`` would change the distribution that guided tokens are drawn from."""
    if params.temperature not in (0, 1) or params.top_k != 0 or params.top_p != 1:
        raise ValueError(
            "guided responses are drawn from the mixed target itself: they need temperature 1 (or 0, greedy), top_k 0 "
            f"and top_p 1; got temperature {params.temperature}, top_k {params.top_k} and top_p {params.top_p}"
        )


def longest_prompt(request: Request) -> int:
    """Tokens of the longer of a request's prompts: what must leave room for the response."""
    return max(len(request.prompt), len(request.teacher_prompt or ()))


def _select(
    student_logits: Tensor, teacher_logits: Tensor, uniforms: Tensor, target: Target, greedy: bool, backend: str | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    student, teacher = student_logits.double(), teacher_logits.double()
    mix = mixed_logits(student, teacher, *target.mix_weights)
    if greedy:
        tokens = mix.argmax(-1)  # torch: "the indices of the first maximal value"
        mixed_log_probs = mix.new_zeros(mix.size(0))
    else:
        vocab_size = mix.size(-1)
        vocab = VocabShard(0, vocab_size, vocab_size)
        solution = solve_target(student_logits, teacher_logits, target, vocab, backend=backend)
        # The normaliser has the accuracy of float32 sums; what is left of it `invert_cdf` divides out.
        log_q = torch.addcmul(-solution.log_normaliser[:, None], mix, solution.beta[:, None])
        tokens, mixed_log_probs = invert_cdf(log_q.exp_(), uniforms)
    return tokens, token_log_probs(student, tokens), token_log_probs(teacher, tokens), mixed_log_probs
