# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Guided decoding in process where other weights than the student's read the contexts of teacher and reference."""

from __future__ import annotations

import contextlib
import dataclasses
from functools import partial
from typing import Any

import pytest
import torch
from decoding import (
    MAX_LENGTH,
    check_argmax,
    check_inversion,
    check_pair_log_probs,
    logits_of,
    make_pairs,
    predicting,
)
from guided_decoding import GREEDY_PAIRS, SAMPLED_PAIRS
from models import VOCAB_SIZE, build, model_config, parallel
from responses import cut_at, own, stops_of, tokens
from tiers import combinations

from megatron_selfdistill.config import ParallelConfig
from megatron_selfdistill.distributed.ranks import RankGrid
from megatron_selfdistill.guidance.guided_sampler import GuidedSampler
from megatron_selfdistill.guidance.guided_tokens import ROLES
from megatron_selfdistill.loss import Target, mixed_target
from megatron_selfdistill.model.forward import unwrapped
from megatron_selfdistill.rollout.base import Request, Response, RoleWeights, SamplingParams
from megatron_selfdistill.rollout.megatron import decoding
from megatron_selfdistill.rollout.megatron.decodable_models import cache_bytes_per_token

ANCHORED, MATCHES_STUDENT = Target(anchor="reference"), Target(anchor="reference", match="student", k_max=None)
GREEDY, SAMPLED = (dataclasses.replace(params, target=ANCHORED) for params in (GREEDY_PAIRS, SAMPLED_PAIRS))
Roles = dict[tuple[str, ...], int]
# The roles that other weights than the student's have, and the seeds of these weights; the student's seed is 0.
TEACHERS: dict[str, Roles] = {
    "frozen": {("teacher", "reference"): 1},
    "ema": {("teacher",): 1, ("reference",): 2},
    "current": {("reference",): 2},
}


def samplers_of(
    kind: str, config: ParallelConfig, roles: Roles, *rooms: int | None
) -> tuple[list[GuidedSampler], RankGrid]:
    """Return a sampler for each room in tokens, with other weights of the seeds of ``roles``; the student's is 0."""
    chunks, grid = build(model_config(kind), config)
    others = [
        RoleWeights(names, build(model_config(kind), config, seed=seed)[0], contextlib.nullcontext)
        for names, seed in roles.items()
    ]
    per_token = cache_bytes_per_token([unwrapped(chunk) for chunk in chunks], torch.float32)
    sizes = [None if room is None else room * per_token / 2**30 for room in rooms]
    return [GuidedSampler(chunks, grid, VOCAB_SIZE, MAX_LENGTH, gib, role_weights=others) for gib in sizes], grid


def check_response(models: dict[str, Any], request: Request, response: Response, params: SamplingParams) -> None:
    assert request.teacher_prompt is not None
    prompts = {"student": request.prompt, "teacher": request.teacher_prompt, "reference": request.prompt}
    student, teacher, reference = (
        predicting(lambda ids, model=models[role]: logits_of(model, ids), prompts[role], response.token_ids)
        for role in prompts
    )
    read = partial(logits_of, models["teacher"])
    controls = [predicting(read, prompt, response.token_ids) for prompt in request.control_prompts]
    if params.temperature == 0:
        check_argmax(params.target.teacher_weight * teacher + reference, response, gap=1e-4)
    else:
        of_controls = torch.stack(controls) if controls else None
        log_q = mixed_target(student, teacher, params.target, reference, of_controls).log_q
        check_inversion(log_q, request, response)
        ids = torch.tensor(response.token_ids)[:, None]
        assert response.sampled_log_probs == pytest.approx(log_q.gather(1, ids)[:, 0].tolist(), abs=1e-4)
    check_pair_log_probs(student, teacher, response, 1e-4)


def requests_of(target: Target) -> list[Request]:
    """Return `make_pairs`, with the prompts of other pairs' teachers as those of the controls."""
    pairs = make_pairs()
    others = [[pairs[i - k].teacher_prompt for k in range(1, 1 + target.num_controls)] for i in range(len(pairs))]
    return [dataclasses.replace(pair, control_prompts=tuple(of)) for pair, of in zip(pairs, others, strict=True)]


def write_and_check(kind: str, teacher: str, target: Target) -> list[list[list[int]]]:
    """Return greedy and sampled texts, which whole passes have confirmed; with controls they are sampled only."""
    [sampler], _ = samplers_of(kind, parallel(), TEACHERS[teacher], None)
    seeds = {role: seed for roles, seed in TEACHERS[teacher].items() for role in roles}
    models = {role: build(model_config(kind), parallel(), seed=seeds.get(role, 0))[0][0].eval() for role in ROLES}
    found = []
    for params in (GREEDY, SAMPLED)[bool(target.num_controls) :]:
        params, requests = dataclasses.replace(params, target=target), requests_of(target)
        found.append(sampler.generate(requests, params))
        for request, response in zip(requests, found[-1], strict=True):
            check_response(models, request, response, params)
    return [tokens(responses) for responses in found]


