# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The schema documents every key, and a configuration that cannot run fails at once with one message."""

from __future__ import annotations

import dataclasses
import itertools
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from megatron_selfdistill import config as configuration
from megatron_selfdistill.config import Config, check_files, from_mapping, keys, load, to_yaml
from megatron_selfdistill.config.paths import config_dir
from megatron_selfdistill.errors import ConfigError

REPOSITORY = Path(__file__).resolve().parents[3]
SECTIONS = [cls for cls in vars(configuration).values() if dataclasses.is_dataclass(cls)]
SHIPPED = sorted(p.relative_to(config_dir()) for p in config_dir().glob("*/*.yaml"))


def sentence_of(*overrides: str, **kwargs) -> str:
    """Return the message with which these overrides fail."""
    with pytest.raises(ConfigError) as caught:
        load(list(overrides), **kwargs)
    text = str(caught.value)
    assert text and "\n" not in text
    return text


@pytest.mark.parametrize("section", SECTIONS, ids=lambda cls: cls.__name__)
def test_every_field_has_a_documentation_string(section):
    docs = configuration.field_docs(section)
    undocumented = [f.name for f in dataclasses.fields(section) if len(docs.get(f.name, "")) < 5]
    assert undocumented == []


def test_a_field_without_documentation_is_seen():
    docs = configuration.field_docs(_HalfDocumented)
    assert docs == {"documented": "What it means."}


@dataclasses.dataclass
class _HalfDocumented:
    documented: int = 1
    """What it means."""
    bare: int = 2


def test_keys_lists_each_field_of_each_section_once_with_its_default():
    expected = {}
    for f in dataclasses.fields(Config):
        if f.name == "from_environment":
            continue
        value = getattr(Config(), f.name)
        if dataclasses.is_dataclass(value):
            expected |= {f"{f.name}.{g.name}": getattr(value, g.name) for g in dataclasses.fields(value)}
        else:
            expected[f.name] = value
    listed = keys()
    assert {name: default for name, (default, _) in listed.items()} == expected
    assert all(documentation for _, documentation in listed.values())


def test_the_composed_defaults_are_the_schemas():
    assert load() == Config()


def test_the_written_configuration_reads_back_as_itself():
    config = load(["recipe=literal", "model=llama_1b", "optimizer.lr=3e-6", "data.fields.problem=question"])
    assert from_mapping(OmegaConf.create(to_yaml(config))) == config


@pytest.mark.parametrize(
    ("override", "nearest"),
    [
        ("model.num_layer=3", "model.num_layers"),
        ("modle.num_layers=3", "model.num_layers"),
        ("++model.num_layer=3", "model.num_layers"),
        ("+target.kmax=2", "target.k_max"),
        ("num_step=3", "num_steps"),
        ("lr=1e-6", "optimizer.lr"),
        ("target.lr=1e-6", "optimizer.lr"),
        ("recepie=literal", "recipe"),
        ("optimizer.clipgrad=1", "optimizer.clip_grad"),
    ],
)
def test_a_misspelt_key_fails_with_the_nearest_right_name(override, nearest):
    text = sentence_of("seed=1", override)
    assert "unknown configuration key" in text
    assert f"did you mean {nearest!r}?" in text


def test_the_deleted_key_of_the_solver_is_an_unknown_key():
    assert "unknown configuration key" in sentence_of("seed=1", "loss.solver=fast")


def test_a_misspelt_option_of_a_group_fails_with_the_nearest_file():
    assert "did you mean recipe=literal?" in sentence_of("recipe=literl")


def test_a_misspelt_key_in_a_file_fails_with_the_nearest_right_name(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "ours.yaml").write_text("num_layers: 3\nhiden_size: 32\n")
    text = sentence_of("model=ours", search_path=[tmp_path])
    assert text.startswith("In 'model/ours'")
    assert "'model.hiden_size'" in text and "did you mean 'model.hidden_size'?" in text


def test_a_file_that_is_no_yaml_is_named(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "ours.yaml").write_text("num_layers: [3\n")
    assert "model/ours.yaml" in sentence_of("model=ours", search_path=[tmp_path])


