# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Guided decoding in process: every layout writes, token by token, what two whole forward passes would choose."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import hf_models
import pytest
from decoding import (
    MAX_LENGTH,
    PAIR_TOKENS,
    both_logits,
    check_greedy_pair,
    check_inversion,
    check_pair_log_probs,
    logits_of,
    make_pairs,
)
from guided_decoding import GREEDY_PAIRS, SAMPLED_PAIRS, guided_sampler_of
from models import build, model_config, parallel
from responses import cut_at, own, stops_of, tokens
from tiers import combinations

from megatron_selfdistill.config import ParallelConfig
from megatron_selfdistill.guidance.guided_sampler import GuidedSampler
from megatron_selfdistill.guidance.guided_tokens import GuidedParams
from megatron_selfdistill.loss import Target, mixed_target
from megatron_selfdistill.rollout.base import Request
from megatron_selfdistill.rollout.megatron import decoding, megatron_sampler


def write_hf(directory: Path, config: ParallelConfig, requests: list[Request], new_tokens: int, longest: int):
    _, model, rules, tensors = hf_models.read(directory)
    chunks, grid = build(model, config)
    hf_models.fill(chunks, rules, tensors)
    sampler = GuidedSampler(chunks, grid, hf_models.VOCAB_SIZE, longest)
    return sampler.generate(requests, GuidedParams(new_tokens, temperature=0))


HF_CASES = {kind: (kind, parallel(), 1) for kind in hf_models.CONFIGS} | {
    "qwen3 in TP2xPP2+SP": ("qwen3", parallel(tp=2, pp=2, sp=True), 4),
    "deepseek_v3 in PP2": ("deepseek_v3", parallel(pp=2), 2),
}


@combinations(case=list(HF_CASES), quick={"case": ["deepseek_v3"]}, strength=1)
def test_greedy_text_is_the_argmax_of_transformers_mixed_logits(ranks, tmp_path, case):
    kind, config, world_size = HF_CASES[case]
    reference = hf_models.write(kind, tmp_path)
    requests = make_pairs(vocab_size=hf_models.VOCAB_SIZE)
    for written in ranks.run(write_hf, tmp_path, config, requests, PAIR_TOKENS, MAX_LENGTH, world_size=world_size):
        for request, response in zip(requests, written, strict=True):
            check_greedy_pair(lambda ids: hf_models.hf_logits(reference, [ids]), request, response, 2e-4)


def write_on_one_rank(kind: str) -> tuple[list[list[int]], list[list[int]]]:
    """Return the greedy and the sampled text of each pair, after two whole passes have confirmed each token."""
    [model], grid = build(model_config(kind), parallel())
    sampler = guided_sampler_of([model], grid)
    greedy, sampled = (sampler.generate(make_pairs(), params) for params in (GREEDY_PAIRS, SAMPLED_PAIRS))
    model.eval()
    for request, whole, drawn in zip(make_pairs(), greedy, sampled, strict=True):
        check_greedy_pair(lambda ids: logits_of(model, ids), request, whole, 1e-4, gap=1e-3)
        student, teacher = both_logits(lambda ids: logits_of(model, ids), request, drawn.token_ids)
        check_inversion(mixed_target(student, teacher, Target(anchor="student")).log_q, request, drawn)
        check_pair_log_probs(student, teacher, drawn, 1e-4)
    return tokens(greedy), tokens(sampled)


@pytest.fixture(scope="module")
def on_one_rank(ranks):
    return functools.cache(lambda kind: ranks.run(write_on_one_rank, kind, world_size=1)[0])


def write_in_layout(kind: str, config: ParallelConfig, stops: tuple[int, ...]) -> dict[str, Any]:
    chunks, grid = build(model_config(kind), config)
    pairs = own(grid, make_pairs())
    # Plain requests of the same streams among them: each kind is written as if it were alone.
    plain = [dataclasses.replace(request, teacher_prompt=None) for request in pairs]
    mingled = [request for both in zip(pairs, plain, strict=True) for request in both]
    sampler = guided_sampler_of(chunks, grid)
    sampler.update_weights(5)
    stopping = dataclasses.replace(GREEDY_PAIRS, stop_token_ids=stops)
    both = sampler.generate(mingled, GREEDY_PAIRS)
    alone = sampler.generate(plain, GREEDY_PAIRS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoding, "_PREFILL_TOKENS", 30)  # prompts are read a few rows at a time
        early = sampler.generate(pairs, stopping)
    recorded = early
    if sampler._student.has_one_pass:
        recorded = guided_sampler_of(chunks, grid, cuda_graphs=True).generate(pairs, stopping)
    room = 2 * (40 + PAIR_TOKENS) + 12  # tokens: the longest pair, or two short ones
    small = guided_sampler_of(chunks, grid, kv_cache_gb=room * sampler._bytes_per_token / 2**30)
    batches: list[list[Request]] = []
    sample_guided = small._sample_guided
    small._sample_guided = lambda some, *rest: batches.append(some) or sample_guided(some, *rest)
    split = small.generate(pairs[::-1], stopping)[::-1]
    drawn = sampler.generate(pairs, SAMPLED_PAIRS)
    held = [
        2 * len(some) * (max(len(p) for r in some for p in (r.prompt, r.teacher_prompt)) + PAIR_TOKENS)
        for some in batches
    ]
    assert len(held) >= 2 and max(held) <= room
    return {"replica": grid.dp_rank, "replicas": grid.dp_size} | {
        "whole": both[::2], "plain": both[1::2], "alone": alone, "early": early, "split": split, "drawn": drawn,
        "recorded": recorded,
    }  # fmt: skip


LAYOUTS = {"TP1": ("shallow", parallel(), 1), "MoE EP2": ("moe", parallel(ep=2), 2), "DP2": ("shallow", parallel(), 2)}


def write_one_pass_late(kind: str, config: ParallelConfig, stops: tuple[int, ...]) -> dict[str, Any]:
    """Call `write_in_layout` where the host learns one pass late which pairs go on, as on a GPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(megatron_sampler, "lag_of", lambda device: 1)
        return write_in_layout(kind, config, stops)


@combinations(layout=list(LAYOUTS), is_late=[True, False], quick={"layout": ["TP1"], "is_late": ["True"]}, strength=1)
def test_two_whole_passes_on_one_rank_choose_what_is_written_also_where_the_end_is_known_one_pass_late(
    ranks, on_one_rank, layout, is_late
):
    """test_anchored_decoding.py has guided responses of three roles in the other layouts."""
    kind, config, world_size = LAYOUTS[layout]
    texts, sampled = on_one_rank(kind)
    stops = stops_of(texts)
    write = write_one_pass_late if is_late else write_in_layout
    for result in ranks.run(write, kind, config, stops, world_size=world_size):
        share = slice(result["replica"], None, result["replicas"])
        for text, response in zip(texts[share], result["whole"], strict=True):
            assert (response.token_ids, response.finish_reason) == (text, "length")
            assert response.weight_version == 5 and response.teacher_log_probs is not None
        for name in ("early", "split", "recorded"):
            for text, response, whole in zip(texts[share], result[name], result["whole"], strict=True):
                assert (response.token_ids, response.finish_reason) == cut_at(text, stops)
                count = len(response.token_ids)
                assert response.log_probs == pytest.approx(whole.log_probs[:count], abs=1e-4)
                assert response.teacher_log_probs == pytest.approx(whole.teacher_log_probs[:count], abs=1e-4)
        assert tokens(result["drawn"]) == sampled[share]
        assert tokens(result["plain"]) == tokens(result["alone"])
        assert not any(response.teacher_log_probs for response in result["plain"])
