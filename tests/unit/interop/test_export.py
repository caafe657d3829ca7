# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""A live model exports every tensor bit for bit, from every layout, a bucket at a time."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import models
import pytest
import torch
from bytes_alive import BytesAlive
from models import parallel
from tiers import combinations
from torch import Tensor

from megatron_selfdistill.config import ModelConfig, OptimizerConfig, ParallelConfig
from megatron_selfdistill.errors import ConfigError
from megatron_selfdistill.interop.export import Exporter
from megatron_selfdistill.interop.hf.mapping import FAMILIES
from megatron_selfdistill.model.build import build_optimizer, wrap_for_training
from megatron_selfdistill.model.forward import unwrapped
from tests.unit.model import test_grouped_experts as grouped_experts

EVERYTHING, SOME, ONE_BY_ONE = 2**30, 20_000, 1  # bytes of a bucket
EXPERT_BIAS = {"moe_router_enable_expert_bias": True, "moe_router_score_function": "sigmoid"}
SHARED_EXPERTS = {"transformer": {"moe_shared_expert_intermediate_size": 48}}
ODD = {"hidden_size": 33, "kv_channels": 8}  # two-byte tensors end where four-byte ones may not begin
MIXED = {"num_layers": 4, "transformer": {"moe_layer_freq": [0, 1, 1, 1]}}


LAYOUTS = {
    "PP2xVPP2": ("gqa", {}, parallel(pp=2, vpp=2), 2),
    "TP2xPP2": ("shallow", {}, parallel(tp=2, pp=2), 4),
    "TP2xPP2+SP, tied, biases": ("tied", {"num_layers": 2}, parallel(tp=2, pp=2, sp=True), 4),
    "EP2xPP2": ("moe", EXPERT_BIAS | ODD, parallel(ep=2, pp=2), 4),
    "TP2xEP2+SP": ("moe", {}, parallel(tp=2, ep=2, sp=True), 4),
    "TP2xEP2+SP, ETP1": ("moe", SHARED_EXPERTS, parallel(tp=2, ep=2, etp=1, sp=True), 2),
    "TP2xPP2+SP, ETP1": ("moe", MIXED, parallel(tp=2, pp=2, etp=1, sp=True), 4),
}
"""Beside those of interop/hf/test_hf_layouts.py, in which every family is exported."""
QUICK = ["PP2xVPP2", "TP2xPP2+SP, tied, biases", "TP2xEP2+SP, ETP1"]


def rules_of(model: ModelConfig) -> list:
    return FAMILIES["Qwen3MoeForCausalLM"].rules(model)


def original(model: ModelConfig) -> dict[str, Tensor]:
    """Return the Hugging Face tensors of the weights of `models.fill_from_names`, without a model."""
    rules, stacks, tensors = rules_of(model), dict[str, tuple[int, ...]](), dict[str, Tensor]()
    for rule in rules:
        index = rule.megatron.index
        stacks[rule.megatron.key] = tuple(map(max, stacks.get(rule.megatron.key, index), index))
    for rule in rules:
        lead = tuple(n + 1 for n in stacks[rule.megatron.key])
        full = models.full_weight(rule.megatron.key, (*lead, *rule.shape))
        for i in rule.megatron.index:
            full = full[i]
        tensors |= {name: t.clone() for name, t in zip(rule.hf_names, rule.to_hf(full), strict=True)}
    return tensors


def exported(
    model: ModelConfig, cuts: ParallelConfig, bucket_bytes: tuple[int, ...], on_ranks: list[int] | None = None
) -> list[list[list[tuple[str, Tensor]]]]:
    """Return the buckets of a model wrapped for training, for each size of bucket."""
    optimizer = OptimizerConfig(precision="fp32")
    chunks, grid = models.build(model, cuts, optimizer=optimizer)
    chunks, rules = wrap_for_training(chunks, optimizer), rules_of(model)
    exporters = (Exporter(chunks, grid, rules, bucket_bytes=size, on_ranks=on_ranks) for size in bucket_bytes)
    return [[list(bucket) for bucket in exporter.stream()] for exporter in exporters]


