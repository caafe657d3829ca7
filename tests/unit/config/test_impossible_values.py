# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""A configuration that cannot run fails at once with one message."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from omegaconf import OmegaConf

from megatron_selfdistill.config import Config, from_mapping, load, to_yaml
from megatron_selfdistill.config.world_checks import check_files, check_world
from megatron_selfdistill.errors import ConfigError

TWO, GUIDED, CURRENT = "rollout.num_samples=2", "rollout.guidance=mixed", "teacher.weights=current"
SAMPLED = ["method.name=opsd_rl", "method.weight=0", "method.signal=sampled"]
NAMED = ["method=null"]
OTHER_HINTS = ["target=capped", "target.control=other"]
SERVER = ["rollout.engine=vllm", "rollout.placement=server", "rollout.num_servers=1"]


def one_message(fail: Callable[[], object]) -> str:
    """Return the message of the `ConfigError` that ``fail`` raises."""
    with pytest.raises(ConfigError) as caught:
        fail()
    text = str(caught.value)
    assert text and "\n" not in text
    return text


def configured(*overrides: str) -> Config:
    """Return the configuration of these values; hydra, which would take most of the time, composes nothing."""
    return from_mapping(OmegaConf.from_dotlist(list(overrides)))


def message_of(*overrides: str) -> str:
    """Return the message with which these values fail."""
    return one_message(lambda: configured(*overrides))


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("method.name=solution", "method.name must be one of"),
        ("model.normalization=rmsnorm", "model.normalization must be one of RMSNorm, LayerNorm, got 'rmsnorm'"),
        ("model.hidden_size=65", "model.hidden_size (65) must be a multiple"),
        ("data.fields.solutoin=hint", "a key of data.fields must be one of answer, id, messages, problem, solution"),
        ("data.views.taecher={system_prompt: a}", "a key of data.views must be one of student, teacher, got 'taecher'"),
        ("data.views.teacher=3", "data.views.teacher must be a mapping, such as {system_prompt: Think.}, got 3"),
        ("data.views.student.system_promt=a", "must be one of chat_template_kwargs, system_prompt, generation_prompt"),
        ("data.views.student.generation_prompt=[1]", "data.views.student.generation_prompt must be a text, or null"),
        ("data.views.student.chat_template_kwargs=3", "data.views.student.chat_template_kwargs must be a mapping"),
        ("rollout.servers=[http://n1:8000]", "needs either rollout.servers"),
        ("target.k_max=abc", "target.k_max must be one of null, 1 + w, a number, got 'abc'"),
        ("target.k=2", "target.k=2.0 is the k of target.rule=fixed, but target.rule is entropy_matched"),
        ("optimizer.overlap_param_gather=true", "needs use_distributed_optimizer and overlap_grad_reduce"),
        ("metrics.loggers=[wandbb]", "metrics.loggers[0] must be one of tensorboard, wandb, a dotted path"),
        ("metrics.loggers=[wandb,wandb]", "metrics.loggers must be a list of different entries, got"),
        ("evaluation.pass_at_k=[4]", "pass@4 but evaluation.num_samples is 1"),
        ("evaluation.confidence='(a'", "evaluation.confidence"),
        ("evaluation.confidence=a", "evaluation.confidence must have a group for the number"),
    ],
)
def test_an_impossible_value_is_one_message(override, words):
    assert words in message_of(override)


