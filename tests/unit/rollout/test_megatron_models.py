# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Sampling in process leaves the training step unchanged, knows many kinds of models, and refuses the other kinds."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.distributed as dist
from decoding import GREEDY, NEW_TOKENS, log_softmax_after, make_requests, sampler_of
from models import ROTATIONS, VOCAB_SIZE, build, model_config, parallel
from responses import tokens
from tiers import combinations

from megatron_selfdistill.config import OptimizerConfig, ParallelConfig, RecomputeConfig, ScheduleConfig
from megatron_selfdistill.errors import ConfigError
from megatron_selfdistill.model.build import build_optimizer, wrap_for_training
from megatron_selfdistill.model.forward import unwrapped
from megatron_selfdistill.rollout.base import Request, Response, SamplingParams

pytestmark = pytest.mark.full

SAMPLED = dataclasses.replace(GREEDY, temperature=1.0, top_p=0.95)


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


TRAINED = {"TP2+SP": ("gqa", parallel(tp=2, sp=True)), "MoE TP2+SP": ("moe", parallel(tp=2, ep=2, etp=1, sp=True))}


@combinations(layout=list(TRAINED), quick={"layout": ["MoE TP2+SP"]}, strength=1)
def test_decoding_leaves_the_training_step_as_it_was_bit_for_bit(ranks, layout):
    ranks.run(train_around_decoding, *TRAINED[layout], world_size=2)


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
        overlap_grad_reduce=True, overlap_param_gather=True, use_distributed_optimizer=True
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


MLA = {
    "multi_latent_attention": True, "q_lora_rank": None, "kv_lora_rank": 16, "qk_head_dim": 8,
    "qk_pos_emb_head_dim": 4, "v_head_dim": 8, "rope_type": "rope"
}  # fmt: skip


def recomputing(**options: Any) -> ScheduleConfig:
    return ScheduleConfig(recompute=RecomputeConfig(**options))


SPECIAL: dict[str, tuple[dict[str, Any], str, ScheduleConfig | None]] = {
    "bf16": ({}, "bf16", None),
    "learned positions": ({"position_embedding_type": "learned_absolute"}, "fp32", None),
    **{name: (changes, "fp32", None) for name, changes in ROTATIONS.items()},
    "MLA": ({"transformer": MLA, "num_query_groups": None}, "fp32", None),
    "windows": ({"transformer": {"window_size": [5, 0], "window_attn_skip_freq": 2}}, "fp32", None),
    "windows and sinks": (
        {
            "num_layers": 4,
            "transformer": {"window_size": [3, 0], "window_attn_skip_freq": [0, 1, 1, 0], "softmax_type": "learnable"},
        },
        "fp32",
        recomputing(granularity="selective", modules=["core_attn"]),
    ),
    "gated delta nets": (dataclasses.asdict(model_config("gated_delta", num_layers=2)), "fp32", None),
    "experts with biases": (
        {
            **{"num_moe_experts": 4, "moe_ffn_hidden_size": 32, "add_bias_linear": True},
            **{"activation": "quick_gelu", "position_embedding_type": "yarn"},
            "transformer": {
                **{"window_size": [3, 0], "window_attn_skip_freq": 2, "softmax_type": "learnable"},
                **{"activation_func_clamp_value": 1.0, "glu_linear_offset": 1.0},
            },
        },
        "fp32",
        None,
    ),
    "selective recompute": ({}, "fp32", recomputing(granularity="selective", modules=["layernorm", "mlp"])),
    "full recompute": ({}, "fp32", recomputing(granularity="full", method="uniform", num_layers=1)),
}


