# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Sampling in process: every layout samples what a forward pass without a cache gives on one rank."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
import torch
from decoding import (
    GREEDY,
    NEW_TOKENS,
    PROMPT_LENGTHS,
    check_argmax,
    check_inversion,
    log_probs_at,
    logits_of,
    make_requests,
    predicting,
    sampler_of,
)
from models import VOCAB_SIZE, build, model_config, parallel
from responses import cut_at, own, stops_of, tokens
from tiers import combinations

from megatron_selfdistill.config import ParallelConfig
from megatron_selfdistill.model.forward import unwrapped
from megatron_selfdistill.rollout.base import Response
from megatron_selfdistill.rollout.megatron import decoding, megatron_sampler, recorded_passes
from megatron_selfdistill.rollout.megatron.megatron_sampler import like_lengths, split_batches

NUM_IDS = VOCAB_SIZE // 2
SAMPLED = dataclasses.replace(GREEDY, temperature=1.0, top_p=0.95, num_ids=NUM_IDS)


@dataclass(frozen=True)
class Reference:
    """The responses of one rank to `make_requests`: those of `GREEDY`, which whole passes confirm, and of `SAMPLED`."""

    greedy: list[list[int]]
    log_probs: list[list[float]]
    drawn: list[Response]

    @property
    def stops(self) -> tuple[int, int]:
        """Stop tokens that end the greedy responses at different lengths."""
        return stops_of(self.greedy)


def write_on_one_rank(kind: str) -> Reference:
    """Return the reference, after a whole pass has confirmed each greedy token; its log-probs are in float64."""
    [model], grid = build(model_config(kind), parallel())
    sampler = sampler_of([model], grid)
    greedy, drawn = (sampler.generate(make_requests(), params) for params in (GREEDY, SAMPLED))
    assert all(token < NUM_IDS for response in drawn for token in response.token_ids)
    assert any(token >= NUM_IDS for response in greedy for token in response.token_ids)
    assert sum(a == b for text in tokens(greedy) for a, b in pairwise(text)) < 0.5 * len(greedy) * NEW_TOKENS
    model.eval()
    log_probs = []
    for request, response in zip(make_requests(), greedy, strict=True):
        logits = predicting(lambda ids: logits_of(model, ids), request.prompt, response.token_ids)
        check_argmax(logits, response, gap=1e-3)
        log_probs.append(log_probs_at(logits.log_softmax(-1), response.token_ids))
    return Reference(tokens(greedy), log_probs, drawn)


@pytest.fixture(scope="module")
def on_one_rank(ranks):
    return functools.cache(lambda kind: ranks.run(write_on_one_rank, kind, world_size=1)[0])


def write_in_layout(kind: str, config: ParallelConfig, stops: tuple[int, ...]) -> dict[str, Any]:
    chunks, grid = build(model_config(kind), config)
    requests = own(grid, make_requests())
    sampler = sampler_of(chunks, grid)
    whole = sampler.generate(requests, GREEDY)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoding, "_PREFILL_TOKENS", 7)  # prompts are read a few rows at a time
        early = sampler.generate(requests, dataclasses.replace(GREEDY, stop_token_ids=stops))
    per_token = sampler._bytes_per_column(NEW_TOKENS)
    small = sampler_of(chunks, grid, kv_cache_gb=2.5 * (max(PROMPT_LENGTHS) + NEW_TOKENS) * per_token / 2**30)
    batches = []
    sample_plain = small._sample_plain
    small._sample_plain = lambda *args: batches.append(1) or sample_plain(*args)  # type: ignore[method-assign]
    split = small.generate(requests, dataclasses.replace(GREEDY, stop_token_ids=stops))
    drawn = sampler.generate(requests, SAMPLED)
    recorded = early
    if sampler._student.has_one_pass:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(recorded_passes, "COLUMNS", 8)  # the passes of a response need three recordings
            params = dataclasses.replace(GREEDY, stop_token_ids=stops)
            recorded = sampler_of(chunks, grid, cuda_graphs=True).generate(requests, params)
    return {"replica": grid.dp_rank, "replicas": grid.dp_size, "num_batches": len(batches)} | {
        "whole": whole, "early": early, "split": split, "drawn": drawn, "recorded": recorded
    }  # fmt: skip


def check_layout(result: dict[str, Any], expected: Reference) -> None:
    mine = slice(result["replica"], None, result["replicas"])
    for name in ("whole", "early", "split", "recorded"):
        for text, log_probs, response in zip(
            expected.greedy[mine], expected.log_probs[mine], result[name], strict=True
        ):
            stops = () if name == "whole" else expected.stops
            assert (response.token_ids, response.finish_reason) == cut_at(text, stops)
            assert response.log_probs == pytest.approx(log_probs[: len(response.token_ids)], abs=1e-4)
            assert response.sampled_log_probs == [0.0] * len(response.token_ids)
    for recorded, early in zip(result["recorded"], result["early"], strict=True):
        assert recorded.log_probs == pytest.approx(early.log_probs, abs=1e-5), "float32 over other numbers of columns"
    assert result["num_batches"] >= 2
    check_drawn(result["drawn"], expected.drawn[mine])


