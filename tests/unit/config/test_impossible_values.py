# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""A configuration that cannot run is refused at once, in one sentence that names the key."""

from __future__ import annotations

import pytest
from omegaconf import OmegaConf

from megatron_selfdistill.config import Config, from_mapping, load, to_yaml
from megatron_selfdistill.config.world_checks import check_files, check_world
from megatron_selfdistill.errors import ConfigError

SAMPLED = "method.name=opsd_rl method.weight=0 method.signal=sampled"
SDPO = "rollout.num_samples=2 method.name=sdpo"
GRPO = "rollout.num_samples=2 method.name=grpo"
OTHER_HINTS = "target=capped target.control=other"
SERVER = "rollout.engine=vllm rollout.placement=server"
AUTO = "rollout.horizon=auto method.token_weights=reach"
CORRECTED = "loss.rollout_correction=truncated"


def configured(overrides: str) -> Config:
    """Return the configuration of these values; hydra, which would take most of the time, composes nothing."""
    return from_mapping(OmegaConf.from_dotlist(overrides.split()))


def refused(caught: pytest.ExceptionInfo[ConfigError], named: str) -> bool:
    return named in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("named", "overrides"),
    [
        ("method.name", "method.name=solution"),
        ("model.normalization", "model.normalization=rmsnorm"),
        ("model.hidden_size (65)", "model.hidden_size=65"),
        ("model.qk_layernorm_all_heads", "model.qk_layernorm=true model.qk_layernorm_all_heads=true"),
        ("model.rope_scaling_factor", "model.rope_scaling_factor=8 model.seq_len_interpolation_factor=2"),
        ("'solutoin'", "data.fields.solutoin=hint"),
        ("'accepted'", "data.fields.accepted=ok"),  # a column of conversations
        ("'taecher'", "data.views.taecher={system_prompt:a}"),
        ("'system_promt'", "data.views.student.system_promt=a"),
        ("data.views.student.chat_template_kwargs", "data.views.student.chat_template_kwargs=3"),
        ("data.solutions=other", f"data.solutions=other {GRPO}"),
        ("data.solutions=none", f"data.solutions=none {SDPO}"),
        ("optimizer.overlap_param_gather", "optimizer.overlap_param_gather=true"),
        ("metrics.loggers[0]", "metrics.loggers=[wandbb]"),
        ("metrics.loggers must", "metrics.loggers=[wandb,wandb]"),
        ("evaluation.pass_at_k", "evaluation.pass_at_k=[4]"),
        ("evaluation.confidence=", "evaluation.confidence='(a'"),
        ("evaluation.confidence must", "evaluation.confidence=a"),
        ("rollout.num_servers", "rollout.servers=[http://n1:8000]"),
        ("rollout.num_servers", f"{SERVER} rollout.num_servers=1 rollout.servers=[http://a:1]"),
        ("rollout.servers must", f"{SERVER} rollout.servers=[node7:8000]"),
        ("rollout.guidance=mixed", "rollout.guidance=mixed rollout.temperature=0.7"),
        ("rollout.guidance=mixed", "rollout.guidance=mixed rollout.engine=vllm"),
        ("rollout.guidance=mixed", f"rollout.guidance=mixed {SDPO}"),
        ("rollout.guidance=mixed", "rollout.guidance=mixed method.view=privileged"),
        ("rollout.cuda_graphs", "rollout.cuda_graphs=true rollout.engine=vllm"),
        ("rollout.horizon must", "rollout.horizon=0"),
        ("rollout.horizon must", "rollout.horizon=true"),
        ("rollout.horizon must", "rollout.horizon=2.5"),
        ("rollout.horizon must", "rollout.horizon=[8,4,10]"),
        ("rollout.horizon must", "rollout.horizon=[8,16]"),
        ("rollout.horizon=auto", "rollout.horizon=auto"),
        ("method.token_weights=reach", "rollout.horizon=auto method.token_weights=evidence"),
        ("rollout.ahead=1", f"{SERVER} rollout.num_servers=1 rollout.ahead=1 {AUTO}"),
        ("rollout.horizon=auto", f"{SERVER} rollout.num_servers=1 rollout.ahead=1 {AUTO}"),
        ("method.select", f"{AUTO} method.select=lab.rules.keep"),
        ("rollout.ahead=1", "rollout.ahead=1"),
        ("rollout.ahead=1", f"{SERVER} rollout.num_servers=1 rollout.ahead=1 {SDPO}"),
        ("target.k_max must", "target.k_max=abc"),
        ("target.k_max=2", "target.rule=fixed target.k_max=2"),
        ("target.k=2", "target.rule=batch target.k=2"),
        ("target.rule=teacher_alone", "target.rule=teacher_alone"),
        ("target.match", "target.anchor=student target.match=reference"),
        ("target.control=other", f"{OTHER_HINTS} rollout.num_samples=2 method.name=pi_distill"),
        ("target.control=other", f"{OTHER_HINTS} data.kind=conversations"),
        ("target.control=other", f"{OTHER_HINTS} environment.name=tools environment.max_turns=2"),
        ("target.control=other", f"{OTHER_HINTS} {SDPO}"),
        ("rollout.temperature=0", f"{CORRECTED} rollout.temperature=0"),
        ("rollout.temperature", f"{CORRECTED} rollout.engine=vllm rollout.temperature=0.7"),
        ("loss.rollout_correction=none", f"{CORRECTED} rollout.num_samples=2 method.name=caopd"),
        ("rollout.temperature=0", f"{SAMPLED} rollout.temperature=0"),
        ("loss.fused=keep_gradient", f"{SAMPLED} loss.fused=keep_gradient"),
        ("rollout.num_samples", "method.name=grpo"),
        ("method.name=grpo", f"{GRPO} rollout.engine=vllm rollout.top_k=5"),
        ("teacher.weights=frozen", f"{GRPO} method.kl_weight=1 teacher.weights=current"),
        ("teacher.weights=ema", "adapter.rank=4 teacher.weights=ema"),
        ("checkpoint.load", "adapter.rank=4 adapter.load=here"),
        ("adapter.layers", "adapter.rank=4 rollout.engine=vllm adapter.layers=[linear_q_proj]"),
    ],
)
def test_an_impossible_value_is_refused_with_its_key(named, overrides):
    with pytest.raises(ConfigError) as caught:
        configured(overrides)
    assert refused(caught, named)


