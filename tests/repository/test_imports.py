# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The order of packages and files: imports go one way, the loss needs only torch, each file has its licence."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGE = "megatron_selfdistill"

# A room may import from those before it and a file from those before it in its room, never from those after them.
ORDER = {
    "hidden_values": "",
    "terminal": "",
    "errors": "",
    "choices": "",
    "timed_http": "",
    "config": (
        "console_line paths secret_keys environment schema.ranges schema.field_checks schema.model_config "
        "schema.adapter_config "
        "schema.parallel_config schema.data_config schema.rollout_config schema.environment_config "
        "schema.hints_config schema.target_config schema.loss_config schema.policy_config schema.optimizer_config "
        "schema.run_config schema.reward_checks schema.data_checks schema.adapter_checks schema.target_checks "
        "schema.overlap_checks "
        "schema.whole_config checks world_checks key_list overrides compose functions bound_keys command_line"
    ),
    "compat": "cpu known_warnings repairs",
    "replaced_files": "",
    "run_log": "",
    "explored_files": "",
    "distributed": "collectives launch_store roll_call watchdog ranks parcels stop",
    "loss": (
        "status target batch_k divergence weighting "
        "sharded.beta_grid sharded.argument_checks sharded.solver sharded.shard_sums sharded.token_statistics "
        "sharded.gathered_hidden sharded.projection_gradients "
        "triton.block_loads triton.kernel_math triton.first_pass_kernel triton.solver_kernels "
        "triton.pass_kernels triton.merge_kernels triton.pass_launches triton.statistics_kernels "
        "triton.solver_launches "
        "sharded.backend sharded.vocab_parallel sharded.target_solution sharded.vocab_entropy "
        "sharded.rare_mass sharded.logit_summary sharded.fused_linear"
    ),
    "data": (
        "data_files records user_values problems chat.acceptance chat.conversations template_trial tokenizer prompts "
        "hints pieces contexts chat.replies packing budgets placement"
    ),
    "model": (
        "attention_sinks attention_windows norms layers flash_sinks head_norms fused_kernels fp8 host_to_device "
        "optimizer_step packed_sequences gated_delta_kernels gated_delta_rule gated_delta_net gated_delta_specs "
        "core_attributes architecture build hf.rules hf.linear_attention hf.adapter_rules adapters hf.decoder "
        "hf.config_fields hf.family hf.rope hf.sliding_windows hf.sigmoid_router hf.dense "
        "hf.deepseek hf.experts hf.glm hf.seed_oss hf.smollm hf.phi hf.qwen2_moe hf.olmoe hf.minimax hf.gpt_oss "
        "hf.qwen_next hf.ministral hf.mistral3 hf.nearest hf.mapping live_shards export forward output_layer "
    ),
    "checkpoint": (
        "formats.finite formats.tensor_names formats.read_ahead formats.manifest formats.pickle_globals "
        "formats.unpickler formats.megatron_args formats.megatron_flags formats.hf_files "
        "formats.torch_dist_writer formats.torch_dist_reader "
        "formats.safetensors_directory formats.mxfp4 "
        "run.saved_run directory stored_adapters formats.legacy formats.stored_model "
        "formats.full_weights describe run.run_lock run.optimizer_shards run.state conversion_progress release "
        "merged_weights carried_weights conversion peft_adapters vocabulary run.adapter_base run.sharded_io "
        "run.external run.frozen_weights run.checkpointer run.run_directory "
        "run.resumption"
    ),
    "run_data": "",
    "needed_packages": "",
    "prechecks": "",
    "teacher": "",
    "rollout": (
        "base arrays streaming guided megatron.decoding megatron.kv_cache megatron.survivors megatron.generated "
        "megatron.decoding_model megatron.forward_passes megatron.guided_rows "
        "megatron.megatron_sampler vllm.vllm_versions vllm.engine_memory vllm.trainer_state vllm.reload_in_place "
        "vllm.gpt_oss_loading vllm.packed vllm.protocol vllm.server.process_watch vllm.server.server_names "
        "vllm.engine_output vllm.http.shared_messages vllm.http.stated_response vllm.http.response_answer "
        "vllm.http.patient_http vllm.http.http_tasks vllm.http.child vllm.http.http_process "
        "vllm.engine vllm.engine_adapter vllm.engine_weights vllm.plugin.adapter_loader vllm.exchange "
        "vllm.pair_messages vllm.coroutines vllm.pairs vllm.hf_directory vllm.transfer_buckets vllm.in_process_args "
        "vllm.in_process vllm.colocated vllm.server_calls vllm.client vllm.dispatch vllm.server.server_nodes "
        "vllm.server.server_process vllm.transfer_group vllm.transfer vllm.transfer_choice "
        "vllm.weight_update vllm.server_pool vllm.server_batch vllm.server_sampler vllm.plugin.access "
        "vllm.plugin.compact_responses "
        "vllm.plugin.pair_scheduler vllm.plugin.pair_store vllm.plugin.guided_processor vllm.plugin.receivers "
        "vllm.plugin.weight_backend vllm.plugin.worker vllm.server.serve factory"
    ),
    "pipeline": (
        "device_batch gradient_bridge router_losses teacher_states token_losses token_measures reference waves "
        "step_output schedule "
        "batch score candidates"
    ),
    "recipes": (
        "environments http_environment signals advantages teacher_terms scope uni_opd sod pi_distill "
        "normalization ratio_terms rltf explanation_reward verbal_score"
    ),
    "metrics": (
        "guards untrained_step samples pace phases progress claims leakage overlap step staleness sample_views "
        "token_numbers step_samples explored loggers log"
    ),
    "evaluation": (
        "bootstrap evaluation_directory estimators calibration diversity alignment evaluation_result verify inference "
        "held_out evaluations comparison all_models alignment_groups alignment_nodes tables"
    ),
    "sources": (
        "problem_prompts reward_metrics explanation_rewards step_terms recording visits source moved_contexts "
        "on_demand_sampler synced_sampler solution_search own_solutions group_functions hindsight_hints asked_model "
        "skills verbal_scores selection guidance episodes revisions on_policy ahead streamed partial replay "
        "solutions_as_responses turns next_state_hints hinted_turns chat_logs configured_hints configured_source"
    ),
    "report": (
        "curves next_steps html_page target_page downsampling run_record sick_rules figure figures run_facts "
        "run_summary run_report refresh"
    ),
    "plan": "bubble gpus plan_checks stages reserved memory engines step_time launch host_memory dry_run "
    "time_table plan_tables",
    "learner": "",
    "trained_step": "",
    "trainer": "",
    "launch_facts": "",
    "announcement": "",
    "train": "",
    "selftest": (
        "launch_environment outcome tiny meeting layer_kinds resume sharded_loss sync training warming node_test"
    ),
    "doctor": "imports versions findings",
    "commands": (
        "endings convert_adapters convert report doctor given_config given_model evaluate_options evaluate exploration "
        "model_options explore_options run_settings given_models explore alignment_contexts alignment_options "
        "alignment_job gradient_alignment plan solution_journal data_set_job solution_job explanation_job "
        "data_set_command solutions explanations"
    ),
    "cli": "",
    "__main__": "",
}
FILES = [f"{room}.{file}" if file else room for room, files in ORDER.items() for file in files.split() or [""]]

