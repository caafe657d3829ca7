# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The arithmetic of memory against what Megatron's buffers, optimizers and layers really hold."""

from __future__ import annotations

from dataclasses import replace

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
from megatron_selfdistill.data.packing import microbatch_of
from megatron_selfdistill.distributed import ranks as rank_groups
from megatron_selfdistill.errors import ConfigError
from megatron_selfdistill.instruments.plan.dry_run import dry_run
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
TP2 = ("parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true")
PP2 = ("parallel.pipeline_model_parallel_size=2",)
LAYOUTS = {
    "PP 2, DP 2, tied": (*PP2, "model.share_embeddings_and_output_weights=true"),
    "TP 2, EP 2": (
        *(*TP2, "parallel.expert_model_parallel_size=2", "parallel.expert_tensor_parallel_size=1"),
        *("model.num_moe_experts=4", "model.moe_ffn_hidden_size=32"),
    ),
    "CP 2, DP 2": ("parallel.context_parallel_size=2",),
    "TP 2, PP 2, SGD": (*TP2, *PP2, "optimizer.use_distributed_optimizer=false"),
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


MOMENTUM = OptimizerConstants(sgd_momentum=0.9)


def case(kind, cuts, rank=0, *, marks=pytest.mark.full, **optimizer):
    return pytest.param(kind, cuts, OptimizerConfig(**optimizer), AdapterConfig(rank=rank), marks=marks)


@pytest.mark.parametrize(
    ("kind", "cuts", "optimizer", "adapter"),
    [
        case("gqa", {"tp": 2}),
        case("gqa", {"pp": 2}, use_distributed_optimizer=False),
        case("tied", {"tp": 2, "pp": 2}),
        case("gated_delta", {"tp": 2, "pp": 2}),
        case("moe", {"ep": 2, "pp": 2}),
        case("gqa", {"pp": 2}, precision="fp32"),
        case("gqa", {}, optimizer="sgd", constants=MOMENTUM, use_distributed_optimizer=False),
        case("gqa", {"tp": 2}, rank=8, marks=()),
        case("gqa", {"tp": 2}, rank=8, precision="fp32"),
    ],
)
def test_weights_gradients_and_optimizer_take_what_is_planned(ranks, kind, cuts, optimizer, adapter):
    config = replace(Config(), optimizer=optimizer, adapter=adapter)
    stages = planned(model_config(kind, **WIDE), parallel(**cuts), 4, adapter)
    by_stage = [parameter_bytes(config, stage) for stage in stages]
    measured = ranks.run(real_bytes, kind, cuts, optimizer, adapter, world_size=4)
    for part in ("weights", "gradients"):
        found = sorted({sizes[part] for sizes in measured})
        assert found == pytest.approx(sorted({sizes[part] for sizes in by_stage}), rel=0.02)
    # A parameter is not cut evenly over the ranks that share its state; all ranks together hold the planned sum.
    planned_sum = 4 // len(by_stage) * sum(sizes["optimizer"] for sizes in by_stage)
    assert sum(sizes["optimizer"] for sizes in measured) == pytest.approx(planned_sum, rel=0.02)
    if adapter.rank:
        (sizes,) = by_stage
        assert sizes["teacher"] == sizes["reference"] == 0 and 0 < sizes["gradients"] < sizes["weights"] / 4


@pytest.mark.parametrize(
    ("teacher", "factor", "copies"),
    [
        ({"weights": "frozen"}, 2, 0),  # it is the reference
        ({"weights": "current"}, 0, 1),
        ({"weights": "ema"}, 6, 1),
        ({"weights": "ema", "offload": "cpu"}, 2, 1),
    ],
)
def test_a_teacher_takes_its_copy_an_average_its_master_and_a_reference_that_is_another_model_a_copy(
    teacher, factor, copies
):
    (stage,) = planned(model_config(), parallel(), 1)
    anchored = from_mapping({"teacher": teacher})
    sizes = parameter_bytes(anchored, stage)
    assert (sizes["teacher"], sizes["reference"]) == (factor * stage.parameters, copies * 2 * stage.parameters)
    alone = parameter_bytes(replace(anchored, method=settings_of({"name": "sft"})), stage)
    with_student = parameter_bytes(replace(anchored, target=TargetConfig(anchor="student")), stage)
    assert alone["teacher"] == alone["reference"] == with_student["reference"] == 0


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


@pytest.mark.full
def test_adapters_keep_their_columns_beside_the_inputs_that_all_weights_would_keep(ranks):
    layer = "gqa", {"hidden_size": 128}, 256
    adapters = [AdapterConfig(rank=rank) for rank in (0, 16, 48)]
    without, narrow, wide = (ranks.run(measured_layer, *layer, one, world_size=1)[0] for one in adapters)
    config = transformer_config(model_config(hidden_size=128), parallel(), OptimizerConfig(), ScheduleConfig())
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


def test_recomputation_keeps_inputs_and_one_unit_or_drops_the_chosen_modules_but_for_one_layer():
    inputs, (whole, _) = 1024 * 32 * 2, layer_bytes(transformer(), 1024, True)
    uniform = transformer(granularity="full", method="uniform", num_layers=2)
    assert activation_bytes(uniform, stage_of(4), LOAD) == 3 * 2 * inputs + 2 * whole
    block = transformer(granularity="full", method="block", num_layers=1)
    assert activation_bytes(block, stage_of(4), LOAD) == 3 * (inputs + 3 * whole) + whole
    selective = transformer(granularity="selective", modules=["moe"])
    kept, dropped = layer_bytes(selective, 1024, True)
    assert kept + dropped == whole and dropped > kept / 4
    assert activation_bytes(selective, stage_of(4), LOAD) == 3 * 4 * kept + dropped
    nothing = layer_bytes(transformer(granularity="selective"), 1024, True)
    assert nothing == (whole, 0), "flash attention keeps no scores that core_attn could drop"
    assert activation_bytes(transformer(), stage_of(4, num_chunks=2), LOAD) == 3 * 2 * whole
    assert activation_bytes(transformer({"cp": 2}), stage_of(4), LOAD) == 3 * 4 * whole / 2


def planned_memory(**sections):
    cut = transformer_config(model_config(), parallel(), OptimizerConfig(), ScheduleConfig())
    return memory(from_mapping(sections), cut, stage_of(4), LOAD)


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
    served = planned_memory(rollout={"engine": "vllm", "placement": "server", "servers": ["http://a:1"]})
    assert served.rollout["engine weights"] == 0 and "KV cache" not in served.rollout


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


@pytest.mark.full
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_communicators_are_the_groups_with_collectives_in_a_run(ranks, data, tmp_path, layout):
    more = ("num_steps=1", "checkpoint.save_every=1000", "cluster.num_gpus=4", *LAYOUTS[layout])
    arguments = tiny_run.overrides(data, tmp_path / "run", *more)
    used = ranks.run(groups_in_use, arguments, world_size=4, init_process_group=False)
    plan = dry_run(load(arguments))
    assert communicators(plan.config, plan.stages[0]) == used[0]
    assert communicators(plan.config, plan.stages[-1]) == used[-1]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [((), [152064 / 4 * 4096 * 2]), (("adapter.rank=8",), [0]), ((*TP2, *PP2), [0, 152064 / 2 * 4096 * 2])],
)
def test_the_gradient_of_the_output_layer_is_counted_where_the_layer_is_trained(overrides, expected):
    plan = dry_run(load(["recipe=qwen3_8b", *overrides]))
    assert [stage.training["output gradient"] * GIB for stage in plan.memory] == expected


