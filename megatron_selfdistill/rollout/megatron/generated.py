# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Responses while they are generated: the tokens of a batch, where each sequence ends, its uniforms and log-probs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_selfdistill.rollout.base import Request, Response, SamplingParams, sample_uniforms


@dataclass
class GeneratedBatch:
    """Sequences that are generated together; column i holds token i of each sequence.

    A sequence begins with its own prompt, if the prompt is kept here.
    """

    tokens: Tensor
    """Token ids ``[b, length]`` int64: the prompts, then the generated tokens."""
    prompt_lengths: Tensor
    """Number of prompt tokens of each sequence, ``[b]`` int64."""
    ends: Tensor
    """Column behind the last token of each sequence, as far as it is known, ``[b]`` int64."""
    uniforms: Tensor
    """Uniform from which each response token is sampled, ``[b, length]`` float64."""
    log_probs: Tensor
    """Log-probabilities ``[2, b, length]`` float64: under the model, and under the distribution sampled from.

    Guided sequences have ``[3, b, length]``: under the student, the mix and the teacher.
    """
    stop_token_ids: Tensor
    """Ids of the tokens that end a response, ``[n]`` int64."""

    @staticmethod
    def after_prompts(requests: Sequence[Request], params: SamplingParams, device: torch.device) -> GeneratedBatch:
        """Return an empty batch in which each response follows its prompt in the same row."""
        return _start(requests, [request.prompt for request in requests], 2, params, device)

    @staticmethod
    def guided(requests: Sequence[Request], params: SamplingParams, device: torch.device) -> GeneratedBatch:
        """Return an empty batch of responses without prompts: each response has several prompts, which caches hold."""
        return _start(requests, [[] for _ in requests], 3, params, device)

    def append(self, live: Tensor, position: int, tokens: Tensor) -> None:
        """Put ``tokens`` into column ``position`` of those rows ``live`` whose prompt has ended."""
        ends = self.ends[live]
        own = self.prompt_lengths[live] <= position
        self.tokens[live, position] = torch.where(own, tokens, self.tokens[live, position])
        if self.stop_token_ids.numel():
            stopped = own & (position < ends) & torch.isin(tokens, self.stop_token_ids)
            self.ends[live] = torch.where(stopped, position + 1, ends)

    def responses(self) -> list[Response]:
        """Return the finished responses, in the order of the rows."""
        stops = set(self.stop_token_ids.tolist())
        spans = zip(self.prompt_lengths.tolist(), self.ends.tolist(), strict=True)
        responses = []
        for (start, end), tokens, *rows in zip(spans, self.tokens.tolist(), *self.log_probs.tolist(), strict=True):
            log_probs, sampled, *teacher = (row[start:end] for row in rows)
            response = Response(
                token_ids=tokens[start:end],
                log_probs=log_probs,
                sampled_log_probs=sampled,
                finish_reason="stop" if tokens[end - 1] in stops else "length",
                teacher_log_probs=teacher[0] if teacher else None,
            )
            responses.append(response)
        return responses


def _start(
    requests: Sequence[Request],
    prompts: Sequence[list[int]],
    num_log_probs: int,
    params: SamplingParams,
    device: torch.device,
) -> GeneratedBatch:
    prompt_lengths = [len(prompt) for prompt in prompts]
    length = max(prompt_lengths) + params.max_new_tokens
    tokens = np.zeros((len(requests), length), dtype=np.int64)
    uniforms = np.zeros((len(requests), length))
    for row, (request, prompt) in enumerate(zip(requests, prompts, strict=True)):
        end = len(prompt)
        tokens[row, :end] = prompt
        if params.temperature > 0:
            count = request.begun + params.max_new_tokens
            uniforms[row, end : end + params.max_new_tokens] = sample_uniforms(request.seed, count)[request.begun :]
    lengths = torch.tensor(prompt_lengths, device=device)
    return GeneratedBatch(
        tokens=torch.from_numpy(tokens).to(device),
        prompt_lengths=lengths,
        ends=lengths + params.max_new_tokens,
        uniforms=torch.from_numpy(uniforms).to(device),
        log_probs=torch.zeros(num_log_probs, len(requests), length, dtype=torch.float64, device=device),
        stop_token_ids=torch.tensor(params.stop_token_ids, dtype=torch.int64, device=device),
    )


@dataclass(frozen=True)
class PromptRows:
    """The prompts of n guided requests in some roles, as rows: first the n prompts of the first role, and so on."""

    tokens: Tensor
    """Token ids ``[roles * n, longest]`` int64, each prompt from column 0 on."""
    lengths: Tensor
    """Number of tokens of each prompt, ``[roles * n]`` int64."""
    longest_by_role: tuple[int, ...]
    """Number of tokens of the longest prompt of each role."""

    @staticmethod
    def of(prompts_by_role: Sequence[Sequence[list[int]]], device: torch.device) -> PromptRows:
        """Return the prompts on ``device``; ``prompts_by_role`` has the n prompts of each role."""
        prompts = [prompt for of_role in prompts_by_role for prompt in of_role]
        lengths = [len(prompt) for prompt in prompts]
        tokens = np.zeros((len(prompts), max(lengths)), dtype=np.int64)
        for row, prompt in enumerate(prompts):
            tokens[row, : len(prompt)] = prompt
        return PromptRows(
            tokens=torch.from_numpy(tokens).to(device),
            lengths=torch.tensor(lengths, device=device),
            longest_by_role=tuple(max(map(len, of_role)) for of_role in prompts_by_role),
        )

    @property
    def last_tokens(self) -> Tensor:
        """Last token of each prompt, ``[roles * n]`` int64."""
        return self.tokens.gather(1, self.lengths[:, None] - 1).squeeze(1)