LOSS_MAY_IMPORT = {"torch", "triton"}
# One file may use apex's kernel for weight gradients, where it is installed.
FUSED_LINEAR_MAY_IMPORT = LOSS_MAY_IMPORT | {"fused_weight_gradient_mlp_cuda"}
DATA_MAY_IMPORT = {"torch", "datasets", "transformers", "tokenizers", "jinja2", "sentencepiece", "yaml"}

LICENCE = "# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0."

PACKAGE_FILES = sorted((REPOSITORY / PACKAGE).rglob("*.py"))
PYTHON_FILES = [
    REPOSITORY / "setup.py",
    *(
        path
        for directory in (PACKAGE, "tests", "tools", "examples")
        for path in sorted((REPOSITORY / directory).rglob("*.py"))
    ),
]


def imported_names(source: str, module: str) -> Iterator[str]:
    """Each absolute dotted name that ``source``, the file of ``module``, imports, also inside functions."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")[: -node.level]
                base = ".".join([*parents, base]).rstrip(".")
            yield from (f"{base}.{alias.name}" for alias in node.names)


def wrong_way_imports(source: str, module: str) -> list[str]:
    """Return the imports of ``source``, the file of ``module``, that run against `ORDER` or name no place in it."""
    importer = place_of(module)
    if importer is None:
        return [f"{module}: not in ORDER; give it a place in the data flow"]
    wrong = []
    for name in imported_names(source, module):
        imported = place_of(name) if name.startswith(f"{PACKAGE}.") else None
        if imported is not None and imported > importer:
            wrong.append(f"{module} imports {name}, which comes after it")
    return wrong


def place_of(name: str) -> float | None:
    """Return where a module, or the module that holds a name, stands in `ORDER`; None where it stands nowhere.

    A room's or a directory's own file stands behind all of its files, and the package's own file before everything.
    """
    parts = name.removesuffix(".__init__").split(".")[1:]
    if not parts:
        return -1
    for length in range(len(parts), 0, -1):
        module = ".".join(parts[:length])
        if module in FILES:
            return FILES.index(module)
        inside = [place for place, file in enumerate(FILES) if file.startswith(f"{module}.")]
        if inside:
            return inside[-1] + 0.5
    return None


def module_of(path: Path) -> str:
    parts = path.relative_to(REPOSITORY).with_suffix("").parts
    # The package's own file stays megatron_selfdistill; a directory's is megatron_selfdistill.directory.__init__,
    # so that one dot in it means the directory.
    return parts[0] if parts == (PACKAGE, "__init__") else ".".join(parts)


def foreign_imports(directory: str, name: str = "*.py") -> dict[str, set[str]]:
    """Third-party packages that each file of a directory of the package imports."""
    found = {}
    for path in sorted((REPOSITORY / PACKAGE / directory).rglob(name)):
        tops = {imported.split(".")[0] for imported in imported_names(path.read_text(), module_of(path))}
        found[path.name] = tops - sys.stdlib_module_names - {PACKAGE, "__future__"}
    return found


@pytest.mark.parametrize("path", PACKAGE_FILES, ids=lambda path: str(path.relative_to(REPOSITORY / PACKAGE)))
def test_imports_run_one_way(path):
    assert wrong_way_imports(path.read_text(), module_of(path)) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("loss.target", "from megatron_selfdistill.model import build"),
        ("loss.target", "from megatron_selfdistill import train"),
        ("loss.target", "from .sharded.solver import solve"),
        ("config.schema.field_checks", "from megatron_selfdistill.config import Config"),
        ("loss.target", "import megatron_selfdistill.train"),
        ("loss.target", "from ..model.build import build"),
        ("loss.__init__", "from ..train import main"),
        ("distributed.ranks", "def f():\n    from megatron_selfdistill.train import main"),
        ("helpers", "import torch"),
    ],
)
def test_a_wrong_way_import_is_found(module, source):
    assert len(wrong_way_imports(source, f"{PACKAGE}.{module}")) == 1


def test_a_right_way_import_passes():
    source = "import torch\nfrom .layers import f\nfrom ..data import x\nimport megatron_selfdistill.loss.target"
    assert wrong_way_imports(source, f"{PACKAGE}.model.build") == []


def test_loss_imports_torch_and_triton_only():
    for name, found in foreign_imports("loss").items():
        allowed = FUSED_LINEAR_MAY_IMPORT if name == "fused_linear.py" else LOSS_MAY_IMPORT
        assert found <= allowed, name


def test_loss_imports_only_the_choices_of_the_rest_of_the_package():
    for path in sorted((REPOSITORY / PACKAGE / "loss").rglob("*.py")):
        names = imported_names(path.read_text(), module_of(path))
        assert {name.split(".")[1] for name in names if name.startswith(f"{PACKAGE}.")} <= {"loss", "choices"}, (
            path.name
        )


def test_data_knows_nothing_of_megatron():
    for name, found in foreign_imports("data").items():
        assert found <= DATA_MAY_IMPORT, name


def test_only_the_file_of_ranks_reads_megatrons_parallel_state():
    readers = {
        module_of(path)
        for path in PACKAGE_FILES
        if any("parallel_state" in n.split(".") for n in imported_names(path.read_text(), module_of(path)))
    }
    assert readers <= {f"{PACKAGE}.distributed.ranks"}


def test_importing_the_package_imports_neither_torch_nor_megatron():
    code = (
        "import sys, megatron_selfdistill\n"
        "heavy = {'torch', 'numpy', 'megatron', 'transformers', 'hydra'} & set(sys.modules)\n"
        "import megatron_selfdistill.config\n"
        "heavy |= {'torch', 'megatron', 'transformers'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True)


def test_no_file_is_called_utils():
    nameless = {"utils", "util", "helpers", "common", "misc"}
    assert [path for path in PYTHON_FILES if path.stem in nameless] == []


def test_every_python_file_opens_with_the_licence():
    without = [str(path.relative_to(REPOSITORY)) for path in PYTHON_FILES if not opens_with_licence(path)]
    assert without == []


def opens_with_licence(path: Path) -> bool:
    lines = path.read_text(encoding="utf-8").splitlines()
    return LICENCE in lines[:2]  # the second, below a #! line