CUTS = [
    ("gqa", {"pp": 2, "tp": 2, "sp": True}, 8),
    ("gqa", {"pp": 2, "vpp": 2}, 2),
    ("gqa", {"cp": 2, "pp": 4}, 16),
    ("tied", {"pp": 4, "tp": 2}, 64),
    ("gated_delta", {"tp": 2, "sp": True}, 4),
    ("gated_delta", {"pp": 2, "vpp": 2}, 2),
    ("moe", {"ep": 4, "pp": 2}, 16),
    ("moe", {"ep": 2, "tp": 2, "etp": 2, "sp": True}, 8),
    ("moe", {"tp": 2, "etp": 1, "sp": True}, 8),
]


@pytest.mark.parametrize(("kind", "cuts", "world_size"), CUTS)
def test_the_stages_of_every_layout_are_the_same_model(kind, cuts, world_size):
    model = model_config(kind)
    (whole,) = planned(model, parallel(), 1)
    assert sum(s.model_parameters for s in planned(model, parallel(**cuts), world_size)) == whole.model_parameters
    padding = 3 * model.hidden_size * (1 if model.share_embeddings_and_output_weights else 2)  # 61 rows to 64
    assert whole.parameters == whole.model_parameters + padding


def test_what_megatron_refuses_to_build_names_the_stage_and_an_imagined_world_leaves_no_process_group_behind():
    model = model_config("moe", transformer={"moe_layer_freq": [0, 1, 1]})  # of 2 layers
    with pytest.raises(ConfigError, match=r"pipeline stage 0: .*moe_layer_pattern"):
        planned(model, parallel(pp=2), 2)
    assert not torch.distributed.is_initialized()