def test_a_misspelt_key_in_nested_mappings_fails_with_the_nearest_right_name():
    with pytest.raises(ConfigError, match=r"'guards.patiance'; did you mean 'guards.patience'\?"):
        from_mapping({"guards": {"patiance": 3}})


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.num_layers=three", "model.num_layers"),
        ("model.num_layers=2.5", "model.num_layers"),
        ("model.num_layers=null", "model.num_layers"),
        ("dry_run=maybe", "dry_run"),
        ("optimizer.lr=[1]", "optimizer.lr"),
        ("rollout.stop_token_ids=[a]", "rollout.stop_token_ids"),
        ("data.fields=3", "data.fields"),
    ],
)
def test_a_value_of_the_wrong_type_names_its_key(override, words):
    text = sentence_of(override)
    assert words in text and "unknown" not in text


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("objective=solution", "objective must be one of"),
        ("num_steps=0", "num_steps must be at least 1, got 0"),
        ("model.normalization=rmsnorm", "did you mean 'RMSNorm'?"),
        ("model.num_layers=0", "model.num_layers must be at least 1"),
        ("model.num_query_groups=0", "model.num_query_groups must be at least 1"),
        ("model.num_query_groups=3", "must be a multiple of model.num_query_groups (3)"),
        ("model.hidden_size=65", "model.hidden_size (65) must be a multiple"),
        ("parallel.tensor_model_parallel_size=0", "parallel.tensor_model_parallel_size must be at least 1"),
        ("parallel.expert_tensor_parallel_size=0", "parallel.expert_tensor_parallel_size must be at least 1"),
        ("parallel.sequence_parallel=true", "needs tensor_model_parallel_size > 1"),
        ("parallel.virtual_pipeline_model_parallel_size=2", "needs pipeline_model_parallel_size > 1"),
        ("data.on_long_context=trunkate_end", "did you mean 'truncate_end'?"),
        ("data.fields.solutoin=hint", "did you mean 'solution'?"),
        ("data.global_batch_size=0", "data.global_batch_size must be at least 1"),
        ("rollout.engine=sglang", "rollout.engine must be one of megatron, vllm"),
        ("rollout.placement=remote", "rollout.placement must be one of colocated, server"),
        ("rollout.transfer=rdma", "rollout.transfer must be one of shared_memory, gloo, nccl, ipc"),
        ("rollout.timeout_s=0", "rollout.timeout_s must be positive"),
        ("rollout.servers=[http://n1:8000]", "need rollout.engine=vllm and rollout.placement=server"),
        ("rollout.guide_below=0.5", "needs rollout.guidance=mixed"),
        ("loss.rollout_correction=clipped", "loss.rollout_correction must be one of none, truncated"),
        ("loss.rollout_correction_cap=0", "loss.rollout_correction_cap must be positive"),
        ("solutions.pick=longest", "solutions.pick must be one of shortest, most_likely, random, learnable"),
        ("data.solutions=mine", "data.solutions must be one of given, own"),
        ("rollout.top_p=0", "rollout.top_p must lie in (0, 1]"),
        ("rollout.temperature=-1", "rollout.temperature must be at least 0"),
        ("target.rule=entropy", "target.rule must be one of"),
        ("target.k_max=abc", "target.k_max must be '1 + w', a positive number or null, got 'abc'"),
        ("target.k_max=0", "target.k_max must be"),
        ("target.k_max=true", "target.k_max must be"),
        ("target.k=-1", "target.k must be positive"),
        ("loss.divergence=kl", "loss.divergence must be one of"),
        ("loss.backend=cuda", "loss.backend must be one of torch, triton, got 'cuda'"),
        ("loss.fused=always", "loss.fused must be one of none, keep_gradient, low_memory"),
        ("loss.fused_chunk_tokens=0", "loss.fused_chunk_tokens must be at least 1"),
        ("loss.max_logits_gb=-1", "loss.max_logits_gb must be at least 0"),
        ("loss.jsd_lambda=1", "loss.jsd_lambda must lie in (0, 1)"),
        ("teacher.weights=eam", "did you mean 'ema'?"),
        ("teacher.ema_decay=1", "teacher.ema_decay must lie in [0, 1)"),
        ("schedule.pair_order=alternate", "did you mean 'alternating'?"),
        ("optimizer.precision=fp16", "optimizer.precision must be one of bf16, fp32"),
        ("optimizer.adam_beta2=1", "optimizer.adam_beta2 must lie in [0, 1)"),
        ("optimizer.lr_warmup_steps=-1", "optimizer.lr_warmup_steps must be at least 0"),
        ("optimizer.overlap_param_gather=true", "needs use_distributed_optimizer and overlap_grad_reduce"),
        ("checkpoint.keep_last=0", "checkpoint.keep_last must be at least 1"),
        ("metrics.console_every=0", "metrics.console_every must be at least 1"),
        ("evaluation.pass_at_k=[4]", "pass@4 but evaluation.num_samples is 1"),
        ("evaluation.pass_at_k=[0]", "must hold numbers of at least 1"),
        ("guards.patience=0", "guards.patience must be at least 1"),
    ],
)
def test_an_impossible_value_is_one_sentence(override, words):
    with pytest.raises(ConfigError) as caught:
        from_mapping(OmegaConf.from_dotlist([override]))
    assert words in str(caught.value) and "\n" not in str(caught.value)


