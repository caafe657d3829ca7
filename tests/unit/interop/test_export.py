# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""A live model exports every tensor bit for bit, from every layout, a bucket at a time."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import models
import pytest
import torch
import torch.distributed as dist
from bytes_alive import BytesAlive
from called_collectives import GATHER
from tiers import combinations
from torch import Tensor

from megatron_selfdistill.config import ModelConfig, OptimizerConfig, ParallelConfig
from megatron_selfdistill.distributed.ranks import RankGrid
from megatron_selfdistill.errors import ConfigError
from tests.unit.model import test_grouped_experts as grouped_experts

EVERYTHING = 2**30
ONE_BY_ONE = 1
SOME = 20_000
EXPERT_BIAS = {"moe_router_enable_expert_bias": True, "moe_router_score_function": "sigmoid"}
SHARED_EXPERTS = {"transformer": {"moe_shared_expert_intermediate_size": 48}}
ODD = {"hidden_size": 33, "kv_channels": 8}  # two-byte tensors end where four-byte ones may not begin
MIXED = {"num_layers": 4, "transformer": {"moe_layer_freq": [0, 1, 1, 1]}}


def sizes(**changes: Any) -> ParallelConfig:
    """``sizes(tensor=2, pipeline=2)``."""
    named = {f"{name}_parallel_size": value for name, value in changes.items() if name in ("context", "expert_tensor")}
    named |= {
        f"{name}_model_parallel_size": value
        for name, value in changes.items()
        if name in ("tensor", "pipeline", "virtual_pipeline", "expert")
    }
    return ParallelConfig(**named, sequence_parallel=changes.get("sequence_parallel", False))


LAYOUTS = {
    "TP1": ("shallow", {}, sizes(), 1),
    "TP2xPP2": ("shallow", {}, sizes(tensor=2, pipeline=2), 4),
    "PP2xVPP2": ("gqa", {}, sizes(pipeline=2, virtual_pipeline=2), 2),
    "TP2xPP2+SP, tied, biases": ("tied", {"num_layers": 2}, sizes(tensor=2, pipeline=2, sequence_parallel=True), 4),
    "TP2xDP2": ("tied", {"num_layers": 2}, sizes(tensor=2), 4),
    "CP2": ("shallow", {}, sizes(context=2), 2),
    "EP2": ("moe", {}, sizes(expert=2), 2),
    "EP2xPP2": ("moe", EXPERT_BIAS | ODD, sizes(expert=2, pipeline=2), 4),
    "EP4": ("moe", {}, sizes(expert=4), 4),
    "TP2xEP2+SP": ("moe", {}, sizes(tensor=2, expert=2, sequence_parallel=True), 4),
    "TP2xEP2+SP, ETP1": ("moe", SHARED_EXPERTS, sizes(tensor=2, expert=2, expert_tensor=1, sequence_parallel=True), 2),
    "TP2xPP2+SP, ETP1": ("moe", MIXED, sizes(tensor=2, pipeline=2, expert_tensor=1, sequence_parallel=True), 4),
}


QUICK = ["PP2xVPP2", "TP2xPP2+SP, tied, biases", "CP2", "EP2", "TP2xEP2+SP, ETP1"]


def rules_of(model: ModelConfig) -> list:
    from megatron_selfdistill.interop.hf.mapping import FAMILIES

    return FAMILIES["Qwen3MoeForCausalLM"].rules(model)