def check_drawn(found: list[Response], expected: list[Response]) -> None:
    assert tokens(found) == tokens(expected)
    for response, other in zip(found, expected, strict=True):
        assert response.log_probs == pytest.approx(other.log_probs, abs=1e-4)
        assert response.sampled_log_probs == pytest.approx(other.sampled_log_probs, abs=1e-4)


LAYOUTS = {
    "TP1": ("shallow", parallel(), 1),
    "TP2": ("shallow", parallel(tp=2), 2),
    "TP2xPP2+SP": ("shallow", parallel(tp=2, pp=2, sp=True), 4),
    "PP2xVPP2": ("gqa", parallel(pp=2, vpp=2), 2),
    "CP2": ("shallow", parallel(cp=2), 2),
    "CP2xTP2+SP": ("shallow", parallel(cp=2, tp=2, sp=True), 4),
    "CP2, YaRN": ("yarn", parallel(cp=2), 2),
    "CP2, partial rotation": ("partial", parallel(cp=2), 2),
    "tied PP2": ("tied", parallel(pp=2), 2),
    "linear TP2+SP": ("gated_delta", parallel(tp=2, sp=True), 2),
    "linear PP2xVPP2": ("gated_delta", parallel(pp=2, vpp=2), 2),
    "linear DP2": ("gated_delta", parallel(), 2),
    "MoE EP2": ("moe", parallel(ep=2), 2),
    "MoE EP2xPP2": ("moe", parallel(ep=2, pp=2), 4),
    "MoE EP2xCP2": ("moe", parallel(ep=2, cp=2), 2),
    "MoE TP2xEP2+SP": ("moe", parallel(tp=2, ep=2, sp=True), 4),
    "MoE TP2+SP, EP2 within TP": ("moe", parallel(tp=2, ep=2, etp=1, sp=True), 2),
    "MoE TP1, ETP2 over DP": ("moe", parallel(etp=2), 2),
}


@combinations(layout=list(LAYOUTS), quick={"layout": ["TP2", "PP2xVPP2"]}, strength=1)
def test_responses_equal_those_of_a_forward_without_cache_on_one_rank(ranks, on_one_rank, layout):
    kind, config, world_size = LAYOUTS[layout]
    expected = on_one_rank(kind)
    for result in ranks.run(write_in_layout, kind, config, expected.stops, world_size=world_size):
        check_layout(result, expected)


def write_where_one_replica_is_idle(kind: str, config: ParallelConfig, stops: tuple[int, ...]) -> list[Response]:
    chunks, grid = build(model_config(kind), config)
    requests = own(grid, make_requests()) if grid.dp_rank == 0 else []
    return sampler_of(chunks, grid).generate(requests, dataclasses.replace(GREEDY, stop_token_ids=stops))


@combinations(layout=["MoE EP2", "MoE TP2xEP2+SP"], quick={"layout": ["MoE EP2"]}, strength=1)
def test_a_replica_without_requests_keeps_step_until_the_others_are_done(ranks, on_one_rank, layout):
    kind, config, world_size = LAYOUTS[layout]
    expected = on_one_rank(kind)
    texts = [cut_at(text, expected.stops)[0] for text in expected.greedy[::2]]
    found = ranks.run(write_where_one_replica_is_idle, kind, config, expected.stops, world_size=world_size)
    half = world_size // 2
    assert [tokens(responses) for responses in found] == [texts] * half + [[]] * half


