# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The arithmetic of memory against what Megatron's buffers, optimizers and layers really hold."""

from __future__ import annotations

import dataclasses

import pytest
import tiny_run
import torch
import torch.distributed as dist
from models import build, model_config, parallel, planned

from megatron_selfdistill.adapters.low_rank_adapters import add_adapters
from megatron_selfdistill.config import (
    Config,
    OptimizerConfig,
    OptimizerConstants,
    RecomputeConfig,
    ScheduleConfig,
    TargetConfig,
    from_mapping,
    load,
)
from megatron_selfdistill.config.methods import settings_of
from megatron_selfdistill.config.schema.adapter_config import AdapterConfig
from megatron_selfdistill.config.schema.target_config import TeacherConfig
from megatron_selfdistill.data.packing import microbatch_of
from megatron_selfdistill.distributed import ranks as rank_groups
from megatron_selfdistill.instruments.plan.dry_run import Plan, dry_run
from megatron_selfdistill.instruments.plan.memory import (
    GIB,
    Load,
    activation_bytes,
    communicators,
    layer_bytes,
    memory,
    parameter_bytes,
)
from megatron_selfdistill.instruments.plan.stages import Stage
from megatron_selfdistill.model.architecture import transformer_config
from megatron_selfdistill.model.build import build_optimizer, wrap_for_training
from megatron_selfdistill.model.forward import hidden_states, inputs_of, unwrapped

NAMES = {
    "default_pg": "world",
    "TENSOR_MODEL_PARALLEL_GROUP": "tensor",
    "PIPELINE_MODEL_PARALLEL_GROUP": "pipeline",
    "CONTEXT_PARALLEL_GROUP": "context",
    "DATA_PARALLEL_GROUP": "data",
    "DATA_PARALLEL_GROUP_WITH_CP": "data with context",
    "INTRA_DISTRIBUTED_OPTIMIZER_INSTANCE_GROUP": "optimizer instance",
    "MODEL_PARALLEL_GROUP": "optimizer instance",
    "EMBEDDING_GROUP": "embedding",
    "EXPERT_MODEL_PARALLEL_GROUP": "expert",
    "EXPERT_TENSOR_PARALLEL_GROUP": "expert tensor",
    "EXPERT_TENSOR_AND_MODEL_PARALLEL_GROUP": "expert tensor and expert",
    "EXPERT_DATA_PARALLEL_GROUP": "expert data",
}
"""Megatron's description of a group -> its name in a plan."""
EXPERTS = ("model.num_moe_experts=4", "model.moe_ffn_hidden_size=32")
LAYOUTS = {
    "TP 2, DP 2": ("parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"),
    "PP 2, DP 2, tied": ("parallel.pipeline_model_parallel_size=2", "model.share_embeddings_and_output_weights=true"),
    "TP 2, EP 2": (
        *("parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"),
        *("parallel.expert_model_parallel_size=2", "parallel.expert_tensor_parallel_size=1", *EXPERTS),
    ),
    "CP 2, DP 2": ("parallel.context_parallel_size=2",),
    "TP 2, PP 2, SGD": (
        *("parallel.tensor_model_parallel_size=2", "parallel.pipeline_model_parallel_size=2"),
        *("optimizer.use_distributed_optimizer=false", "parallel.sequence_parallel=true"),
    ),
}

NO_ADAPTERS = AdapterConfig()
# Wide enough that the padding of Megatron's buffers is small.
WIDE = {"hidden_size": 128, "ffn_hidden_size": 512, "moe_ffn_hidden_size": 256, "num_layers": 4}


def real_bytes(kind, cuts, optimizer_config, adapter=NO_ADAPTERS):
    """Return the memory of this rank after one step of the optimizer."""
    chunks, grid = build(model_config(kind, **WIDE), parallel(**cuts), optimizer=optimizer_config)
    if adapter.rank:
        add_adapters(chunks, adapter, grid)
    wrapped = wrap_for_training(chunks, optimizer_config)
    optimizer, _ = build_optimizer(wrapped, optimizer_config, num_steps=1)
    for chunk in wrapped:
        chunk.zero_grad_buffer()
        for param in (param for param in chunk.parameters() if param.requires_grad):
            param.main_grad.fill_(1e-3)
    optimizer.step()
    params = [p for chunk in chunks for p in unwrapped(chunk).parameters()]
    own = {p.untyped_storage().data_ptr() for p in params}
    held = 0
    for chained in getattr(optimizer, "chained_optimizers", [optimizer]):
        for group in chained.optimizer.param_groups:
            for param in group["params"]:  # the float32 copy, unless it is the parameter itself
                is_copy = param.untyped_storage().data_ptr() not in own
                state = chained.optimizer.state[param].values()
                held += param.nbytes * is_copy + sum(t.nbytes for t in state if torch.is_tensor(t) and t.dim())
    buffers = [buffer for chunk in wrapped for buffer in chunk.buffers + chunk.expert_parallel_buffers]
    return {
        "weights": sum(p.nbytes for p in params),
        "gradients": sum(buffer.grad_data.nbytes for buffer in buffers),
        "optimizer": held,
    }