TP, PP, CP = (f"parallel.{axis}_parallel_size" for axis in ("tensor_model", "pipeline_model", "context"))
EP, ETP = (f"parallel.{axis}_parallel_size" for axis in ("expert_model", "expert_tensor"))
VPP = "parallel.virtual_pipeline_model_parallel_size"
MOE = "model.num_moe_experts=4"
IMPOSSIBLE_WORLDS = [
    (3, [f"{TP}=2"], "world size 3 must be a multiple of TP x PP x CP = 2 x 1 x 1 = 2"),
    (4, [f"{TP}=2", f"{CP}=4"], "TP x PP x CP = 2 x 1 x 4 = 8"),
    (1, [f"{PP}=2"], "TP x PP x CP = 1 x 2 x 1 = 2"),
    (6, [MOE, f"{EP}=4"], "world size 6 must be a multiple of ETP x EP x PP = 1 x 4 x 1 = 4"),
    (2, [f"{EP}=2"], "needs a mixture of experts (model.num_moe_experts)"),
    (3, [MOE, f"{EP}=3"], "model.num_moe_experts (4) must be a multiple of EP (3)"),
    (8, [f"{TP}=8"], "model.num_attention_heads (4) must be a multiple of tensor_model_parallel_size (8)"),
    (4, [f"{TP}=4", "model.num_query_groups=2"], "model.num_query_groups (2) must be a multiple of"),
    (4, [f"{TP}=4", "model.ffn_hidden_size=66"], "model.ffn_hidden_size (66) must be a multiple of"),
    (3, [f"{PP}=3"], "model.num_layers (2) must be a multiple of PP x VPP = 3"),
    (2, [f"{PP}=2", f"{VPP}=2"], "model.num_layers (2) must be a multiple of PP x VPP = 4"),
    (2, [f"{TP}=2", MOE], "needs parallel.sequence_parallel=true"),
    (
        4,
        [f"{TP}=4", "parallel.sequence_parallel=true", MOE, "model.moe_ffn_hidden_size=6"],
        "model.moe_ffn_hidden_size (6) must be a multiple of the tensor parallelism inside an expert (4)",
    ),
    (64, [], "data.global_batch_size (32) must be at least the number of data-parallel ranks (64)"),
]


@pytest.mark.parametrize(("world_size", "overrides", "words"), IMPOSSIBLE_WORLDS)
def test_parallel_sizes_that_cannot_be_are_one_sentence(world_size, overrides, words):
    config = from_mapping(OmegaConf.from_dotlist(overrides))
    with pytest.raises(ConfigError) as caught:
        config.check_world(world_size)
    assert words in str(caught.value) and "\n" not in str(caught.value)


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
        (8, ["parallel=node_of_8", "model=qwen3_8b"]),
        (6, [f"{TP}=6", "model.provider=lab.models.provide"]),
    ],
)
def test_parallel_sizes_that_can_be_pass(world_size, overrides):
    load(overrides).check_world(world_size)