def original(model: ModelConfig, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the Hugging Face tensors of the weights of `models.fill_from_names`, without a model."""
    rules = rules_of(model)
    stacks: dict[str, tuple[int, ...]] = {}
    for rule in rules:
        index = rule.megatron.index
        deepest = stacks.get(rule.megatron.key, index)
        stacks[rule.megatron.key] = tuple(map(max, deepest, index))
    tensors = {}
    for rule in rules:
        lead = tuple(n + 1 for n in stacks[rule.megatron.key])
        full = models.full_weight(rule.megatron.key, (*lead, *rule.shape))
        for i in rule.megatron.index:
            full = full[i]
        full = full.to(torch.float32 if rule.float32 else dtype)
        tensors |= {name: t.clone() for name, t in zip(rule.hf_names, rule.to_hf(full), strict=True)}
    return tensors


def exported(
    model: ModelConfig,
    parallel: ParallelConfig,
    precision: str = "fp32",
    bucket_bytes: tuple[int, ...] = (EVERYTHING,),
    on_ranks: list[int] | None = None,
) -> list[list[list[tuple[str, Tensor]]]]:
    """Return the buckets of a model wrapped for training, for each size of bucket."""
    from megatron_selfdistill.interop.export import Exporter
    from megatron_selfdistill.model.build import wrap_for_training

    optimizer = OptimizerConfig(precision=precision)
    chunks, grid = models.build(model, parallel, optimizer=optimizer)
    chunks = wrap_for_training(chunks, optimizer)
    rules = rules_of(model)
    return [
        [list(bucket) for bucket in Exporter(chunks, grid, rules, bucket_bytes=size, on_ranks=on_ranks).stream()]
        for size in bucket_bytes
    ]


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
    kind, changes, parallel, world_size = LAYOUTS[layout]
    model = models.model_config(kind, **changes)
    per_rank = ranks.run(exported, model, parallel, "fp32", (EVERYTHING, SOME, ONE_BY_ONE), world_size=world_size)
    expected = original(model, torch.float32)
    for by_size in per_rank:
        for buckets in by_size:
            assert_equal(flat(buckets), expected)
        everything, some, one_by_one = map(len, by_size)
        assert everything < some < one_by_one
        assert one_by_one == len(rules_of(model))


@combinations(layout=["TP2xPP2+SP, tied, biases", "EP2xPP2"], quick={"layout": ["EP2xPP2"]}, strength=1)
def test_bf16_models_give_bf16_and_expert_biases_stay_float32(ranks, layout):
    kind, changes, parallel, world_size = LAYOUTS[layout]
    model = models.model_config(kind, **changes)
    for (buckets,) in ranks.run(exported, model, parallel, "bf16", world_size=world_size):
        assert_equal(flat(buckets), original(model, torch.bfloat16))


@pytest.mark.parametrize(
    ("layout", "on_ranks"),
    [
        ("TP2xDP2", [0, 1]),
        ("EP2xPP2", [1]),
        *(pytest.param(*case, marks=pytest.mark.full) for case in [("TP2xPP2", [3]), ("EP4", [2])]),
    ],
)
def test_ranks_that_do_not_want_tensors_get_as_many_empty_buckets(ranks, layout, on_ranks):
    kind, changes, parallel, world_size = LAYOUTS[layout]
    model = models.model_config(kind, **changes)
    per_rank = ranks.run(exported, model, parallel, "fp32", (SOME,), on_ranks, world_size=world_size)
    counts = {len(buckets) for (buckets,) in per_rank}
    assert len(counts) == 1
    for rank, (buckets,) in enumerate(per_rank):
        if rank in on_ranks:
            assert_equal(flat(buckets), original(model, torch.float32))
        else:
            assert not any(buckets)


def transfers(
    model: ModelConfig, parallel: ParallelConfig, bucket_bytes: list[int], on_ranks: list[int] | None
) -> list[tuple[list[tuple[str, int]], int, int]]:
    """Return the transfers of `stream` with their bytes, the buckets, and the bytes of all tensors on this rank.

    They are returned for each size of buckets.
    """
    chunks, grid = models.build(model, parallel)
    return [transfers_of(chunks, grid, rules_of(model), size, on_ranks) for size in bucket_bytes]


def transfers_of(
    chunks: list, grid: RankGrid, rules: list, bucket_bytes: int, on_ranks: list[int] | None
) -> tuple[list[tuple[str, int]], int, int]:
    from megatron_selfdistill.interop.export import Exporter

    exporter = Exporter(chunks, grid, rules, bucket_bytes=bucket_bytes, on_ranks=on_ranks)
    calls = []
    with pytest.MonkeyPatch.context() as patch:
        for name in ("broadcast", GATHER):

            def recorded(name: str, call: Any, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
                calls.append((name, tensor.nbytes))
                return call(tensor, *args, **kwargs)

            patch.setattr(dist, name, functools.partial(recorded, name, getattr(dist, name)))
        num_buckets = sum(1 for _ in exporter.stream())
    return calls, num_buckets, sum(4 * math.prod(rule.shape) for rule in rules)


def test_a_bucket_takes_two_transfers_and_a_replica_that_nobody_asks_none(ranks):
    model = models.model_config("shallow")
    per_rank = ranks.run(transfers, model, sizes(tensor=2, pipeline=2), [SOME], [0], world_size=8)
    num_buckets = per_rank[0][0][1]
    counts = [len(calls) for ((calls, _, _),) in per_rank]
    # Megatron's order of ranks is TP, DP, PP: 0, 1 and 4, 5 are the replica of rank 0.
    assert num_buckets > 4
    assert counts[0] == counts[1] == 2 * num_buckets
    assert counts[4] == counts[5] == num_buckets  # only hand their shards on
    assert [counts[rank] for rank in (2, 3, 6, 7)] == [0, 0, 0, 0]


def test_experts_are_gathered_almost_without_padding(ranks):
    """Check that ranks with different experts share each bucket, and that a single holder sends its tensors alone."""
    model = models.model_config("moe", num_moe_experts=16)
    at_least = {EVERYTHING: 1, 50_000: 8, ONE_BY_ONE: 0}
    for of_rank in ranks.run(transfers, model, sizes(expert=4), list(at_least), None, world_size=4):
        for gathers, (calls, _, total) in zip(at_least.values(), of_rank, strict=True):
            assert sum(num_bytes for _, num_bytes in calls) <= 1.25 * total
            names = [name for name, _ in calls]
            assert names.count(GATHER) >= gathers
            assert not gathers or "broadcast" not in names


def bytes_alive(parallel: ParallelConfig, model: ModelConfig, bucket_bytes: int) -> tuple[int, int, int, int]:
    """While `stream` is consumed: the most bytes alive; those of the fullest bucket, of the largest tensor, of all."""
    from megatron_selfdistill.interop.export import Exporter

    chunks, grid = models.build(model, parallel)
    rules = rules_of(model)
    exporter = Exporter(chunks, grid, rules, bucket_bytes=bucket_bytes)
    fullest = total = 0
    with BytesAlive([*chunks[0].parameters(), *chunks[0].buffers()]) as alive:
        for bucket in exporter.stream():
            size = sum(tensor.nbytes for _, tensor in bucket)
            fullest, total = max(fullest, size), total + size
    return alive.peak, fullest, max(4 * math.prod(rule.shape) for rule in rules), total


@pytest.mark.parametrize(("kind", "parallel"), [("gqa", sizes(tensor=2)), ("moe", sizes(expert=2))])
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


def without_copies_of_each(kinds: list[str], parallel: ParallelConfig) -> list[float]:
    return [without_copies(models.model_config(kind), parallel) for kind in kinds]


def without_copies(model: ModelConfig, parallel: ParallelConfig) -> float:
    """Return the share of bytes that the weights own."""
    from megatron_selfdistill.interop.export import Exporter

    chunks, grid = models.build(model, parallel)
    exporter = Exporter(chunks, grid, rules_of(model), bucket_bytes=SOME)
    views = flat([list(bucket) for bucket in exporter.stream()])
    own = {p.untyped_storage().data_ptr() for chunk in chunks for p in chunk.parameters()}
    lent = sum(t.nbytes for t in views.values() if t.untyped_storage().data_ptr() in own)
    return lent / sum(t.nbytes for t in views.values())


def test_a_rank_that_holds_all_hands_out_its_weights_themselves(ranks):
    """All but what has to be put in another order."""
    (found,) = ranks.run(without_copies_of_each, ["shallow", "tied", "moe"], ParallelConfig(), world_size=1)
    assert min(found) > 0.75


def test_a_rank_that_holds_a_part_hands_out_copies(ranks):
    for found in ranks.run(without_copies_of_each, ["shallow"], sizes(tensor=2), world_size=2):
        assert found == [0.0]


def from_each_bucket(model: ModelConfig, parallel: ParallelConfig) -> list[bool]:
    """Return, for each bucket, whether a stream that begins with it has the tensors from there on."""
    from megatron_selfdistill.interop.export import Exporter

    chunks, grid = models.build(model, parallel)
    exporter = Exporter(chunks, grid, rules_of(model), bucket_bytes=SOME)
    whole = [list(bucket) for bucket in exporter.stream()]
    found = []
    for first in range(len(whole) + 1):
        tail, expected = flat([list(b) for b in exporter.stream(first)]), flat(whole[first:])
        found.append(list(tail) == list(expected) and all(torch.equal(tail[name], expected[name]) for name in tail))
    return found


def test_a_stream_can_begin_with_any_bucket(ranks):
    for found in ranks.run(from_each_bucket, models.model_config("shallow"), sizes(tensor=2), world_size=2):
        assert len(found) > 4 and all(found)


def after_a_step(optimizer: OptimizerConfig) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    """Return the exports before and after an optimizer step, and the logits of the next forward pass."""
    from megatron_selfdistill.interop.export import Exporter
    from megatron_selfdistill.model.build import build_optimizer, wrap_for_training
    from megatron_selfdistill.model.forward import unwrapped

    model = models.model_config("tied", num_layers=2)
    chunks, grid = models.build(model, ParallelConfig(), optimizer=optimizer)
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
        logits = chunks[0](tokens, tokens, None)
    return before, after, logits


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


def refusals(parallel: ParallelConfig) -> list[str]:
    """Return the message for a lost rule, and for a model of another width."""
    from megatron_selfdistill.interop.export import Exporter

    model = models.model_config("gqa")
    chunks, grid = models.build(model, parallel)
    lost = [rule for rule in rules_of(model) if rule.megatron.key != "decoder.final_layernorm.weight"]
    messages = []
    for rules in (lost, rules_of(dataclasses.replace(model, ffn_hidden_size=72))):
        with pytest.raises(ConfigError) as caught:
            Exporter(chunks, grid, rules, bucket_bytes=SOME)
        messages.append(str(caught.value))
    return messages


def test_rules_that_do_not_fit_are_refused_on_every_rank(ranks):
    first, second = ranks.run(refusals, sizes(pipeline=2), world_size=2)
    assert first == second and "final_layernorm.weight has no rule" in first[0] and "has shape" in first[1]


def experts_exported(cuts: Any, grouped: bool, kind: str) -> dict[str, Tensor]:
    """Return every tensor under its Hugging Face name, on rank 0."""
    from megatron_selfdistill.interop.export import Exporter
    from megatron_selfdistill.interop.hf.mapping import FAMILIES

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
    return {kind: ranks.run(experts_exported, sizes(), False, kind, world_size=1)[0] for kind in grouped_experts.MODELS}


@grouped_experts.in_layouts
def test_grouped_experts_are_exported_under_the_same_names_with_the_same_values(ranks, experts_alone, name, model):
    cuts, world_size = grouped_experts.LAYOUTS[name]
    expected = experts_alone[model]
    got = ranks.run(experts_exported, cuts, True, model, world_size=world_size)[0]
    assert got.keys() == expected.keys()
    assert any(".experts.3." in key or key.endswith("experts.down_proj_bias") for key in got)
    assert all(got[key].equal(expected[key]) for key in got)