@pytest.mark.full
@pytest.mark.parametrize(
    ("kind", "cuts", "optimizer"),
    [
        ("gqa", {"tp": 2}, OptimizerConfig()),
        ("moe", {"ep": 2}, OptimizerConfig()),
        ("gqa", {"pp": 2}, OptimizerConfig(use_distributed_optimizer=False)),
        ("gqa", {"pp": 2}, OptimizerConfig(precision="fp32")),
        (
            "gqa",
            {},
            OptimizerConfig(
                optimizer="sgd", constants=OptimizerConstants(sgd_momentum=0.9), use_distributed_optimizer=False
            ),
        ),
    ],
)
def test_weights_gradients_and_optimizer_take_what_is_planned(ranks, kind, cuts, optimizer):
    cut = parallel(**cuts)
    config = dataclasses.replace(Config(), optimizer=optimizer)
    by_stage = [parameter_bytes(config, stage) for stage in planned(model_config(kind, **WIDE), cut, 4)]
    measured = ranks.run(real_bytes, kind, cuts, optimizer, world_size=4)
    for part in ("weights", "gradients"):
        found = sorted({sizes[part] for sizes in measured})
        assert found == pytest.approx(sorted({sizes[part] for sizes in by_stage}), rel=0.02)
    # A parameter is not cut evenly over the ranks that share its state; all ranks together hold the planned sum.
    ranks_of_a_stage = 4 // len(by_stage)
    total = sum(sizes["optimizer"] for sizes in measured)
    assert total == pytest.approx(ranks_of_a_stage * sum(sizes["optimizer"] for sizes in by_stage), rel=0.02)


@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp32", marks=pytest.mark.full)])
def test_with_adapters_these_alone_have_gradients_and_state_and_no_model_is_a_copy(ranks, precision):
    adapter, optimizer = AdapterConfig(rank=8), OptimizerConfig(precision=precision)
    config = dataclasses.replace(Config(), optimizer=optimizer, adapter=adapter)
    (stage,) = planned(model_config("gqa", **WIDE), parallel(tp=2), 4, adapter)
    sizes = parameter_bytes(config, stage)
    measured = ranks.run(real_bytes, "gqa", {"tp": 2}, optimizer, adapter, world_size=4)
    for part in ("weights", "gradients"):
        assert [found[part] for found in measured] == pytest.approx([sizes[part]] * 4, rel=0.02)
    assert sum(found["optimizer"] for found in measured) == pytest.approx(4 * sizes["optimizer"], rel=0.02)
    assert sizes["teacher"] == sizes["reference"] == 0 and 0 < sizes["gradients"] < sizes["weights"] / 4


@pytest.mark.parametrize(
    ("teacher", "factor"),
    [
        (TeacherConfig(), 2),
        (TeacherConfig(weights="current"), 0),
        (TeacherConfig(weights="ema"), 6),
        (TeacherConfig(weights="ema", offload="cpu"), 2),
    ],
)
def test_a_teacher_takes_its_copy_and_an_average_its_master(teacher, factor):
    (stage,) = planned(model_config(), parallel(), 1)
    config = dataclasses.replace(Config(), teacher=teacher)
    assert parameter_bytes(config, stage)["teacher"] == factor * stage.parameters
    baseline = dataclasses.replace(config, method=settings_of({"name": "sft"}))
    assert parameter_bytes(baseline, stage)["teacher"] == 0