def test_parallel_sizes_are_checked_without_torch():
    code = (
        "import sys\nfrom megatron_selfdistill.config import load\n"
        "try:\n    load(['parallel.tensor_model_parallel_size=2']).check_world(3)\n"
        "except ValueError as error:\n    sys.exit(0 if 'torch' not in sys.modules else 2)\nsys.exit(1)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True)


@pytest.mark.parametrize("file", SHIPPED, ids=str)
def test_every_shipped_file_composes_and_sets_what_it_says(file):
    group, option = file.parts[0], file.stem
    config = dataclasses.asdict(load([f"{group}={option}"]))
    written = OmegaConf.to_container(OmegaConf.load(config_dir() / file))
    target = config if "_global_" in (config_dir() / file).read_text() else config[group]
    written.pop("defaults", None)
    assert written, "a file that sets nothing"
    assert_contains(target, written)


def assert_contains(values: dict, part: dict) -> None:
    for key, value in part.items():
        if isinstance(value, dict):
            assert_contains(values[key], value)
        else:
            assert values[key] == value, key


def test_a_group_wins_over_the_recipe():
    assert load(["recipe=literal", "target=capped"]).target.k_max == "1 + w"
    assert load(["target=batch"]).target.rule == "batch", "also over the default recipe"


def test_groups_compose_with_each_other_and_the_command_line_has_the_last_word():
    config = load("recipe=literal target=strict optimizer=fp32 model=qwen3_8b target.teacher_weight=1.5".split())
    assert (config.loss.divergence, config.teacher.weights) == ("forward_kl", "current")
    assert (config.target.k_max, config.target.teacher_weight) == (None, 1.5)
    assert (config.optimizer.precision, config.model.num_layers) == ("fp32", 36)


def test_a_labs_folder_adds_groups_and_options(tmp_path):
    for name, text in {
        "model/ours.yaml": "num_layers: 6\n",
        "cluster/big.yaml": "# @package _global_\nparallel: {tensor_model_parallel_size: 2}\nnum_steps: 7\n",
    }.items():
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(text)
    config = load(["model=ours", "+cluster=big"], search_path=[tmp_path])
    by_hydra = load(["model=ours", "+cluster=big", f"hydra.searchpath=[file://{tmp_path}]"])
    assert (config.model.num_layers, config.parallel.tensor_model_parallel_size, config.num_steps) == (
        6,
        2,
        7,
    )
    assert by_hydra == config
    assert load(["recipe=literal"], search_path=[tmp_path]).teacher.weights == "current"
    assert load().model.num_layers == 2, "the lab's folder is forgotten by the next call"


def test_a_labs_recipe_without_groups_is_told_to_end_its_defaults_with_them(tmp_path):
    (tmp_path / "recipe").mkdir()
    recipe = tmp_path / "recipe" / "ours.yaml"
    recipe.write_text("# @package _global_\nnum_steps: 7\n")
    assert load(["recipe=ours"], search_path=[tmp_path]).num_steps == 7
    assert "end its defaults with /groups" in sentence_of("recipe=ours", "model=tiny", search_path=[tmp_path])
    recipe.write_text("# @package _global_\ndefaults: [_self_, /groups]\nnum_steps: 7\n")
    assert load(["recipe=ours", "model=tiny"], search_path=[tmp_path]).model.normalization == "LayerNorm"


def test_free_form_dictionaries_take_new_keys():
    config = load(
        [
            "data.fields.problem=question",
            "data.chat_template_kwargs.enable_thinking=false",
            "model.transformer.moe_shared_expert_intermediate_size=64",
            "model.transformer.nested={a: 1}",
        ]
    )
    assert config.data.fields == {"problem": "question"}
    assert config.data.chat_template_kwargs == {"enable_thinking": False}
    assert config.model.transformer == {"moe_shared_expert_intermediate_size": 64, "nested": {"a": 1}}


def test_the_configs_are_found_from_any_folder(tmp_path):
    code = "from megatron_selfdistill.config import load; print(load(['model=qwen3_8b']).model.hidden_size)"
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(REPOSITORY)!r}); {code}"],
        cwd=tmp_path,
        check=True,
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == "4096"


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
        (["rollout.guidance=mixed", "rollout.top_p=0.9"], "samples from the target itself"),
        (["loss.rollout_correction=truncated", "objective=sft"], "samples nothing"),
        (["objective=solutions"], "objective must be one of self_distillation, sft, rft, got 'solutions'"),
        (["objective=verified_rollouts"], "objective must be one of self_distillation, sft, rft, got 'verified_rol"),
        (["loss.rollout_correction=truncated", "rollout.temperature=0"], "rollout.temperature=0"),
        (
            ["loss.rollout_correction=truncated", "rollout.engine=vllm", "rollout.temperature=0.7"],
            "vLLM reports log-probs at temperature 1 only",
        ),
        (["rollout.guide_below=0.5", "rollout.guidance=mixed", "rollout.replay=old.jsonl"], "rollout.replay"),
        (["data.solutions=own", "objective=sft"], "leave data.solutions=given"),
    ],
)
def test_settings_that_contradict_each_other_are_one_sentence(overrides, words):
    with pytest.raises(ConfigError) as caught:
        load(overrides)
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["objective=sft"], "data.kind=conversations needs objective=self_distillation"),
        (["data.solutions=own"], "data.kind=conversations needs objective=self_distillation"),
        (["rollout.record=here.jsonl"], "conversations.responses=logged samples nothing"),
        (["rollout.guidance=mixed"], "conversations.responses=logged samples nothing"),
        (["loss.rollout_correction=truncated"], "conversations.responses=logged samples nothing"),
        (
            ["conversations.responses=sampled", "conversations.min_log_prob=-1"],
            "min_log_prob drops unlikely logged turns",
        ),
        (["conversations.min_log_prob=0.5"], "a log-prob in nats, at most 0, got 0.5"),
        (["conversations.turns=last"], "conversations.turns must be one of all, before_accepted"),
    ],
)
def test_chat_logs_go_with_what_they_can_be_trained_on(overrides, words):
    assert words in sentence_of("recipe=chat_logs", *overrides)