TP, PP, CP = (f"parallel.{axis}_parallel_size" for axis in ("tensor_model", "pipeline_model", "context"))
EP, ETP = (f"parallel.{axis}_parallel_size" for axis in ("expert_model", "expert_tensor"))
VPP = "parallel.virtual_pipeline_model_parallel_size"
MOE = "model.num_moe_experts=4"
IMPOSSIBLE_WORLDS = [
    (3, [f"{TP}=2"], "world size 3 must be a multiple of TP x PP x CP = 2 x 1 x 1 = 2"),
    (6, [MOE, f"{EP}=4"], "world size 6 must be a multiple of ETP x EP x PP = 1 x 4 x 1 = 4"),
    (2, [f"{EP}=2"], "needs a mixture of experts (model.num_moe_experts)"),
    (3, [MOE, f"{EP}=3"], "model.num_moe_experts (4) must be a multiple of EP (3)"),
    (8, [f"{TP}=8"], "model.num_attention_heads (4) must be a multiple of TP (8)"),
    (2, [f"{PP}=2", f"{VPP}=2"], "model.num_layers (2) must be a multiple of PP x VPP (4)"),
    (
        4,
        [f"{TP}=4", "parallel.sequence_parallel=true", MOE, "model.moe_ffn_hidden_size=6"],
        "model.moe_ffn_hidden_size (6) must be a multiple of ETP (4)",
    ),
    (64, [], "data.global_batch_size (32) must be at least the number of data-parallel ranks (64)"),
]


@pytest.mark.parametrize(("world_size", "overrides", "words"), IMPOSSIBLE_WORLDS)
def test_parallel_sizes_that_cannot_be_are_one_message(world_size, overrides, words):
    config = configured(*overrides)
    assert words in one_message(lambda: check_world(config, world_size))


@pytest.mark.parametrize(
    ("world_size", "overrides"),
    [
        (1, []),
        (32, []),
        (8, [f"{TP}=2", f"{PP}=2", f"{CP}=2", "parallel.sequence_parallel=true"]),
        (4, [MOE, f"{EP}=4"]),
        (4, [f"{TP}=2", MOE, f"{EP}=4", f"{ETP}=1", "parallel.sequence_parallel=true"]),
        (4, [f"{PP}=2", f"{VPP}=2", "model.num_layers=4"]),
        (3, [f"{PP}=3", "model.num_layers=4", "model.transformer.num_layers_in_first_pipeline_stage=2"]),
        (6, [f"{TP}=6", "model.provider=lab.models.provide"]),
    ],
)
def test_parallel_sizes_that_can_be_pass(world_size, overrides):
    check_world(configured(*overrides), world_size)


