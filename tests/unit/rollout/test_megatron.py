# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Sampling in process: every layout samples as a TP1 forward pass without a cache, and leaves the model unchanged."""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist
from models import VOCAB_SIZE, build, model_config, parallel
from responses import chi_square_p_value, cut_at, own, stops_of
from tiers import combinations

from megatron_selfdistill.config import OptimizerConfig, ParallelConfig, ScheduleConfig
from megatron_selfdistill.errors import ConfigError
from megatron_selfdistill.model.build import build_optimizer, unwrapped, wrap_for_training
from megatron_selfdistill.rollout.base import Request, Response, SamplingParams, sample_seed, sample_uniforms
from megatron_selfdistill.rollout.megatron import megatron_sampler, survivors
from megatron_selfdistill.rollout.megatron.megatron_sampler import MegatronSampler, split_batches

MAX_LENGTH = 64
NEW_TOKENS = 14
# Rows that end early, and long ones that must not wait for them; seven prompts, so that no split is even.
PROMPT_LENGTHS = (2, 9, 5, 5, 12, 3, 7)
GREEDY = SamplingParams(max_new_tokens=NEW_TOKENS, temperature=0)
SAMPLED = SamplingParams(max_new_tokens=NEW_TOKENS, temperature=1.0, top_p=0.95)


def make_requests(count: int = len(PROMPT_LENGTHS)) -> list[Request]:
    generator = torch.Generator().manual_seed(3)
    lengths = [PROMPT_LENGTHS[i % len(PROMPT_LENGTHS)] for i in range(count)]
    prompts = [torch.randint(0, VOCAB_SIZE, (length,), generator=generator).tolist() for length in lengths]
    return [Request(prompt, sample_seed(0, 0, f"problem {i}", 0)) for i, prompt in enumerate(prompts)]


def sampler_of(chunks, grid, kv_cache_gb=None) -> MegatronSampler:
    return MegatronSampler(chunks, grid, VOCAB_SIZE, MAX_LENGTH, kv_cache_gb)


def write_without_cache(kind: str, requests: list[Request], count: int) -> list[tuple[list[int], list[float]]]:
    """Return greedy tokens and their float64 log-probs per request.

    Each token comes from a forward pass of the whole prefix on one rank.
    """
    [model], _ = build(model_config(kind), parallel())
    model.eval()
    out = []
    for request in requests:
        tokens, log_probs = list(request.prompt), []
        for _ in range(count):
            row = log_softmax_behind(model, tokens)
            first, second = row.topk(2).values.tolist()
            assert first - second > 1e-3, "too close to a tie to tell layouts apart from rounding"
            tokens.append(int(row.argmax()))
            log_probs.append(row[tokens[-1]].item())
        out.append((tokens[len(request.prompt) :], log_probs))
    return out


@torch.no_grad()
def log_softmax_behind(model: torch.nn.Module, tokens: list[int]) -> torch.Tensor:
    ids = torch.tensor([tokens])
    logits = model(ids, torch.arange(len(tokens))[None], None)
    return logits[0, -1, :VOCAB_SIZE].double().log_softmax(-1)


@pytest.fixture(scope="module")
def without_cache(ranks):
    """Return a function from a kind of model to its greedy responses to `make_requests`, computed once."""
    known: dict[str, Any] = {}

    def get(kind: str):
        if kind not in known:
            [known[kind]] = ranks.run(write_without_cache, kind, make_requests(), NEW_TOKENS, world_size=1)
        return known[kind]

    return get