def test_the_columns_of_conversations_are_unknown_to_problems():
    assert "must be one of answer, id, messages, problem, solution" in sentence_of("data.fields.accepted=ok")
    assert load(["recipe=chat_logs", "data.fields.accepted=ok"]).data.fields == {"accepted": "ok"}


@pytest.mark.parametrize("recipe", sorted(path.stem for path in (config_dir() / "recipe").glob("*.yaml")))
def test_with_every_recipe_a_model_can_be_chosen(recipe):
    assert load([f"recipe={recipe}", "model=tiny"]).model.hidden_size == 64


FLOATS = [
    f"{section}{f.name}"
    for section, cls in [
        ("", Config),
        *((f"{f.name}.", type(getattr(Config(), f.name))) for f in dataclasses.fields(Config)),
    ]
    if dataclasses.is_dataclass(cls)
    for f in dataclasses.fields(cls)
    if "float" in str(f.type) or f.name == "k_max"
]


def test_no_number_is_infinite_or_nan():
    assert len(FLOATS) > 40
    for key, value in zip(FLOATS, itertools.cycle(["inf", "-inf", "nan"]), strict=False):
        text = sentence_of_mapping(f"{key}={value.replace('inf', '.inf').replace('nan', '.nan')}")
        assert text.startswith(key) and value in text, text
    assert "optimizer.lr must be a finite number, got inf" in sentence_of("optimizer.lr=inf")


def test_no_number_in_a_free_form_key_is_infinite_or_nan():
    assert "model.transformer.init_method_std must be a finite" in sentence_of("model.transformer.init_method_std=nan")
    assert "rollout.engine_args.a must be a finite number" in sentence_of("rollout.engine_args={a: [1.0, inf]}")


def sentence_of_mapping(override: str) -> str:
    with pytest.raises(ConfigError) as caught:
        from_mapping(OmegaConf.from_dotlist([override]))
    return str(caught.value)


@pytest.mark.parametrize("seed", ["99999999999999999999", "-1", str(2**32)])
def test_a_seed_has_bounds(seed):
    assert f"seed must lie in 0 to 4294967295, got {seed}" in sentence_of(f"seed={seed}")
    assert load([f"seed={2**32 - 1}"]).seed == 2**32 - 1


def test_the_learning_rate_does_not_decay_upward():
    text = sentence_of("optimizer.lr=1e-6", "optimizer.min_lr=1e-5")
    assert "optimizer.min_lr (1e-05) must not be above optimizer.lr (1e-06)" in text


@pytest.mark.parametrize(
    "value",
    (
        *("a=b.jsonl", "(old) x.jsonl", "a,b.jsonl", "[x].jsonl", "it's.jsonl", 'say "it\'s".jsonl', "日本 😀.jsonl"),
        *("123", "true", "1e3", "{a}", "a\\'b", "ends\\", "*.jsonl", "choice(a,b)"),
    ),
)
def test_a_text_is_taken_as_it_stands(value):
    config = load([f"data.path={value}", f"run_dir=runs/{value}", f"data.fields.problem={value}"])
    assert (config.data.path, config.run_dir) == (value, f"runs/{value}")
    assert config.data.fields == {"problem": value}