@pytest.mark.parametrize(("weights", "copies"), [("frozen", 0), ("ema", 1), ("current", 1)])
def test_a_frozen_teacher_is_the_reference_and_another_one_needs_a_second_copy(weights, copies):
    (stage,) = planned(model_config(), parallel(), 1)
    anchored = from_mapping({"teacher": {"weights": weights}})
    assert parameter_bytes(anchored, stage)["reference"] == copies * 2 * stage.parameters
    for without in ({"method": settings_of({"name": "sft"})}, {"target": TargetConfig(anchor="student")}):
        assert parameter_bytes(dataclasses.replace(anchored, **without), stage)["reference"] == 0


def saved_bytes(model, tokens, adapter=NO_ADAPTERS) -> int:
    """Return the bytes that autograd keeps of one forward, besides the parameters."""
    chunks, grid = build(model, parallel(), optimizer=OptimizerConfig(precision="bf16"))
    if adapter.rank:
        add_adapters(chunks, adapter, grid)
    params = {p.untyped_storage().data_ptr() for p in chunks[0].parameters()}
    saved: dict[int, torch.Tensor] = {}  # holding the tensors, or an address could be another's

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in params:
            saved.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    microbatch = microbatch_of([([([1], [3] * (tokens - 1))], 0)], tokens, 1)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden_states(chunks[0], inputs_of(microbatch, grid), grid)
    return sum(tensor.untyped_storage().nbytes() for tensor in saved.values())


def measured_layer(kind, extra, tokens, adapter):
    one, two = (saved_bytes(model_config(kind, **extra, num_layers=n), tokens, adapter) for n in (1, 2))
    return two - one


@pytest.mark.full
@pytest.mark.parametrize(("kind", "qk_layernorm"), [("gqa", False), ("gqa", True), ("moe", True)])
def test_a_layer_keeps_what_is_planned_and_what_unfused_kernels_add(ranks, kind, qk_layernorm):
    tokens, hidden, heads, groups, channels, width = 512, 256, 8, 4, 32, 256
    sizes = {"hidden_size": hidden, "num_attention_heads": heads, "num_query_groups": groups, "kv_channels": channels}
    extra = {**sizes, "ffn_hidden_size": width, "moe_ffn_hidden_size": width, "qk_layernorm": qk_layernorm}
    extra["max_position_embeddings"] = tokens
    (measured,) = ranks.run(measured_layer, kind, extra, tokens, NO_ADAPTERS, world_size=1)
    config = transformer_config(model_config(kind, **extra), parallel(), OptimizerConfig(), ScheduleConfig())
    kept, recomputed = layer_bytes(config, tokens, kind == "moe")
    normed = 2 * hidden + (heads + groups) * channels * qk_layernorm
    unfused = 4 * normed  # a norm keeps its input in float32, and its output before the weight
    unfused += 4 * width * (config.moe_router_topk if kind == "moe" else 1)  # SwiGLU keeps silu(gate), and both halves
    unfused += 2 * heads * channels  # attention's output, and once more as the projection reads it
    assert recomputed == 0
    assert measured == pytest.approx(kept + tokens * unfused, rel=0.05)


def measured_adapters(tokens):
    """Return the bytes that a layer keeps without adapters, and with adapters of ranks 16 and 48."""
    return [measured_layer("gqa", {"hidden_size": 128}, tokens, AdapterConfig(rank=rank)) for rank in (0, 16, 48)]


def test_adapters_keep_their_columns_beside_the_inputs_that_all_weights_would_keep(ranks):
    (without, narrow, wide) = ranks.run(measured_adapters, 256, world_size=1)[0]
    config = transformer_config(model_config("gqa", hidden_size=128), parallel(), OptimizerConfig(), ScheduleConfig())
    kept = [layer_bytes(config, 256, False, 4 * rank)[0] for rank in (0, 16, 48)]
    assert wide - narrow == kept[2] - kept[1] == 256 * 4 * 32 * 2
    assert narrow - without <= kept[1] - kept[0], "frozen norms keep less"


LOAD = Load(
    seq_length=1024, response_tokens=4096, in_flight=3, alternating=False, vocab_size=64, model_parameters=10**9
)


def transformer(cuts=None, **recompute):
    model, schedule = model_config("moe", num_layers=4), ScheduleConfig(recompute=RecomputeConfig(**recompute))
    return transformer_config(model, parallel(**(cuts or {})), OptimizerConfig(), schedule)


