# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The reference of guided decoding: transformers in float64, a bisection of its own, and the inversion of the CDF."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import Qwen2ForCausalLM

from megatron_selfdistill.rollout.base import Request, Response, SamplingParams, sample_uniforms


@torch.no_grad()
def reference_logits(model: Qwen2ForCausalLM, prompt: list[int], token_ids: list[int]) -> Tensor:
    """Return the logits ``[n, V]`` in float64; row i predicts token i."""
    logits: Tensor = model(torch.tensor([prompt + token_ids])).logits[0].double()
    return logits[len(prompt) - 1 : -1]


def mixed_log_q(student: Tensor, teacher: Tensor, w: float) -> Tensor:
    """Return log q of rows ``[.., V]`` at the entropy-matched k, by bisection in [(1 + w) / 16, 1 + w], H(q) = H(p)."""

    def entropy(log_p: Tensor) -> Tensor:
        return -(log_p.exp() * log_p).sum(-1)

    mix, wanted = w * teacher + student, entropy(student.log_softmax(-1))
    low, high = torch.full_like(wanted, (1 + w) / 16), torch.full_like(wanted, 1 + w)
    for _ in range(60):
        k = (low + high) / 2
        too_sharp = entropy((mix / k[..., None]).log_softmax(-1)) < wanted
        low, high = torch.where(too_sharp, k, low), torch.where(too_sharp, high, k)
    return (mix / high[..., None]).log_softmax(-1)


def assert_each_token_is_the_references(
    model: Qwen2ForCausalLM, requests: Sequence[Request], responses: Sequence[Response], params: SamplingParams
) -> int:
    """Compare every token with the reference, and return the number of tokens that were compared."""
    wrong, total = [], 0
    for number, (request, response) in enumerate(zip(requests, responses, strict=True)):
        assert request.teacher_prompt is not None and response.teacher_log_probs is not None
        tokens = torch.tensor(response.token_ids)
        student = reference_logits(model, request.prompt, response.token_ids)
        teacher = reference_logits(model, request.teacher_prompt, response.token_ids)
        log_q = mixed_log_q(student, teacher, 0.75)
        if params.temperature == 0:
            expected = (0.75 * teacher + student).argmax(-1)
            mixed_log_probs = torch.zeros(len(tokens), dtype=torch.float64)
        else:
            uniforms = torch.from_numpy(sample_uniforms(request.seed, len(tokens)))
            expected = torch.searchsorted(log_q.exp().cumsum(-1), uniforms[:, None], right=True)[:, 0]
            mixed_log_probs = log_q.gather(-1, tokens[:, None])[:, 0]
        wrong += [(number, position) for position in (tokens != expected).nonzero().flatten().tolist()]
        for got, log_p in [(response.log_probs, student), (response.teacher_log_probs, teacher)]:
            own = log_p.log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
            torch.testing.assert_close(torch.tensor(got, dtype=torch.float64), own, rtol=0, atol=2e-4)
        sampled = torch.tensor(response.sampled_log_probs, dtype=torch.float64)
        torch.testing.assert_close(sampled, mixed_log_probs, rtol=0, atol=5e-4)
        assert not set(response.token_ids[:-1]) & set(params.stop_token_ids)
        ended = response.token_ids[-1] in params.stop_token_ids
        assert response.finish_reason == ("stop" if ended else "length")
        assert ended or len(response.token_ids) == params.max_new_tokens
        total += len(tokens)
    assert not wrong, f"{len(wrong)} of {total} tokens differ, the first at (response, position) {wrong[0]}"
    return total
