# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Guided sampling in process: each token is sampled from the target, from all contexts of one response at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, cast

import torch
from torch import Tensor

from megatron_selfdistill.distributed.integers import max_over_ranks
from megatron_selfdistill.distributed.ranks import RankGrid
from megatron_selfdistill.guidance.guided_tokens import CONTROL, GuidedParams, guided_roles, select_mixed_tokens
from megatron_selfdistill.loss.target import Target
from megatron_selfdistill.rollout.base import Request, Response, RoleWeights, SamplingParams
from megatron_selfdistill.rollout.megatron.decoding import DecodingModel, ForwardPasses
from megatron_selfdistill.rollout.megatron.megatron_sampler import ContextRows, GeneratedBatch, MegatronSampler, Share


class GuidedSampler(MegatronSampler):
    """A `MegatronSampler` that also samples guided responses, from `GuidedParams`.

    A guided request has a context for each of `guided_roles`, all with the same response.  The weights of
    ``role_weights`` read theirs, and the student's weights read all others.  The student's own context gives the
    log-probs of the response.
    """

    def __init__(
        self,
        chunks: Sequence[torch.nn.Module],
        grid: RankGrid,
        vocab_size: int,
        *others: Any,
        role_weights: Sequence[RoleWeights] = (),
        **options: Any,
    ) -> None:
        """Prepare the weights for decoding; ``others`` and ``options``: those of `MegatronSampler`.

        ``role_weights``: weights other than the student's, with chunks of the student's architecture, in the same order
        on all ranks.
        """
        super().__init__(chunks, grid, vocab_size, *others, **options)
        self._role_weights = list(role_weights)
        self._role_models = [DecodingModel(weights.chunks, grid, vocab_size) for weights in role_weights]
        self._passes = ForwardPasses([self._student, *self._role_models], self._passes.records)

    def _models_on_device(
        self, requests: Sequence[Request], params: SamplingParams, stack: ExitStack
    ) -> Sequence[DecodingModel]:
        """Return the student, and the other models if any rank has a request whose target other weights define."""
        held = {role for weights in self._role_weights for role in weights.roles}
        if not held or not _any_guided(requests) or held.isdisjoint(guided_roles(_target(params))):
            return [self._student]
        for weights in self._role_weights:
            stack.enter_context(weights.on_device())
        return [self._student, *self._role_models]

    def _shares(
        self, own: Sequence[int], requests: Sequence[Request], params: SamplingParams, capacity: int
    ) -> list[Share]:
        guided = [i for i in own if requests[i].teacher_prompt is not None]
        plain = [i for i in own if requests[i].teacher_prompt is None]
        shares = super()._shares(plain, requests, params, capacity)
        if guided:
            shares.append((guided, self._sample_guided, capacity // len(guided_roles(_target(params)))))
        return shares

    def _lengths(self, requests: Sequence[Request], params: SamplingParams) -> tuple[list[int], list[int]]:
        prompts = [(r.prompt, r.teacher_prompt, *r.control_prompts) for r in requests]
        lengths = [len(prompt) for of_one in prompts for prompt in of_one if prompt is not None]
        sequences = [1 if r.teacher_prompt is None else len(guided_roles(_target(params))) for r in requests]
        taken = [(r.longest_prompt + params.max_new_tokens) * n for r, n in zip(requests, sequences, strict=True)]
        return lengths, taken

    def _sample_guided(
        self, requests: Sequence[Request], params: SamplingParams, report: Callable[[int], None]
    ) -> list[Response]:
        """Return the responses to guided requests that decode together; pass i of each model gives token i.

        ``report``: as for `_sample_plain`.
        """
        device = self._grid.device
        batch = GeneratedBatch.start(requests, params, device, num_log_probs=3)
        groups = []
        for model, roles in self._readers(_target(params)):
            prompts = {role: [_prompt(request, role) for request in requests] for role in roles}
            groups.append(ContextRows(model, prompts, params.max_new_tokens, self._passes, device))

        def sample(live: Tensor, step: int, logits: Mapping[str, Tensor]) -> Tensor:
            return self._sample_mixed(batch, live, step, logits, params)

        return self._sample_in_rows(batch, groups, sample, report)

    def _readers(self, target: Target) -> list[tuple[DecodingModel, tuple[str, ...]]]:
        """Return each model that reads contexts of guided requests, with its roles; the student comes first."""
        wanted, taken = guided_roles(target), set[str]()
        others = []
        for model, weights in zip(self._role_models, self._role_weights, strict=True):
            roles = tuple(role for role in wanted if _model_role(role) in weights.roles)
            taken |= set(roles)
            others += [(model, roles)] if roles else []
        return [(self._student, tuple(role for role in wanted if role not in taken)), *others]

    def _sample_mixed(
        self, batch: GeneratedBatch, live: Tensor, step: int, logits: Mapping[str, Tensor], params: SamplingParams
    ) -> Tensor:
        """Return token ``step`` of each guided request, sampled as `_sample` does from the logits of all its roles."""
        tokens = torch.empty_like(live)
        if logits and self._grid.tp_rank == 0:
            controls = [logits[role] for role in guided_roles(_target(params)) if role.startswith(CONTROL)]
            sampled = select_mixed_tokens(
                logits["student"],
                logits["teacher"],
                batch.uniforms[live, step],
                _target(params),
                greedy=params.temperature == 0,
                reference_logits=logits.get("reference"),
                control_logits=torch.stack(controls) if controls else None,
                backend=cast(GuidedParams, params).loss_backend,
                num_ids=params.num_ids,
            )
            tokens = sampled.token_ids
            log_probs = [sampled.student_log_probs, sampled.mixed_log_probs, sampled.teacher_log_probs]
            batch.log_probs[:, live, step] = torch.stack(log_probs)
        self._broadcast(tokens)
        return tokens


def _model_role(role: str) -> str:
    """Return the role of `ROLES` whose weights read a context: those of the teacher read the controls, too."""
    return "teacher" if role.startswith(CONTROL) else role


def _prompt(request: Request, role: str) -> list[int]:
    """Return the prompt of a guided request in one of its `guided_roles`."""
    if role.startswith(CONTROL):
        return request.control_prompts[int(role.removeprefix(CONTROL))]
    return (request.teacher_prompt or []) if role == "teacher" else request.prompt


def _target(params: SamplingParams) -> Target:
    return cast(GuidedParams, params).target


def _any_guided(requests: Sequence[Request]) -> bool:
    """Return whether any rank has a guided request.  Collectives: one maximum over the world."""
    return bool(max_over_ranks([any(request.teacher_prompt is not None for request in requests)])[0])