def stage_of(num_layers: int, num_chunks: int = 1) -> Stage:
    layers = ((True,) * (num_layers // num_chunks),) * num_chunks
    return Stage(0, 10**8, 10**8, 0, layers, True, True, 2, 2)


def test_full_recomputation_keeps_inputs_and_one_unit():
    inputs = 1024 * 32 * 2
    whole = sum(layer_bytes(transformer(), 1024, True))
    uniform = transformer(granularity="full", method="uniform", num_layers=2)
    assert activation_bytes(uniform, stage_of(4), LOAD) == 3 * 2 * inputs + 2 * whole
    block = transformer(granularity="full", method="block", num_layers=1)
    assert activation_bytes(block, stage_of(4), LOAD) == 3 * (inputs + 3 * whole) + whole


def test_selective_recomputation_drops_its_modules_but_for_one_layer():
    whole = layer_bytes(transformer(), 1024, True)[0]
    kept, dropped = layer_bytes(transformer(granularity="selective", modules=["moe"]), 1024, True)
    assert kept + dropped == whole and dropped > kept / 4
    nothing = layer_bytes(transformer(granularity="selective"), 1024, True)
    assert nothing == (whole, 0), "flash attention keeps no scores that core_attn could drop"
    config = transformer(granularity="selective", modules=["moe"])
    assert activation_bytes(config, stage_of(4), LOAD) == 3 * 4 * kept + dropped


def test_chunks_in_flight_are_counted_and_context_parallelism_divides_the_tokens():
    whole = layer_bytes(transformer(), 1024, True)[0]
    assert activation_bytes(transformer(), stage_of(4, num_chunks=2), LOAD) == 3 * 2 * whole
    assert activation_bytes(transformer({"cp": 2}), stage_of(4), LOAD) == 3 * 4 * whole / 2


def planned_memory(*, model_kind="gqa", loaded=LOAD, **sections):
    config = from_mapping(sections)
    cut = transformer_config(model_config(model_kind), parallel(), OptimizerConfig(), ScheduleConfig())
    return memory(config, cut, stage_of(4), loaded)


def test_rows_and_logits_are_the_last_stages():
    last = planned_memory().training
    assert last["teacher states"] == 2 * 4096 * 32 * 2 / GIB, "of teacher and reference"
    assert planned_memory(target={"anchor": "student"}).training["teacher states"] == 4096 * 32 * 2 / GIB
    of_controls = planned_memory(target={"anchor": "student", "control": "other", "num_controls": 3}).training
    assert of_controls["teacher states"] == (1 + 3) * 4096 * 32 * 2 / GIB
    assert of_controls["logits"] - last["logits"] == (1 + 3 * 2 / 3) * 1024 * 64 * 2 / GIB
    assert last["logits"] == 2 * 1024 * (64 + 32) * 2 / GIB
    chunk = {"fused_chunk_tokens": 100}
    kept = planned_memory(loss={"fused": "keep_gradient", **chunk}).training["logits"]
    assert kept == ((1024 + 100) * 64 + (1024 + 3 * 100) * 32) * 2 / GIB
    made_again = planned_memory(loss={"fused": "low_memory", **chunk}).training["logits"]
    assert made_again == (2 * 100 * 64 + (1024 + 3 * 100) * 32) * 2 / GIB
    own_copy = {"teacher": {"weights": "current"}}
    apart = planned_memory(**own_copy, loss={"fused": "none", **chunk}).training
    assert apart["teacher states"] == last["teacher states"], "of teacher and reference, or of teacher and mix"
    assert apart["logits"] == (2 * 1024 * 64 + 4 * 100 * 64 + 3 * 1024 * 32) * 2 / GIB
    apart = planned_memory(**own_copy, loss={"fused": "keep_gradient", **chunk}).training
    assert apart["logits"] == ((1024 + 100) * 64 + (1024 + 4 * 100) * 32) * 2 / GIB
    capped = planned_memory(schedule={"teacher_store_gb": 1e-6}).training
    assert capped["teacher states"] == pytest.approx(1e-6)


@pytest.mark.parametrize("pair_order", [None, "alternating"])
def test_the_states_of_a_step_of_short_responses_fill_the_store(pair_order):
    """Where long responses alternate, short ones come after the teacher if the order is that of each step."""
    store = 1.5 * 1024 * 2 * 32 * 2 / GIB  # of teacher and reference: one microbatch and a half
    schedule = {"teacher_store_gb": store, "pair_order": pair_order}
    found = planned_memory(loaded=dataclasses.replace(LOAD, alternating=True), schedule=schedule).training[
        "teacher states"
    ]
    assert found == (store if pair_order is None else store / 1.5)


def test_a_colocated_engine_comes_beside_the_resident_parts_only():
    kept = {"engine": "vllm", "kv_cache_gb": 7.0, "engine_tp": 2}
    found = planned_memory(rollout=kept)
    assert found.rollout["engine weights"] == 10**9 / GIB and found.rollout["KV cache"] == 7
    assert not {"activations", "logits"} & set(found.rollout)
    assert found.rollout["gradients"] == 0 < found.training["gradients"]
    resident = sum(found.training[part] for part in ("weights", "optimizer", "teacher"))
    assert found.rollout_peak == pytest.approx(resident + 10**9 / GIB + 7 + 1 + found.training["reserved"])
    offloaded = planned_memory(rollout=kept, teacher={"offload": "cpu"})
    assert offloaded.rollout_peak == pytest.approx(found.rollout_peak - found.training["teacher"])
    assert offloaded.training_peak == found.training_peak
    resting = planned_memory(rollout=kept, teacher={"weights": "ema", "offload": "cpu"})
    assert resting.rollout_peak == pytest.approx(offloaded.rollout_peak), "the reference rests like the teacher"
    guided = {"engine": "megatron", "guidance": "mixed", "kv_cache_gb": 7.0}
    sampling = planned_memory(rollout=guided, teacher={"weights": "ema", "offload": "cpu"})
    parts = "teacher", "reference"
    assert [sampling.rollout[part] for part in parts] == [sampling.training[part] for part in parts], "both sample"
    held = planned_memory(rollout=kept, teacher={"weights": "ema"})
    assert held.rollout["reference"] == held.training["reference"] == found.training["teacher"] > 0


def test_servers_take_nothing_but_a_bucket_and_a_cache_of_no_stated_size_a_third_of_what_is_free():
    served = planned_memory(rollout={"engine": "vllm", "placement": "server", "servers": ["http://a:1"]})
    assert served.rollout["engine weights"] == 0 and "KV cache" not in served.rollout
    in_process = planned_memory()
    free = 79.1 - sum(size for part, size in in_process.rollout.items() if part != "KV cache")
    assert in_process.rollout["KV cache"] == pytest.approx(free / 3)


def groups_in_use(arguments: list[str]) -> dict[str, int]:
    """Return the groups of this rank with collectives in a run -> their sizes.

    Gloo counts the collectives of a group, and NCCL makes a communicator at the first of them.
    """
    found: dict[str, int] = {}
    shutdown = rank_groups.shutdown

    def recorded() -> None:
        for group in dist.distributed_c10d._world.pg_map:
            if group.size() > 1 and group._get_sequence_number_for_group():
                found[NAMES[group.group_desc]] = group.size()
        shutdown()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rank_groups, "shutdown", recorded)
        assert tiny_run.start(arguments) == 0
    return found


@pytest.mark.parametrize(
    "layout", [pytest.param(name, marks=() if name == "PP 2, DP 2, tied" else pytest.mark.full) for name in LAYOUTS]
)
def test_the_communicators_are_the_groups_with_collectives_in_a_run(ranks, tmp_path, layout):
    data = tmp_path / "data"
    tiny_run.write_data(data)
    more = ("num_steps=1", "checkpoint.save_every=1000", "cluster.num_gpus=4", *LAYOUTS[layout])
    arguments = tiny_run.overrides(data, tmp_path / "run", *more)
    used = ranks.run(groups_in_use, arguments, world_size=4, init_process_group=False)
    plan = dry_run(load(arguments))
    assert communicators(plan.config, plan.stages[0]) == used[0]
    assert communicators(plan.config, plan.stages[-1]) == used[-1]


def plan_of(*overrides: str) -> Plan:
    return dry_run(load(["recipe=qwen3_8b", *overrides]))


def test_the_gradient_of_the_output_layer_is_counted_where_the_layer_is_trained():
    (memory,) = plan_of().memory
    assert memory.training["output gradient"] * GIB == 152064 / 4 * 4096 * 2
    (adapted,) = plan_of("adapter.rank=8").memory
    assert adapted.training["output gradient"] == 0
    stages = ("parallel.pipeline_model_parallel_size=2", "parallel.tensor_model_parallel_size=2")
    first, last = plan_of(*stages).memory
    assert (first.training["output gradient"], last.training["output gradient"] * GIB) == (0, 152064 / 2 * 4096 * 2)