def test_the_shipped_layout_of_a_node_fits_a_shipped_model():
    check_world(load(["parallel=node_of_8", "model=qwen3_8b"]), 8)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["rollout.engine=vllm", "rollout.placement=server"], "needs either rollout.servers"),
        (
            [
                "rollout.engine=vllm",
                "rollout.placement=server",
                "rollout.num_servers=1",
                "rollout.servers=[http://a:1]",
            ],
            "needs either rollout.servers",
        ),
        (["rollout.engine=vllm", "rollout.placement=server", "rollout.servers=[node7:8000]"], "such as http://"),
        (["rollout.guidance=mixed", "rollout.temperature=0.7"], "samples from the target itself"),
        ([GUIDED, "rollout.engine=vllm"], "in process: it needs rollout.engine=megatron"),
        (["rollout.cuda_graphs=true", "rollout.engine=vllm"], "is for rollout.engine=megatron"),
        (["target.rule=fixed", "target.k_max=2"], "target.k_max=2 bounds the k that target.rule=entropy_matched and"),
        (["target.rule=batch", "target.k=2"], "target.k=2.0 is the k of target.rule=fixed, but target.rule is batch"),
        (["loss.rollout_correction=truncated", "rollout.temperature=0"], "rollout.temperature=0"),
        (
            ["loss.rollout_correction=truncated", "rollout.engine=vllm", "rollout.temperature=0.7"],
            "vLLM reports at temperature 1 only",
        ),
        (["data.solutions=other", "method.name=grpo", TWO], "data.solutions=other is an ablation of hints from the"),
        (["data.solutions=none", "method.name=sdpo", TWO], "data.solutions=none is an ablation of hints from the"),
        (["method.name=grpo"], "method.name=grpo compares the responses to one problem: it needs data.kind=problems"),
        ([*SAMPLED, "rollout.temperature=0"], "which rollout.temperature=0 does not have"),
        (
            ["method.name=grpo", TWO, "rollout.engine=vllm", "rollout.top_k=5"],
            "method.name=grpo needs the log-probs of sampled tokens",
        ),
        (["method.name=sdpo", TWO, GUIDED], "data.kind=problems and method.name=sdpo: set rollout.guidance=none"),
        ([*SAMPLED, "loss.fused=keep_gradient"], "keeps the gradient of the divergence alone"),
        (["method.view=privileged", GUIDED], "no prompts or hints of its own, and no episodes, got"),
        (["method.name=caopd", TWO, "loss.rollout_correction=truncated"], "caopd needs loss.rollout_correction=none"),
        (["method.name=grpo", TWO, "method.kl_weight=1", CURRENT], "compares the student with other weights after"),
        (["rollout.ahead=1"], "rollout.ahead=1 trains while servers generate"),
        ([*SERVER, "rollout.ahead=1", "method.name=sdpo", TWO], "no episodes, rollout.guidance or method"),
        (["model.rope_scaling_factor=8", "model.seq_len_interpolation_factor=2"], "scale the same positions: set one"),
        (["model.qk_layernorm=true", "model.qk_layernorm_all_heads=true"], "all heads together: set one of them"),
        (["adapter.rank=4", "teacher.weights=ema"], "the average of low-rank changes has full rank"),
        (["adapter.rank=4", "adapter.load=here"], "set checkpoint.load to their base"),
        (["adapter.rank=4", "rollout.engine=vllm", "adapter.layers=[linear_q_proj]"], "remove linear_q_proj"),
        (["target.rule=teacher_alone"], "mixes the teacher with nothing"),
        (["target.anchor=student", "target.match=reference"], "target.match must be null, student or target.anchor"),
        (
            [*OTHER_HINTS, "method.name=pi_distill", TWO],
            "in several contexts, each with hints of its own",
        ),
        ([*OTHER_HINTS, "data.kind=conversations"], "the responses are turns, whose hints belong to one conversation"),
        ([*OTHER_HINTS, "environment.name=tools", "environment.max_turns=2"], "hints belong to one conversation"),
        ([*OTHER_HINTS, "method.name=sdpo", TWO], "the teacher of method.name=sdpo sees no solutions of the data"),
    ],
)
def test_settings_that_contradict_each_other_are_one_message(overrides, words):
    assert words in message_of(*overrides)


@pytest.fixture(scope="module")
def chat_logs() -> str:
    """Return the configuration of the recipe, as YAML."""
    return to_yaml(load(["recipe=chat_logs"]))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ([*NAMED, "method.name=sft"], "data.kind=conversations needs a method whose teacher sees what follows a turn"),
        ([GUIDED], "it needs a method that samples and has no prompts"),
        ([*NAMED, *SAMPLED], "but conversations.responses=logged samples nothing"),
        (["conversations.responses=sampled", *NAMED, "method.name=sdpo", TWO], "it needs data.kind=problems"),
        (["conversations.responses=sampled", "method.min_log_prob=-1"], "drops unlikely logged turns"),
    ],
)
def test_chat_logs_go_with_what_they_can_be_trained_on(chat_logs, overrides, words):
    first = OmegaConf.create(chat_logs)
    if NAMED[0] in overrides:  # another method does not have these settings
        del first["method"]
    changes = [override for override in overrides if override not in NAMED]
    merged = OmegaConf.merge(first, OmegaConf.from_dotlist(changes))
    assert words in one_message(lambda: from_mapping(merged))


def test_the_columns_of_conversations_are_unknown_to_problems():
    assert "must be one of answer, id, messages, problem, solution" in message_of("data.fields.accepted=ok")
    assert load(["recipe=chat_logs", "data.fields.accepted=ok"]).data.fields == {"accepted": "ok"}


# -- files and directories ---------------------------------------------------------------------------------------------


def message_of_files(*overrides: str) -> str:
    """Return the message with which the check of the files refuses these values."""
    config = configured("data.path=x.jsonl", "data.tokenizer=x", *overrides)
    return one_message(lambda: check_files(config))


def test_a_run_without_a_directory_is_refused():
    assert "run_dir is not set" in message_of_files("run_dir=''")
