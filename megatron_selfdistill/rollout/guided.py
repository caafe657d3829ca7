# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The sampling of one guided token from the mixed target of the same weights under two prompts.

    q = softmax(beta (w l_T + l_S)),  beta as in the loss

l_S are the logits under the student's prompt and l_T the logits under the teacher's prompt, both with the same response
so far.  The module needs torch only, so that it also runs inside other engines' processes.
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
    """One token for each of b pairs of contexts; log-probabilities are ``[b]`` float64, in nats."""

    token_ids: Tensor
    """Sampled token ids ``[b]`` int64."""
    student_log_probs: Tensor
    """Log softmax(l_S) of each token."""
    teacher_log_probs: Tensor
    """Log softmax(l_T) of each token."""
    mixed_log_probs: Tensor
    """Log q of each token; 0 where greedy."""


def select_mixed_tokens(
    student_logits: Tensor,
    teacher_logits: Tensor,
    uniforms: Tensor,
    target: Target,
    *,
    greedy: bool,
    backend: str | None = None,
) -> MixedTokens:
    """Sample one token per pair of rows from the mixed target, by inverting its cumulative distribution in float64.

    token = min {v : sum_{i <= v} q_i > uniform}, with log q = log_softmax(beta m), m = w l_T + l_S and the beta that
    `loss.solve_target` finds, whatever rule ``target`` names; greedy: the argmax of m, the lowest id among equals.
    Equal logits in both rows give q = softmax(l_S), from which `base.select_tokens` samples.

    Shapes: both logits ``[b, V]`` of the valid vocabulary, any float dtype; uniforms ``[b]`` float64 in [0, 1), unused
    when greedy.  A row with NaN gives a valid token with log-probability NaN.  ``backend`` is the backend of
    `solve_target`.

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
    sampled = [_select(student, teacher, some, target, greedy, backend) for student, teacher, some in groups]
    token_ids, student_log_probs, teacher_log_probs, mixed_log_probs = map(torch.cat, zip(*sampled, strict=True))
    return MixedTokens(token_ids, student_log_probs, teacher_log_probs, mixed_log_probs)


def refuse_unguidable(params: SamplingParams) -> None:
    """Raise ValueError if ``params`` would change the distribution from which guided tokens are sampled."""
    if params.temperature not in (0, 1) or params.top_k != 0 or params.top_p != 1:
        raise ValueError(
            "guided responses are sampled from the mixed target itself: they need temperature 1 (or 0, greedy), "
            f"top_k 0 and top_p 1; got temperature {params.temperature}, top_k {params.top_k} and top_p {params.top_p}"
        )


def longest_prompt(request: Request) -> int:
    """Return the number of tokens of the longer prompt of a request, which must leave room for the response."""
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
        # The normaliser has the accuracy of float32 sums; `invert_cdf` divides by what remains of it.
        log_q = torch.addcmul(-solution.log_normaliser[:, None], mix, solution.beta[:, None])
        tokens, mixed_log_probs = invert_cdf(log_q.exp_(), uniforms)
    return tokens, token_log_probs(student, tokens), token_log_probs(teacher, tokens), mixed_log_probs