@pytest.fixture(scope="module")
def on_one_rank(ranks):
    known: dict[str, list[list[list[int]]]] = {}

    def get(kind: str) -> list[list[list[int]]]:
        if kind not in known:
            [known[kind]] = ranks.run(write_and_check, kind, "frozen", ANCHORED, world_size=1)
        return known[kind]

    return get


@pytest.mark.parametrize("teacher", ["ema", pytest.param("frozen", marks=pytest.mark.full)])
def test_controls_are_read_by_the_weights_of_the_teacher(ranks, teacher):
    """Whole passes of these weights after each control's prompt confirm every sampled token."""
    ranks.run(write_and_check, "shallow", teacher, Target(num_controls=2), world_size=1)


@pytest.mark.full
@combinations(teacher=["ema", "current"])
def test_every_token_is_the_one_that_whole_passes_of_all_roles_choose(ranks, on_one_rank, teacher):
    """Texts differ between teachers, so no weights stand in for others."""
    [texts] = ranks.run(write_and_check, "shallow", teacher, MATCHES_STUDENT, world_size=1)
    assert all(mine != theirs for mine, theirs in zip(texts, on_one_rank("shallow"), strict=True))


def write_in_layout(kind: str, config: ParallelConfig, stops: tuple[int, ...]) -> dict[str, Any]:
    [sampler], grid = samplers_of(kind, config, TEACHERS["frozen"], None)
    pairs = own(grid, make_pairs())
    # Plain requests of unequal numbers: on every replica another model is wanted at the same time.
    plain = [dataclasses.replace(r, teacher_prompt=None) for r in make_pairs()[: 5 if grid.dp_rank == 0 else 1]]
    stopping = dataclasses.replace(GREEDY, stop_token_ids=stops)
    both = sampler.generate([*plain, *pairs], GREEDY)
    alone = sampler.generate(plain, GREEDY)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoding, "_PREFILL_TOKENS", 30)  # prompts are read a few rows at a time
        early = sampler.generate(pairs if grid.dp_rank == 0 else pairs[::-1], stopping)
    return {
        "replica": grid.dp_rank,
        "replicas": grid.dp_size,
        "whole": both[len(plain) :],
        "plain": both[: len(plain)],
        "alone": alone,
        "early": early if grid.dp_rank == 0 else early[::-1],
        "sampled": sampler.generate(pairs, SAMPLED),
    }


LAYOUTS = {
    "TP2": ("shallow", parallel(tp=2), 2),
    "PP2xVPP2": ("gqa", parallel(pp=2, vpp=2), 2),
    "TP2xPP2+SP": ("shallow", parallel(tp=2, pp=2, sp=True), 4),
    "CP2": ("shallow", parallel(cp=2), 2),
    "tied TP2+SP": ("tied", parallel(tp=2, sp=True), 2),
    "MoE EP2": ("moe", parallel(ep=2), 2),
    "MoE EP2xPP2": ("moe", parallel(ep=2, pp=2), 4),
    "MoE EP2xCP2": ("moe", parallel(ep=2, cp=2), 2),
}


@combinations(layout=list(LAYOUTS), quick={"layout": ["TP2"]}, strength=1)
def test_every_layout_writes_what_one_rank_writes(ranks, on_one_rank, layout):
    kind, config, world_size = LAYOUTS[layout]
    texts, sampled = on_one_rank(kind)
    stops = stops_of(texts)
    for result in ranks.run(write_in_layout, kind, config, stops, world_size=world_size):
        share = slice(result["replica"], None, result["replicas"])
        assert tokens(result["whole"]) == texts[share]
        assert tokens(result["sampled"]) == sampled[share]
        assert all(response.teacher_log_probs for response in result["whole"])
        for text, response, whole in zip(texts[share], result["early"], result["whole"], strict=True):
            assert (response.token_ids, response.finish_reason) == cut_at(text, stops)
            count = len(response.token_ids)
            assert response.log_probs == pytest.approx(whole.log_probs[:count], abs=1e-4)
            assert response.teacher_log_probs == pytest.approx(whole.teacher_log_probs[:count], abs=1e-4)
        assert tokens(result["plain"]) == tokens(result["alone"])
        assert not any(response.teacher_log_probs for response in result["plain"])