def write_in_layout(
    kind: str, config: ParallelConfig, stops: tuple[int, ...], empty_replicas: bool = False
) -> dict[str, Any]:
    chunks, grid = build(model_config(kind), config)
    requests = own(grid, make_requests())
    if empty_replicas and grid.dp_rank > 0:
        requests = []
    sampler = sampler_of(chunks, grid)
    whole = sampler.generate(requests, GREEDY)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(megatron_sampler, "_PREFILL_TOKENS", 7)  # prompts are read a few rows at a time
        early = sampler.generate(requests, dataclasses.replace(GREEDY, stop_token_ids=stops))
    per_token = sampler._bytes_per_token
    small = sampler_of(chunks, grid, kv_cache_gb=2.5 * (max(PROMPT_LENGTHS) + NEW_TOKENS) * per_token / 2**30)
    batches = []
    sample_batch = small._sample_batch
    small._sample_batch = lambda *args: batches.append(1) or sample_batch(*args)  # type: ignore[method-assign]
    split = small.generate(requests, dataclasses.replace(GREEDY, stop_token_ids=stops))
    drawn = sampler.generate(requests, SAMPLED)
    return {"replica": grid.dp_rank, "replicas": grid.dp_size, "num_batches": len(batches)} | {
        "whole": whole, "early": early, "split": split, "drawn": drawn
    }  # fmt: skip


LAYOUTS = {
    "TP1": ("gqa", parallel(), 1),
    "TP2": ("gqa", parallel(tp=2), 2),
    "PP2": ("gqa", parallel(pp=2), 2),
    "TP2xPP2+SP": ("gqa", parallel(tp=2, pp=2, sp=True), 4),
    "PP2xVPP2": ("gqa", parallel(pp=2, vpp=2), 2),
    "CP2": ("gqa", parallel(cp=2), 2),
    "CP2xTP2+SP": ("gqa", parallel(cp=2, tp=2, sp=True), 4),
    "tied TP2xPP2+SP": ("tied", parallel(tp=2, pp=2, sp=True), 4),
    "MoE EP2": ("moe", parallel(ep=2), 2),
    "MoE EP2xPP2": ("moe", parallel(ep=2, pp=2), 4),
    "MoE EP2xCP2": ("moe", parallel(ep=2, cp=2), 2),
    "MoE TP2xEP2+SP": ("moe", parallel(tp=2, ep=2, sp=True), 4),
    "MoE TP2+SP, EP2 within TP": ("moe", parallel(tp=2, ep=2, etp=1, sp=True), 2),
    "MoE TP1, ETP2 over DP": ("moe", parallel(etp=2), 2),
}


@combinations(layout=list(LAYOUTS), quick={"layout": ["TP2", "PP2xVPP2", "CP2", "MoE EP2"]}, strength=1)
def test_greedy_text_equals_a_forward_without_cache_on_one_rank(ranks, without_cache, layout):
    kind, config, world_size = LAYOUTS[layout]
    expected = without_cache(kind)
    stops = stops_of([tokens for tokens, _ in expected])
    results = ranks.run(write_in_layout, kind, config, stops, world_size=world_size)
    for result in results:
        mine = expected[result["replica"] :: result["replicas"]]
        for (tokens, log_probs), response in zip(mine, result["whole"], strict=True):
            assert response.token_ids == tokens
            assert response.finish_reason == "length"
            assert response.log_probs == pytest.approx(log_probs, abs=1e-4)
            assert response.sampled_log_probs == [0.0] * NEW_TOKENS
        for name in ("early", "split"):
            for (tokens, log_probs), response in zip(mine, result[name], strict=True):
                assert (response.token_ids, response.finish_reason) == cut_at(tokens, stops)
                assert response.log_probs == pytest.approx(log_probs[: len(response.token_ids)], abs=1e-4)
        assert result["num_batches"] >= 2
        same_replica = [r for r in results if r["replica"] == result["replica"]]
        assert all(r["drawn"] == result["drawn"] for r in same_replica), "ranks of a replica disagree"


def test_the_texts_that_layouts_are_compared_on_are_not_repetitive(without_cache):
    for kind in ("gqa", "tied", "moe"):
        pairs = [pair for tokens, _ in without_cache(kind) for pair in pairwise(tokens)]
        assert sum(a != b for a, b in pairs) > 0.5 * len(pairs), kind


