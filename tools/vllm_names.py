# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Report whether versions of vLLM have every name that this project uses.

    python tools/vllm_names.py                   # of the vLLM that is installed here
    python tools/vllm_names.py DIR [DIR ...]     # of unpacked wheels or source trees: DIR holds the directory vllm

vLLM has no stable interface for what this project does with it, and not every machine can run a new version (there is
no build for a CPU).  This script therefore reads vLLM's files without importing them, and prints a table with a column
per version.  Its exit status is 1 if a name is missing.  A name that exists may have changed its meaning: read vLLM's
changes, too.
"""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from package_names import imported_names, installed, lookup

MEMBERS = {
    "vllm.entrypoints.llm": "LLM.generate LLM.collective_rpc LLM.apply_model LLM.reset_prefix_cache LLM.sleep "
    "LLM.wake_up",
    "vllm.entrypoints.rl.offline": "RLOfflineMixin.get_weight_version RLOfflineMixin.update_weight_version",
    "vllm.v1.engine.llm_engine": "LLMEngine.step LLMEngine.abort_request LLMEngine.output_processor "
    "LLMEngine.engine_core LLMEngine.vllm_config",
    "vllm.v1.engine.output_processor": "OutputProcessor.request_states",
    "vllm.v1.engine.core_client": "InprocClient.engine_core InprocClient._finalizer",
    "vllm.v1.engine.core": "EngineCore.model_executor EngineCore.scheduler EngineCore.structured_output_manager",
    "vllm.v1.structured_output": "StructuredOutputManager.clear_backend",
    "vllm.v1.executor.uniproc_executor": "ExecutorWithExternalLauncher._distributed_args",
    "vllm.distributed.parallel_state": "GroupCoordinator.destroy destroy_model_parallel _WORLD _NODE_COUNT",
    "vllm.envs": "disable_envs_cache",
    "vllm.outputs": "CompletionOutput.weight_versions CompletionOutput.finish_reason CompletionOutput.logprobs "
    "CompletionOutput.token_ids",
    "vllm.v1.worker.utils": "request_memory",
    "vllm.v1.worker.lora_model_runner_mixin": "LoRAModelRunnerMixin.load_lora_model",
    "vllm.lora.worker_manager": "LRUCacheWorkerLoRAManager._adapter_manager",
    "vllm.lora.lora_model": "LoRAModel.from_lora_tensors LoRAModel.loras",
    "vllm.lora.lora_weights": "LoRALayerWeights.lora_a LoRALayerWeights.lora_b",
    "vllm.lora.model_manager": "LoRAModelManager.modules LoRAModelManager.packed_modules LoRAModelManager.lora_config "
    "LoRAModelManager.model LoRAModelManager.remove_adapter LRUCacheLoRAModelManager.add_adapter "
    "LRUCacheLoRAModelManager.activate_adapter",
    "vllm.config.lora": "LoRAConfig.lora_dtype LoRAConfig.max_lora_rank",
    "vllm.model_executor.models.utils": "WeightsMapper.get_rename_mapper",
    "vllm.entrypoints.openai.models.serving": "OpenAIServingModels.lora_requests",
    "vllm.v1.worker.gpu_worker": "Worker.reload_weights Worker.weight_transfer_engine Worker._weight_update_active "
    "Worker.start_weight_update Worker.update_weights Worker.finish_weight_update Worker.init_weight_transfer_engine",
    "vllm.distributed.weight_transfer.base": "WeightTransferEngine.reset_weight_update_target "
    "WeightTransferEngine.parse_update_info WeightTransferEngine.model_config WeightTransferEngine.parallel_config",
    "vllm.distributed.weight_transfer.factory": "WeightTransferEngineFactory._registry "
    "WeightTransferEngineFactory.register_engine",
    "vllm.model_executor.layers.fused_moe.fused_moe_method_base": "FusedMoEMethodBase.moe_kernel",
    "vllm.model_executor.model_loader.reload.layerwise": "materialize_layer _layerwise_process",
    "vllm.model_executor.model_loader.reload.types": "LayerReloadingInfo.kernel_tensors",
    "vllm.v1.core.sched.scheduler": "Scheduler.shutdown",
}
"""Module -> what is used of it besides imports: functions, and Class.member, also those that __init__ sets."""

SAMPLING_PARAMETERS = "max_tokens temperature top_k top_p seed stop_token_ids ignore_eos logprobs detokenize"
ENGINE_ARGUMENTS = (
    "model skip_tokenizer_init trust_remote_code load_format generation_config enforce_eager disable_log_stats "
    "enable_sleep_mode tensor_parallel_size pipeline_parallel_size data_parallel_size distributed_executor_backend "
    "worker_extension_cls dtype max_model_len kv_cache_memory_bytes gpu_memory_utilization enable_chunked_prefill "
    "max_num_batched_tokens max_num_seqs weight_transfer_config nnodes node_rank master_addr master_port enable_lora "
    "max_loras max_cpu_loras max_lora_rank lora_target_modules lora_dtype"
)
SERVER_ARGUMENTS = "host port tokens_only disable_uvicorn_access_log allowed_origins middleware headless"
ENVIRONMENT = "VLLM_ENABLE_V1_MULTIPROCESSING VLLM_LOGGING_LEVEL VLLM_NO_USAGE_STATS VLLM_SERVER_DEV_MODE VLLM_HOST_IP"
ROUTES = (
    "/inference/v1/generate /collective_rpc /health /weight_info /get_world_size /v1/models /metrics /pause /resume "
    "/init_weight_transfer_engine /update_weight_version /start_weight_update /update_weights /finish_weight_update "
    "/reset_prefix_cache"
)
# Imported under either name (engines/vllm/server/serve.py), since 0.33 moved them.
MOVED = {
    "vllm.entrypoints.launchers.cli_args.make_arg_parser": "vllm.entrypoints.common.cli_args",
    "vllm.entrypoints.launchers.cli_args.validate_parsed_serve_args": "vllm.entrypoints.common.cli_args",
    "vllm.entrypoints.serve.utils.api_utils.cli_env_setup": "vllm.entrypoints.common.startup",
}


def missing(root: Path) -> list[str]:
    """Return the names that the vLLM in the directory ``root`` lacks, as they stand in `names`."""
    return [name for name in names() if not has(root, name)]


def names() -> list[str]:
    """Return every name that is used, each with its kind before a space."""
    members = [f"{module}.{member}" for module, those in MEMBERS.items() for member in those.split()]
    kinds = {
        "import": [*imported_names("vllm"), *MOVED],
        "member": members,
        "sampling": SAMPLING_PARAMETERS.split(),
        "argument": [*ENGINE_ARGUMENTS.split(), *SERVER_ARGUMENTS.split()],
        "environment": ENVIRONMENT.split(),
        "route": ROUTES.split(),
    }
    return [f"{kind} {name}" for kind, those in kinds.items() for name in those]


def has(root: Path, entry: str) -> bool:
    """Return whether the vLLM in the directory ``root`` has an entry of `names`."""
    kind, name = entry.split()
    if kind in ("import", "member"):
        module, _, last = name.rpartition(".")
        return any(lookup(root, f"{each}.{last}") for each in (module, MOVED.get(name, module)))
    if kind == "sampling":
        return lookup(root, f"vllm.sampling_params.SamplingParams.{name}") is not None
    if kind == "environment":
        return f'"{name}"' in (root / "vllm" / "envs.py").read_text()
    if kind == "route":
        return re.search(rf'[" ]{re.escape(name)}[",\s]', _routes(root)) is not None
    return re.search(rf'^    {name}: |"--{name.replace("_", "-")}"', _arguments(root), re.MULTILINE) is not None


@functools.cache
def _routes(root: Path) -> str:
    return "\n".join(path.read_text() for path in sorted((root / "vllm" / "entrypoints").rglob("*.py")))


@functools.cache
def _arguments(root: Path) -> str:
    directory = root / "vllm"
    files = [*directory.glob("entrypoints/*/cli_args.py"), directory / "engine" / "arg_utils.py"]
    return "\n".join(path.read_text() for path in files)


def version_of(root: Path) -> str:
    """Return the version that the vLLM in the directory ``root`` has, or the directory's name."""
    file = root / "vllm" / "_version.py"
    found = re.search(r"^__version__ = .*['\"](\S+)['\"]$", file.read_text(), re.MULTILINE) if file.is_file() else None
    return found[1] if found else root.name


def main(arguments: Sequence[str]) -> int:
    """Print the table; return 0 if every version has every name, 1 if a name is missing, 2 without a vLLM."""
    roots = [Path(argument) for argument in arguments] or [root for root in [installed("vllm")] if root is not None]
    if not roots or any(not (root / "vllm").is_dir() for root in roots):
        print(
            f"expected directories that hold the directory vllm, got {', '.join(arguments) or 'none, and no vLLM here'}"
        )
        return 2
    print(" | ".join(["name", *map(version_of, roots)]))
    complete = True
    for entry in names():
        found = [has(root, entry) for root in roots]
        complete = complete and all(found)
        print(" | ".join([entry, *("yes" if each else "MISSING" for each in found)]))
    return 0 if complete else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