def test_a_text_that_hydra_reads_as_one_keeps_hydras_rules(monkeypatch):
    monkeypatch.setenv("SOME_FOLDER", "/there")
    assert load(["data.path='a,b'"]).data.path == "a,b"
    assert load(["data.path=a\\,b"]).data.path == "a,b"
    assert load(["data.path=null"]).data.path is None
    assert load(["data.path=${oc.env:SOME_FOLDER}/x"]).data.path == "/there/x"
    assert load(["data.teacher_template={problem} H {solution}"]).data.teacher_template == "{problem} H {solution}"


def test_a_value_of_another_key_that_hydra_cannot_read_is_told_how_to_quote():
    assert "quote the value for hydra and the shell, 'rollout.servers=\"a=b\"'" in sentence_of("rollout.servers=a=b")
    assert "gives several values, and a run takes one" in sentence_of("num_steps=1,2")
    assert "expected key=value, got 'train'" in sentence_of("train")


def test_a_tilde_in_a_path_is_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", "/home/me")
    from megatron_selfdistill.config.schema.field_checks import PATHS

    config = load([f"{key}=~/x" for key in PATHS])
    for key in PATHS:
        section, _, name = key.rpartition(".")
        assert getattr(getattr(config, section) if section else config, name) == "/home/me/x", key
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "ours.yaml").write_text("path: ~/y\n")
    assert load(["data=ours"], search_path=[tmp_path]).data.path == "/home/me/y"
    assert load(["data.student_template=~{problem}"]).data.student_template == "~{problem}", "no path"


def test_no_text_is_null():
    optional = [
        f"{section.name}.{f.name}"
        for section in dataclasses.fields(Config)
        if dataclasses.is_dataclass(getattr(Config(), section.name))
        for f in dataclasses.fields(getattr(Config(), section.name))
        if f.type == "str | None"
    ]
    assert {"data.path", "data.tokenizer", "checkpoint.load", "rollout.replay"} <= set(optional)
    config = load([f"{key}=" for key in optional])
    for key in optional:
        section, _, name = key.partition(".")
        assert getattr(getattr(config, section), name) is None, key


def test_a_labs_recipe_without_its_package_line_is_told_to_begin_with_it(tmp_path):
    (tmp_path / "recipe").mkdir()
    recipe = tmp_path / "recipe" / "ours.yaml"
    recipe.write_text("num_steps: 7\n")
    text = sentence_of("recipe=ours", search_path=[tmp_path])
    assert f"recipe=ours: {recipe} must begin with the line `# @package _global_`" in text


def test_a_folder_of_configurations_that_is_not_there_is_named(tmp_path):
    text = sentence_of("recipe=ours", search_path=[tmp_path / "nowhere"])
    assert text == f"--config-dir {tmp_path / 'nowhere'}: there is no such directory"


# -- files and folders -------------------------------------------------------------------------------------------------


def file_sentence(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        check_files(load(["data.path=x.jsonl", "data.tokenizer=x", *overrides]))
    text = str(caught.value)
    assert text and "\n" not in text
    return text


def test_a_run_folder_that_cannot_be_one_is_refused_in_a_sentence_and_nothing_is_made(tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.write_text("")
    assert f"run_dir={file}: expected a directory, but {file} is a file" in file_sentence(f"run_dir={file}")
    assert f"expected a directory, but {file} is a file" in file_sentence(f"run_dir={file}/a/b")
    long = "x" * 300
    assert "has more than 255 bytes; shorten it" in file_sentence(f"run_dir={tmp_path}/new/{long}/run")
    assert "File name too long" in file_sentence(f"run_dir={tmp_path}/{long}")
    assert "run_dir is not set" in file_sentence("run_dir=")
    monkeypatch.setattr("os.access", lambda path, mode: False)
    assert f"{tmp_path} may not be written by this user" in file_sentence(f"run_dir={tmp_path}/new/run")
    assert list(tmp_path.iterdir()) == [file]


def test_a_replay_that_is_not_there_is_refused(tmp_path):
    text = file_sentence(f"run_dir={tmp_path}", f"rollout.replay={tmp_path}/missing.jsonl")
    assert text.startswith(f"rollout.replay={tmp_path}/missing.jsonl: there is no such file")