@combinations(layout=["MoE EP2", "MoE TP1, ETP2 over DP", "MoE TP2xEP2+SP"], quick={"layout": ["MoE EP2"]}, strength=1)
def test_a_replica_without_requests_keeps_step_until_the_others_are_done(ranks, without_cache, layout):
    kind, config, world_size = LAYOUTS[layout]
    expected = without_cache(kind)
    stops = stops_of([tokens for tokens, _ in expected])
    for result in ranks.run(write_in_layout, kind, config, stops, True, world_size=world_size):
        texts = [response.token_ids for response in result["whole"]]
        mine = expected[:: result["replicas"]] if result["replica"] == 0 else []
        assert texts == [tokens for tokens, _ in mine]


def write_one_pass_late(kind: str, config: ParallelConfig, stops: tuple[int, ...]) -> dict[str, Any]:
    """`write_in_layout` where the host learns one pass late which sequences go on, as on a GPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(survivors, "lag_of", lambda device: 1)
        return write_in_layout(kind, config, stops)


@combinations(layout=["TP1", "TP2xPP2+SP", "MoE EP2xCP2"], quick={"layout": ["TP1"]}, strength=1)
def test_a_batch_whose_end_is_known_one_pass_late_writes_the_same(ranks, without_cache, layout):
    kind, config, world_size = LAYOUTS[layout]
    stops = stops_of([tokens for tokens, _ in without_cache(kind)])
    at_once = ranks.run(write_in_layout, kind, config, stops, world_size=world_size)
    late = ranks.run(write_one_pass_late, kind, config, stops, world_size=world_size)
    for one, other in zip(at_once, late, strict=True):
        for name in ("whole", "early", "split", "drawn"):
            for expected, got in zip(one[name], other[name], strict=True):
                assert got.token_ids == expected.token_ids and got.finish_reason == expected.finish_reason
                assert got.log_probs == pytest.approx(expected.log_probs, abs=1e-5)


def draw_in_layout(config: ParallelConfig, order: list[int]) -> dict[int, Response]:
    """Responses by request, where each replica gets its share of ``order``."""
    chunks, grid = build(model_config(), config)
    mine = own(grid, order)
    requests = make_requests()
    return dict(zip(mine, sampler_of(chunks, grid).generate([requests[i] for i in mine], SAMPLED), strict=True))


def draw_in_batches_of_one() -> dict[int, Response]:
    [model], grid = build(model_config(), parallel())
    sampler = sampler_of([model], grid)
    return {i: sampler.generate([request], SAMPLED)[0] for i, request in enumerate(make_requests())}


def test_a_sample_depends_on_its_stream_only_not_on_order_batch_or_layout(ranks):
    order = list(range(len(PROMPT_LENGTHS)))
    [expected] = ranks.run(draw_in_layout, parallel(), order, world_size=1)
    texts = {i: response.token_ids for i, response in expected.items()}
    others = [
        ranks.run(draw_in_batches_of_one, world_size=1),
        ranks.run(draw_in_layout, parallel(), order[::-1], world_size=1),
        ranks.run(draw_in_layout, parallel(), order, world_size=2),  # DP2
        ranks.run(draw_in_layout, parallel(), [4, 1, 0, 6, 3, 2, 5], world_size=2),
        ranks.run(draw_in_layout, parallel(tp=2, pp=2, sp=True), order, world_size=4),
        ranks.run(draw_in_layout, parallel(cp=2), order, world_size=2),
    ]
    for results in others:
        together = {i: response for result in results for i, response in result.items()}
        assert {i: together[i].token_ids for i in order} == texts
        for i in order:
            assert together[i].log_probs == pytest.approx(expected[i].log_probs, abs=1e-4)
            assert together[i].sampled_log_probs == pytest.approx(expected[i].sampled_log_probs, abs=1e-4)


def draw_by_hand() -> tuple[list[Response], list[list[int]]]:
    """Return samples, and the same by hand: token i is where the cumulative distribution passes uniform i."""
    [model], grid = build(model_config(), parallel())
    requests = make_requests()[:4]
    responses = sampler_of([model], grid).generate(requests, dataclasses.replace(SAMPLED, top_p=1.0))
    model.eval()
    texts = []
    for request in requests:
        tokens = list(request.prompt)
        for uniform in sample_uniforms(request.seed, NEW_TOKENS):
            cdf = log_softmax_behind(model, tokens).exp().cumsum(0)
            tokens.append(int((cdf <= uniform).sum()))
        texts.append(tokens[len(request.prompt) :])
    return responses, texts


def test_token_i_of_a_sample_is_drawn_by_uniform_i_of_its_stream(ranks):
    [(responses, texts)] = ranks.run(draw_by_hand, world_size=1)
    assert [response.token_ids for response in responses] == texts


def first_tokens(sampling: SamplingParams, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the first token of ``count`` samples of one prompt, and log softmax without a cache."""
    [model], grid = build(model_config(), parallel())
    prompt = make_requests()[0].prompt
    requests = [Request(prompt, sample_seed(1, 0, "x", i)) for i in range(count)]
    responses = sampler_of([model], grid).generate(requests, sampling)
    model.eval()
    return torch.tensor([response.token_ids[0] for response in responses]), log_softmax_behind(model, prompt)