def write_one_pass_late(kind: str, config: ParallelConfig, stops: tuple[int, ...]) -> dict[str, Any]:
    """Call `write_in_layout` where the host learns one pass late which sequences go on, as on a GPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(megatron_sampler, "lag_of", lambda device: 1)
        return write_in_layout(kind, config, stops)


@combinations(layout=["TP1", "TP2xPP2+SP"], quick={"layout": ["TP1"]}, strength=1)
def test_a_batch_whose_end_is_known_one_pass_late_writes_the_same(ranks, on_one_rank, layout):
    kind, config, world_size = LAYOUTS[layout]
    expected = on_one_rank(kind)
    for result in ranks.run(write_one_pass_late, kind, config, expected.stops, world_size=world_size):
        check_layout(result, expected)


def draw_in_orders(orders: list[list[int]]) -> list[dict[int, Response]]:
    chunks, grid = build(model_config("shallow"), parallel())
    sampler, requests = sampler_of(chunks, grid), make_requests()
    found = []
    for order in orders:
        mine = own(grid, order)
        found.append(dict(zip(mine, sampler.generate([requests[i] for i in mine], SAMPLED), strict=True)))
    return found


def test_a_sample_depends_on_its_stream_only_not_on_order_batch_or_replica(ranks, on_one_rank):
    order = list(range(len(PROMPT_LENGTHS)))
    [[reverse]] = ranks.run(draw_in_orders, [order[::-1]], world_size=1)
    replicas = ranks.run(draw_in_orders, [order, [4, 1, 0, 6, 3, 2, 5]], world_size=2)
    for found in (reverse, *(first | second for first, second in zip(*replicas, strict=True))):
        check_drawn([found[i] for i in order], on_one_rank("shallow").drawn)


def draw_and_check_by_hand() -> int:
    """Sample, and assert that a whole pass gives every token; return the number of tokens."""
    [model], grid = build(model_config("shallow"), parallel())
    params = dataclasses.replace(GREEDY, temperature=1.0)
    responses = sampler_of([model], grid).generate(make_requests(), params)
    model.eval()
    for request, response in zip(make_requests(), responses, strict=True):
        logits = predicting(lambda ids: logits_of(model, ids), request.prompt, response.token_ids)
        check_inversion(logits.log_softmax(-1), request, response)
    return sum(len(response.token_ids) for response in responses)


def test_token_i_of_a_sample_is_drawn_by_uniform_i_of_its_stream(ranks):
    assert ranks.run(draw_and_check_by_hand, world_size=1) == [len(PROMPT_LENGTHS) * NEW_TOKENS]


def draw_with_loud_padding(config: ParallelConfig) -> tuple[list[Response], list[Response]]:
    """Responses before and after the padded rows get logits of both signs, far above all others."""
    chunks, grid = build(model_config("shallow"), config)
    sampler = sampler_of(chunks, grid)
    before = sampler.generate(make_requests(), SAMPLED)
    output_layer = unwrapped(chunks[-1]).output_layer
    rows = output_layer.weight.size(0)
    start = grid.tp_rank * rows
    with torch.no_grad():
        for row in range(max(start, VOCAB_SIZE), start + rows):
            output_layer.weight[row - start] = 1000.0 * (-1) ** row
    return before, sampler.generate(make_requests(), SAMPLED)


@pytest.mark.parametrize("tp", [pytest.param(1, marks=pytest.mark.full), 2])
def test_padded_vocabulary_rows_are_never_sampled_and_change_no_probability(ranks, tp):
    for before, after in ranks.run(draw_with_loud_padding, parallel(tp=tp), world_size=tp):
        assert before == after
        assert all(token < VOCAB_SIZE for response in after for token in response.token_ids)


def test_batches_hold_what_the_cache_has_room_for_and_prompts_of_like_length():
    lengths = [3, 50, 4, 5, 100, 48]
    for capacity in (120, 300, 10_000):
        batches = split_batches(lengths, 10, capacity)
        assert sorted(i for batch in batches for i in batch) == list(range(6))
        for batch in batches:
            held = [lengths[i] for i in batch]
            assert held == sorted(held) and held[-1] - held[0] <= 10
            assert len(batch) * (held[-1] + 10) <= capacity
    assert split_batches(lengths, 10, 10_000) == [[0, 2, 3], [5, 1], [4]]
    assert split_batches([], 10, 100) == []


def test_prompts_of_like_length_are_read_together_and_in_their_order():
    assert like_lengths([]) == [] and like_lengths([7]) == [(1, 7)]
    assert like_lengths([8, 9, 10]) == [(3, 10)]
    assert like_lengths([2, 10, 10, 100]) == [(1, 2), (2, 10), (1, 100)]
    assert like_lengths([10, 2]) == [(1, 10), (1, 2)]
    lengths = list(range(1, 400))
    groups, first = like_lengths(lengths), 0
    for count, longest in groups:
        some = lengths[first : first + count]
        assert longest == max(some) and sum(some) >= 0.8 * longest * count
        first += count
    assert first == len(lengths) and len(groups) < 25


def compile_while_sampling() -> tuple[int, int]:
    """Return how often a compiled function that each pass calls is compiled, and how often with one more call."""
    [model], grid = build(model_config("shallow"), parallel())
    sampler, graphs = sampler_of([model], grid), []
    with torch._dynamo.config.patch(disable=False), pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHDYNAMO_DISABLE", "0")
        doubled = torch.compile(lambda x: 2 * x, backend=lambda graph, _: graphs.append(graph) or graph.forward)
        forward = decoding.DecodingModel.forward
        patch.setattr(
            decoding.DecodingModel,
            "forward",
            lambda self, context, tokens: forward(self, context, doubled(tokens) // 2),
        )
        sampler.generate(make_requests(), GREEDY)
        num_while_sampling = len(graphs)
        doubled(torch.ones(3))
    torch._dynamo.reset()
    return num_while_sampling, len(graphs)


@pytest.mark.full
def test_sampling_compiles_nothing_so_that_training_can(ranks):
    """The sampler has many shapes of Megatron's fused functions, and torch compiles a function at most 8 times."""
    assert ranks.run(compile_while_sampling, world_size=1) == [(0, 1)]