def flat(buckets: list[list[tuple[str, Tensor]]]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, tensor in (pair for bucket in buckets for pair in bucket):
        assert name not in tensors, f"{name} comes twice"
        tensors[name] = tensor
    return tensors


def assert_equal(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype, name
        assert torch.equal(got[name], tensor), name


@combinations(layout=list(LAYOUTS), quick={"layout": QUICK}, strength=1)
def test_every_rank_gets_the_original_tensors_to_the_last_bit(ranks, layout):
    kind, changes, cuts, world_size = LAYOUTS[layout]
    model = models.model_config(kind, **changes)
    per_rank = ranks.run(exported, model, cuts, (EVERYTHING, SOME, ONE_BY_ONE), world_size=world_size)
    expected = original(model)
    for by_size in per_rank:
        for buckets in by_size:
            assert_equal(flat(buckets), expected)
        everything, some, one_by_one = map(len, by_size)
        assert everything < some < one_by_one
        assert one_by_one == len(rules_of(model))


def test_ranks_that_do_not_want_tensors_get_as_many_empty_buckets(ranks):
    kind, changes, cuts, world_size = LAYOUTS["EP2xPP2"]
    model = models.model_config(kind, **changes)
    per_rank = ranks.run(exported, model, cuts, (SOME,), [1], world_size=world_size)
    assert len({len(buckets) for (buckets,) in per_rank}) == 1
    assert_equal(flat(per_rank.pop(1)[0]), original(model))
    assert not any(any(buckets) for (buckets,) in per_rank)


def bytes_alive(cuts: ParallelConfig, model: ModelConfig, bucket_bytes: int) -> tuple[int, int, int, int]:
    """While `stream` is consumed: the most bytes alive; those of the fullest bucket, of the largest tensor, of all."""
    chunks, grid = models.build(model, cuts)
    rules = rules_of(model)
    exporter = Exporter(chunks, grid, rules, bucket_bytes=bucket_bytes)
    fullest = total = 0
    with BytesAlive([*chunks[0].parameters(), *chunks[0].buffers()]) as alive:
        for bucket in exporter.stream():
            size = sum(tensor.nbytes for _, tensor in bucket)
            fullest, total = max(fullest, size), total + size
    return alive.peak, fullest, max(4 * math.prod(rule.shape) for rule in rules), total


@pytest.mark.parametrize(("kind", "parallel"), [("gqa", parallel(tp=2)), ("moe", parallel(ep=2))])
def test_one_bucket_of_full_tensors_is_alive_at_a_time(ranks, kind, parallel):
    width = {"ffn_hidden_size": 128} if kind == "gqa" else {"moe_ffn_hidden_size": 64}
    model = models.model_config(kind, hidden_size=64, num_layers=8, **width)
    bucket_bytes = 200_000
    for peak, fullest, largest, total in ranks.run(bytes_alive, parallel, model, bucket_bytes, world_size=2):
        assert total > 5 * bucket_bytes
        assert 0.7 * bucket_bytes < fullest <= bucket_bytes
        # The full tensors, and the shards that they are made of.  What this rank sent is gone by then, as far as gloo's
        # threads have let go of it.
        assert 2 * fullest <= peak <= 2.5 * fullest + 2 * largest


def from_each_bucket(model: ModelConfig, cuts: ParallelConfig) -> list[bool]:
    """Return, for each bucket, whether a stream that begins with it has the tensors from there on."""
    chunks, grid = models.build(model, cuts)
    exporter = Exporter(chunks, grid, rules_of(model), bucket_bytes=SOME)
    whole = [list(bucket) for bucket in exporter.stream()]
    found = []
    for first in range(len(whole) + 1):
        tail, expected = flat([list(b) for b in exporter.stream(first)]), flat(whole[first:])
        found.append(list(tail) == list(expected) and all(torch.equal(tail[name], expected[name]) for name in tail))
    return found


def test_a_stream_can_begin_with_any_bucket(ranks):
    for found in ranks.run(from_each_bucket, models.model_config("shallow"), parallel(tp=2), world_size=2):
        assert len(found) > 4 and all(found)


def after_a_step(optimizer: OptimizerConfig) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    """Return the exports before and after an optimizer step, and the logits of the next forward pass."""
    model = models.model_config("tied", num_layers=2)
    chunks, grid = models.build(model, parallel(), optimizer=optimizer)
    chunks = wrap_for_training(chunks, optimizer)
    megatron_optimizer, scheduler = build_optimizer(chunks, optimizer, 10)
    exporter = Exporter(chunks, grid, rules_of(model), bucket_bytes=SOME)
    before = {name: t.clone() for name, t in flat([list(bucket) for bucket in exporter.stream()]).items()}
    chunks[0].zero_grad_buffer()
    for name, param in unwrapped(chunks[0]).named_parameters():
        param.main_grad.copy_(models.full_weight(name, param.shape, seed=7))
    scheduler.step(1)
    megatron_optimizer.step()
    after = flat([list(bucket) for bucket in exporter.stream()])
    chunks[0].zero_grad_buffer()
    tokens = torch.arange(12).view(1, -1)
    with torch.no_grad():
        return before, after, chunks[0](tokens, tokens, None)


def test_after_an_optimizer_step_the_new_weights_leave_also_where_their_gathering_is_put_off(ranks):
    eager = OptimizerConfig(precision="fp32", clip_grad=0.0, lr=1e-2, lr_warmup_steps=0)
    overlapped = dataclasses.replace(
        eager, use_distributed_optimizer=True, overlap_grad_reduce=True, overlap_param_gather=True
    )
    ((before, expected, logits),) = ranks.run(after_a_step, eager, world_size=1)
    assert all(not torch.equal(before[name], expected[name]) for name in expected)
    for _, after, their_logits in ranks.run(after_a_step, overlapped, world_size=2):
        assert_equal(after, expected)
        assert torch.equal(their_logits, logits)


def refusals(cuts: ParallelConfig) -> list[str]:
    """Return the message for a lost rule, and for a model of another width."""
    model = models.model_config("gqa")
    chunks, grid = models.build(model, cuts)
    lost = [rule for rule in rules_of(model) if rule.megatron.key != "decoder.final_layernorm.weight"]
    messages = []
    for rules in (lost, rules_of(dataclasses.replace(model, ffn_hidden_size=72))):
        with pytest.raises(ConfigError) as caught:
            Exporter(chunks, grid, rules, bucket_bytes=SOME)
        messages.append(str(caught.value))
    return messages


def test_rules_that_do_not_fit_are_refused_on_every_rank(ranks):
    first, second = ranks.run(refusals, parallel(pp=2), world_size=2)
    assert first == second and "final_layernorm.weight has no rule" in first[0] and "has shape" in first[1]


def experts_exported(cuts: Any, grouped: bool, kind: str) -> dict[str, Tensor]:
    """Return every tensor under its Hugging Face name, on rank 0."""
    family, changes = grouped_experts.MODELS[kind]
    model = models.model_config("moe", **changes)
    with pytest.MonkeyPatch.context() as patch:
        if grouped:
            patch.setattr(grouped_experts.build, "layer_spec", grouped_experts.grouped_spec)
        chunks, grid = models.build(model, cuts)
    experts = models.unwrapped(chunks[0]).decoder.layers[0].mlp.experts
    assert type(experts).__name__ == ("TEGroupedMLP" if grouped else "SequentialMLP")
    rules = FAMILIES[family].rules(model)
    return {name: tensor.clone() for run in Exporter(chunks, grid, rules).stream() for name, tensor in run}


@pytest.fixture(scope="module")
def experts_alone(ranks) -> dict[str, dict[str, Tensor]]:
    return {
        kind: ranks.run(experts_exported, parallel(), False, kind, world_size=1)[0] for kind in grouped_experts.MODELS
    }


@pytest.mark.full
@grouped_experts.in_layouts
def test_grouped_experts_are_exported_under_the_same_names_with_the_same_values(ranks, experts_alone, name, model):
    cuts, world_size = grouped_experts.LAYOUTS[name]
    expected = experts_alone[model]
    got = ranks.run(experts_exported, cuts, True, model, world_size=world_size)[0]
    assert got.keys() == expected.keys()
    assert any(".experts.3." in key or key.endswith("experts.down_proj_bias") for key in got)
    assert all(got[key].equal(expected[key]) for key in got)