def test_sampled_frequencies_match_the_softmax_of_the_model(ranks):
    count = 4000
    [(tokens, log_probs)] = ranks.run(first_tokens, SamplingParams(1, temperature=1.3), count, world_size=1)
    assert chi_square_p_value(tokens, (log_probs / 1.3).softmax(0)) > 1e-3
    assert chi_square_p_value(tokens, log_probs.softmax(0)) < 1e-6


def draw_with_loud_padding(config: ParallelConfig) -> tuple[list[Response], list[Response]]:
    """Responses before and after the padded rows get logits of both signs, far above all others."""
    chunks, grid = build(model_config(), config)
    sampler = sampler_of(chunks, grid)
    before = sampler.generate(make_requests(), SAMPLED)
    output_layer = unwrapped(chunks[-1]).output_layer
    rows = output_layer.weight.size(0)
    start = grid.tp_rank * rows
    with torch.no_grad():
        for row in range(max(start, VOCAB_SIZE), start + rows):
            output_layer.weight[row - start] = 1000.0 * (-1) ** row
    return before, sampler.generate(make_requests(), SAMPLED)


@pytest.mark.parametrize("tp", [1, 2])
def test_padded_vocabulary_rows_are_never_sampled_and_change_no_probability(ranks, tp):
    for before, after in ranks.run(draw_with_loud_padding, parallel(tp=tp), world_size=tp):
        assert before == after
        assert all(token < VOCAB_SIZE for response in after for token in response.token_ids)