def write_special(config: ParallelConfig) -> dict[str, tuple[list[Response], float | None]]:
    """Return responses of each model, and on one rank the log-prob of the first one's end by a whole pass."""
    found = {}
    for name, (changes, precision, schedule) in SPECIAL.items():
        optimizer = OptimizerConfig(precision=precision)
        model = model_config(**({"num_layers": 2} | changes))  # one layer on each stage
        chunks, grid = build(model, config, optimizer=optimizer, schedule=schedule)
        sampler, log_prob = sampler_of(chunks, grid), None
        responses = sampler.generate(make_requests(), GREEDY)
        if sampler._student.has_one_pass:
            recorded = sampler_of(chunks, grid, cuda_graphs=True).generate(make_requests(), GREEDY)
            assert tokens(recorded) == tokens(responses)
        if grid.world_size == 1:
            chunks[0].eval()
            text = make_requests()[0].prompt + responses[0].token_ids[:-1]
            log_prob = log_softmax_after(chunks[0], text)[responses[0].token_ids[-1]].item()
        found[name] = responses, log_prob
    return found


@pytest.fixture(scope="module")
def special(ranks) -> list[dict[str, tuple[list[Response], float | None]]]:
    alone, piped = parallel(), parallel(pp=2)
    return [*ranks.run(write_special, alone, world_size=1), *ranks.run(write_special, piped, world_size=2)]


@pytest.mark.parametrize("name", SPECIAL)
def test_other_models_decode_the_same_under_pipelining_and_without_cache(special, name):
    (whole, log_prob), *piped = (found[name] for found in special)
    assert whole[0].log_probs[-1] == pytest.approx(log_prob, abs=0.1 if name == "bf16" else 1e-4)
    assert len(piped) == 2
    for responses, _ in piped:
        assert tokens(responses) == tokens(whole)


def refuse() -> list[str]:
    [model], grid = build(model_config(), parallel())
    messages = []

    def collect(make, error) -> None:
        with pytest.raises(error) as caught:
            make()
        messages.append(str(caught.value))

    room = sampler_of([model], grid, kv_cache_gb=1e-6)
    collect(lambda: room.generate(make_requests(), GREEDY), ValueError)
    collect(lambda: sampler_of([model], grid).generate([Request([1] * 60, 0)], GREEDY), ValueError)
    collect(lambda: sampler_of([model], grid).generate([*make_requests(), Request([], 0)], GREEDY), ValueError)
    assert sampler_of([model], grid).generate([], GREEDY) == []
    for name, value in [("flash_decode", True), ("cuda_graph_impl", "local")]:
        unwrapped(model).config.__dict__[name], before = value, getattr(unwrapped(model).config, name)
        collect(lambda: sampler_of([model], grid), ConfigError)
        setattr(unwrapped(model).config, name, before)
    unwrapped(model).position_embedding_type = "mrope"
    collect(lambda: sampler_of([model], grid), ConfigError)
    [experts], grid = build(model_config("moe"), parallel())
    config = vars(unwrapped(experts).config)
    for name, value in ROUTERS:
        before = dict(config)
        config[name] = value
        collect(lambda: sampler_of([experts], grid), ConfigError)
        config.clear()
        config.update(before)
    return messages


ROUTERS: list[tuple[str, object]] = [
    ("moe_router_force_biased", 0.5),
    ("moe_input_jitter_eps", 0.1),
    ("moe_router_force_load_balancing", True),
]
"""Settings of a router under which the experts of a token are random."""


def test_what_cannot_be_decoded_is_refused_with_a_message_that_names_it(ranks):
    [messages] = ranks.run(refuse, world_size=1)
    words = ["kv_cache_gb", "60 tokens", "empty prompt", "flash_decode", "cuda_graph_impl", "mrope", *dict(ROUTERS)]
    for message, word in zip(messages, words, strict=True):
        assert word in message


def refuse_on_every_rank() -> None:
    """Refuse the first replica's too long prompt on every rank; the second replica must not wait in a collective."""
    chunks, grid = build(model_config(), parallel())
    requests = [Request([1] * 60, 0)] if grid.dp_rank == 0 else make_requests()
    with pytest.raises(ValueError, match="60 tokens"):
        sampler_of(chunks, grid).generate(requests, GREEDY)


def test_a_request_that_one_replica_cannot_serve_is_an_error_on_all_ranks(ranks):
    ranks.run(refuse_on_every_rank, world_size=2)
