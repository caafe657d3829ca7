# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Responses while they are written: the tokens of a batch, where each ends, its uniforms and its log-probs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_selfdistill.rollout.base import Request, Response, SamplingParams, sample_uniforms


@dataclass
class Written:
    """Sequences that are written together; column i of each is its i-th token, its own prompt (if kept here)
    included."""

    tokens: Tensor
    """``[b, length]`` int64: the prompts, then what has been written."""
    prompt_lengths: Tensor
    """``[b]`` int64."""
    ends: Tensor
    """``[b]`` int64: the column behind the last token, as far as is known."""
    uniforms: Tensor
    """``[b, length]`` float64: the uniform that draws each response token."""
    log_probs: Tensor
    """``[2, b, length]`` float64: of the model, and of the distribution drawn from; ``[3, b, length]`` where guided:
    of the student, of the mix, of the teacher."""
    stop_token_ids: Tensor
    """``[n]`` int64."""

    @staticmethod
    def behind_prompts(requests: Sequence[Request], params: SamplingParams, device: torch.device) -> Written:
        """Each response follows its prompt in the same row."""
        return _start(requests, [request.prompt for request in requests], 2, params, device)

    @staticmethod
    def guided(requests: Sequence[Request], params: SamplingParams, device: torch.device) -> Written:
        """The responses by themselves: each belongs behind two prompts."""
        return _start(requests, [[] for _ in requests], 3, params, device)

    def write(self, live: Tensor, position: int, tokens: Tensor) -> None:
        """Put ``tokens`` into column ``position`` of the rows ``live`` whose prompt has ended."""
        ends = self.ends[live]
        own = self.prompt_lengths[live] <= position
        self.tokens[live, position] = torch.where(own, tokens, self.tokens[live, position])
        if self.stop_token_ids.numel():
            stopped = own & (position < ends) & torch.isin(tokens, self.stop_token_ids)
            self.ends[live] = torch.where(stopped, position + 1, ends)

    def responses(self) -> list[Response]:
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
) -> Written:
    prompt_lengths = [len(prompt) for prompt in prompts]
    length = max(prompt_lengths) + params.max_new_tokens
    tokens = np.zeros((len(requests), length), dtype=np.int64)
    uniforms = np.zeros((len(requests), length))
    for row, (request, prompt) in enumerate(zip(requests, prompts, strict=True)):
        end = len(prompt)
        tokens[row, :end] = prompt
        if params.temperature > 0:
            uniforms[row, end : end + params.max_new_tokens] = sample_uniforms(request.seed, params.max_new_tokens)
    lengths = torch.tensor(prompt_lengths, device=device)
    return Written(
        tokens=torch.from_numpy(tokens).to(device),
        prompt_lengths=lengths,
        ends=lengths + params.max_new_tokens,
        uniforms=torch.from_numpy(uniforms).to(device),
        log_probs=torch.zeros(num_log_probs, len(requests), length, dtype=torch.float64, device=device),
        stop_token_ids=torch.tensor(params.stop_token_ids, dtype=torch.int64, device=device),
    )


@dataclass(frozen=True)
class PromptPairs:
    """Both prompts of n guided requests, as 2n sequences: the students' in rows 0 .. n - 1, then the teachers'."""

    tokens: Tensor
    """``[2n, longest]`` int64, each from column 0 on."""
    lengths: Tensor
    """``[2n]`` int64."""
    longest_by_role: tuple[int, int]
    """Tokens of the longest prompt of a student, and of a teacher."""

    @staticmethod
    def of(requests: Sequence[Request], device: torch.device) -> PromptPairs:
        prompts = [request.prompt for request in requests]
        prompts += [request.teacher_prompt for request in requests if request.teacher_prompt is not None]
        lengths = [len(prompt) for prompt in prompts]
        tokens = np.zeros((len(prompts), max(lengths)), dtype=np.int64)
        for row, prompt in enumerate(prompts):
            tokens[row, : len(prompt)] = prompt
        return PromptPairs(
            tokens=torch.from_numpy(tokens).to(device),
            lengths=torch.tensor(lengths, device=device),
            longest_by_role=(max(lengths[: len(requests)]), max(lengths[len(requests) :])),
        )

    @property
    def last_tokens(self) -> Tensor:
        """``[2n]`` int64."""
        return self.tokens.gather(1, self.lengths[:, None] - 1).squeeze(1)