def train_around_decoding(kind: str, config: ParallelConfig) -> None:
    """Return a training step's loss and gradients, before and after decoding."""
    chunks, grid = build(model_config(kind), config)
    model = unwrapped(chunks[0])
    sampler = sampler_of(chunks, grid)
    frozen = next(iter(model.decoder.layers)).self_attention
    frozen.eval()  # a part that the user keeps in evaluation mode stays there

    def step() -> list[torch.Tensor]:
        model.zero_grad()
        tokens = torch.arange(16)[None] % VOCAB_SIZE
        logits = model(tokens, torch.arange(16)[None], None)
        logits.float().logsumexp(-1).mean().backward()
        return [logits.detach()] + [p.grad for p in model.parameters() if p.grad is not None]

    before = step()
    flags = [(name, module.training) for name, module in model.named_modules()]
    sampler.generate(make_requests(), SAMPLED)
    with pytest.raises(ValueError, match="max_new_tokens"):
        sampler.generate(make_requests(), SamplingParams(max_new_tokens=10_000))
    assert [(name, module.training) for name, module in model.named_modules()] == flags
    assert model.config.sequence_parallel == config.sequence_parallel
    assert model.decoder.input_tensor is None
    for a, b in zip(before, step(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("kind", "config", "world_size"),
    [("gqa", parallel(tp=2, sp=True), 2), ("moe", parallel(tp=2, ep=2, etp=1, sp=True), 2)],
    ids=["TP2+SP", "MoE TP2+SP"],
)
def test_decoding_leaves_the_training_step_as_it_was_bit_for_bit(ranks, kind, config, world_size):
    ranks.run(train_around_decoding, kind, config, world_size=world_size)


def rotary_around_decoding() -> None:
    chunks, grid = build(model_config(), parallel(cp=2))
    model = unwrapped(chunks[0])
    attention = model.decoder.layers[0].self_attention
    # Both ranks decode 24 positions, and a training step of 24 asks for its table with the same arguments.
    requests = [Request([rank + 1] + [5, 9] * ((24 - NEW_TOKENS) // 2), 0) for rank in range(2)]

    def table() -> torch.Tensor:
        return model.rotary_pos_emb(24, packed_seq=False, cp_group=None).clone()

    sampler = sampler_of(chunks, grid)
    fresh = sampler.generate(requests, GREEDY)
    before = table()
    assert before.size(0) == 12, "a training step holds its own positions only"
    assert sampler.generate(requests, GREEDY) == fresh
    assert torch.equal(table(), before)
    assert model.rotary_pos_emb.cp_group.size() == attention.core_attention.cp_group.size() == 2
    assert attention.pg_collection.cp.size() == model.config.context_parallel_size == 2


def test_decoding_under_context_parallelism_leaves_no_rotary_table_behind_and_takes_none(ranks):
    ranks.run(rotary_around_decoding, world_size=2)


def count_tokens_while_decoding() -> None:
    biased = model_config("moe", moe_router_enable_expert_bias=True, moe_router_score_function="sigmoid")
    [model], grid = build(biased, parallel())
    routers = [layer.mlp.router for layer in unwrapped(model).decoder.layers]
    for router in routers:
        router.local_tokens_per_expert.fill_(7)
    sampler_of([model], grid).generate(make_requests(), SAMPLED)
    assert all((router.local_tokens_per_expert == 7).all() for router in routers)


def test_decoded_tokens_do_not_count_for_the_expert_bias(ranks):
    ranks.run(count_tokens_while_decoding, world_size=1)


def decode_after_an_overlapped_step() -> None:
    """Decode on two data-parallel ranks whose parameters are one gather behind; only the first has requests."""
    optimizer_config = OptimizerConfig(
        precision="fp32", lr=0.1, clip_grad=0.0,
        overlap_grad_reduce=True, overlap_param_gather=True, use_distributed_optimizer=True,
    )  # fmt: skip
    chunks, grid = build(model_config(num_layers=2), parallel(), optimizer=optimizer_config)
    chunks = wrap_for_training(chunks, optimizer_config)
    optimizer, _ = build_optimizer(chunks, optimizer_config, 10)
    [ddp] = chunks
    sampler = sampler_of(chunks, grid)
    mine = make_requests() if grid.rank == 0 else []
    tokens = torch.arange(16)[None] % VOCAB_SIZE

    def train() -> None:
        ddp.zero_grad_buffer()
        optimizer.zero_grad()
        (10 * ddp(tokens, torch.arange(16)[None], None).float().logsumexp(-1).mean()).backward()
        ddp.finish_grad_sync()
        assert optimizer.step()[0]

    first = sampler.generate(mine, GREEDY)
    train()
    second = sampler.generate(mine, GREEDY)
    ddp.start_param_sync(force_sync=True)
    assert second == sampler.generate(mine, GREEDY)
    assert first != second or grid.rank == 1
    train()  # the hooks are back
    sampler.generate(mine, GREEDY)
    sums = torch.stack([p.detach().double().sum() for p in ddp.parameters()])
    others = [torch.empty_like(sums) for _ in range(2)]
    dist.all_gather(others, sums)
    assert torch.equal(*others)


def test_parameters_that_are_gathered_with_the_next_forward_are_gathered_before_decoding(ranks):
    ranks.run(decode_after_an_overlapped_step, world_size=2)


def write_special(changes: dict[str, Any], config: ParallelConfig, precision: str, schedule: ScheduleConfig | None):
    chunks, grid = build(
        model_config(**changes), config, optimizer=OptimizerConfig(precision=precision), schedule=schedule
    )
    responses = sampler_of(chunks, grid).generate(make_requests(), GREEDY)
    if grid.world_size > 1:
        return responses, None
    chunks[0].eval()
    tokens = make_requests()[0].prompt + responses[0].token_ids[:-1]
    return responses, log_softmax_behind(chunks[0], tokens)[responses[0].token_ids[-1]].item()


MLA = {
    "multi_latent_attention": True, "q_lora_rank": None, "kv_lora_rank": 16, "qk_head_dim": 8,
    "qk_pos_emb_head_dim": 4, "v_head_dim": 8, "rope_type": "rope",
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "precision", "schedule"),
    [
        ({}, "bf16", None),
        ({"position_embedding_type": "learned_absolute"}, "fp32", None),
        ({"transformer": MLA, "num_query_groups": None}, "fp32", None),
        (
            {},
            "fp32",
            ScheduleConfig(recompute_granularity="selective", recompute_modules=["layernorm", "mlp"]),
        ),
        (
            {},
            "fp32",
            ScheduleConfig(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1),
        ),
    ],
    ids=["bf16", "learned positions", "MLA", "selective recompute", "full recompute"],
)
def test_other_models_decode_the_same_under_pipelining_and_without_cache(ranks, changes, precision, schedule):
    [(whole, log_prob)] = ranks.run(write_special, changes, parallel(), precision, schedule, world_size=1)
    assert whole[0].log_probs[-1] == pytest.approx(log_prob, abs=0.1 if precision == "bf16" else 1e-4)
    for piped, _ in ranks.run(write_special, changes, parallel(pp=2), precision, schedule, world_size=2):
        assert [r.token_ids for r in piped] == [r.token_ids for r in whole]


def refuse() -> list[str]:
    [model], grid = build(model_config(), parallel())
    sentences = []

    def collect(make, error) -> None:
        with pytest.raises(error) as caught:
            make()
        sentences.append(str(caught.value))

    room = sampler_of([model], grid, kv_cache_gb=1e-6)
    collect(lambda: room.generate(make_requests(), GREEDY), ValueError)
    collect(lambda: sampler_of([model], grid).generate([Request([1] * 60, 0)], GREEDY), ValueError)
    collect(lambda: sampler_of([model], grid).generate([*make_requests(), Request([], 0)], GREEDY), ValueError)
    assert sampler_of([model], grid).generate([], GREEDY) == []
    for name, value in [("flash_decode", True), ("cuda_graph_impl", "local"), ("window_size", (8, 0))]:
        unwrapped(model).config.__dict__[name], before = value, getattr(unwrapped(model).config, name)
        collect(lambda: sampler_of([model], grid), ConfigError)
        setattr(unwrapped(model).config, name, before)
    unwrapped(model).position_embedding_type = "mrope"
    collect(lambda: sampler_of([model], grid), ConfigError)
    return sentences


def test_what_cannot_be_decoded_is_refused_with_a_sentence_that_names_it(ranks):
    [sentences] = ranks.run(refuse, world_size=1)
    words = [
        "kv_cache_gb",
        "60 tokens",
        "empty prompt",
        "flash_decode",
        "cuda_graph_impl",
        "window_size",
        "mrope",
    ]
    for sentence, word in zip(sentences, words, strict=True):
        assert word in sentence


def refuse_on_every_rank() -> None:
    """Refuse the first replica's too long prompt on every rank; the second replica must not wait in a collective."""
    chunks, grid = build(model_config(), parallel())
    requests = [Request([1] * 60, 0)] if grid.dp_rank == 0 else make_requests()
    with pytest.raises(ValueError, match="60 tokens"):
        sampler_of(chunks, grid).generate(requests, GREEDY)


def test_a_request_that_one_replica_cannot_serve_is_an_error_on_all_ranks(ranks):
    ranks.run(refuse_on_every_rank, world_size=2)


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