TP, PP, CP = (f"parallel.{axis}_parallel_size" for axis in ("tensor_model", "pipeline_model", "context"))
EP, ETP = (f"parallel.{axis}_parallel_size" for axis in ("expert_model", "expert_tensor"))
VPP, SP = "parallel.virtual_pipeline_model_parallel_size", "parallel.sequence_parallel=true"
MOE = "model.num_moe_experts=4"


@pytest.mark.parametrize(
    "other",
    [
        "rollout.max_new_tokens=15",
        "method.select=lab.rules.keep",
        "method.name=grpo rollout.num_samples=2",
        "method.name=opsd_rl rollout.num_samples=2",
        "method.name=own_solutions",
        "method.name=dapd",
        "method.name=pw_opsd",
        "method.name=sft",
        "environment.name=tools environment.max_turns=2",
        "rollout.guide_below=0.5 rollout.guidance=mixed",
        "data.kind=conversations conversations.responses=logged",
    ],
)
@pytest.mark.parametrize("horizon", ["16", "[8,16,10]"])
def test_a_horizon_is_refused_with_its_key_and_that_of_what_must_see_whole_responses(other, horizon):
    with pytest.raises(ConfigError) as caught:
        configured(f"rollout.horizon={horizon} {other}")
    assert refused(caught, f"rollout.horizon={horizon.replace(',', ', ')}")
    assert refused(caught, other.split()[0].removesuffix("=15"))


@pytest.mark.parametrize(
    ("world_size", "overrides", "named"),
    [
        (3, f"{TP}=2", "world size 3 must be a multiple of TP x PP x CP"),
        (6, f"{MOE} {EP}=4", "world size 6 must be a multiple of ETP x EP x PP"),
        (2, f"{EP}=2", "model.num_moe_experts"),
        (3, f"{MOE} {EP}=3", "model.num_moe_experts (4)"),
        (8, f"{TP}=8", "model.num_attention_heads (4)"),
        (2, f"{PP}=2 {VPP}=2", "model.num_layers (2)"),
        (4, f"{TP}=4 {SP} {MOE} model.moe_ffn_hidden_size=6", "model.moe_ffn_hidden_size (6)"),
        (64, "", "data.global_batch_size (32)"),
    ],
)
def test_parallel_sizes_that_cannot_be_are_refused(world_size, overrides, named):
    with pytest.raises(ConfigError) as caught:
        check_world(configured(overrides), world_size)
    assert refused(caught, named)


def test_the_shipped_layout_of_a_node_fits_a_shipped_model():
    check_world(load(["parallel=node_of_8", "model=qwen3_8b"]), 8)


@pytest.fixture(scope="module")
def chat_logs() -> str:
    """Return the configuration of the recipe, as YAML."""
    return to_yaml(load(["recipe=chat_logs", "data.fields.accepted=ok"]))


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        ("method.name=sft", "data.kind=conversations"),
        ("rollout.guidance=mixed", "rollout.guidance"),
        (SAMPLED, "conversations.responses=logged"),
        (f"conversations.responses=sampled {SDPO}", "data.kind=problems"),
        ("conversations.responses=sampled method.min_log_prob=-1", "method.min_log_prob"),
    ],
)
def test_chat_logs_go_with_what_they_can_be_trained_on(chat_logs, overrides, named):
    first = OmegaConf.create(chat_logs)
    if "method.name" in overrides:  # another method does not have these settings
        del first["method"]
    with pytest.raises(ConfigError) as caught:
        from_mapping(OmegaConf.merge(first, OmegaConf.from_dotlist(overrides.split())))
    assert refused(caught, named)


def test_a_run_without_a_directory_is_refused():
    with pytest.raises(ConfigError, match="run_dir"):
        check_files(configured("data.path=x.jsonl data.tokenizer=x run_dir=''"))
