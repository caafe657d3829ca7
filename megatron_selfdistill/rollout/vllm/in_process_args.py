# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The arguments of a vLLM engine in the trainer's own processes, and the arguments that are refused there."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from megatron_selfdistill.checkpoint.formats.hf_files import read_config
from megatron_selfdistill.errors import ConfigError
from megatron_selfdistill.rollout.vllm.engine import WORKER_EXTENSION, cpu_engine_args
from megatron_selfdistill.rollout.vllm.engine_adapter import EngineAdapter
from megatron_selfdistill.rollout.vllm.pairs import GUIDED_ENGINE_ARGS
from megatron_selfdistill.rollout.vllm.transfer_buckets import segments_expand


def in_process_engine_args(
    directory: Path,
    device: torch.device,
    *,
    engine_tp: int,
    guided: bool,
    settings: Mapping[str, Any],
    adapter: EngineAdapter | None,
) -> dict[str, Any]:
    """Return the arguments of ``vllm.LLM`` for an engine on ``device`` of ``engine_tp`` ranks of the trainer.

    ``directory`` has the model's config.json.  ``settings``: arguments that override those that are set here, among
    them ``max_model_len``.  Where torch's segments of GPU memory expand, the ranks of an engine add up by NCCL alone.
    Raises: `ConfigError` for settings that cannot work in the trainer's processes.
    """
    arguments: dict[str, Any] = {
        "skip_tokenizer_init": True,
        "trust_remote_code": False,  # rollout.engine_args may say otherwise
        "load_format": "dummy",
        "generation_config": "vllm",
        "enforce_eager": device.type == "cpu",
        "disable_log_stats": True,
        "enable_sleep_mode": device.type == "cuda",
        "tensor_parallel_size": engine_tp,
        "distributed_executor_backend": "external_launcher",
        "worker_extension_cls": WORKER_EXTENSION,
    }
    if device.type == "cpu":
        arguments |= cpu_engine_args(read_config(directory), settings["max_model_len"])
    if guided:
        arguments |= GUIDED_ENGINE_ARGS
    if adapter is not None:
        arguments |= adapter.engine_args(on_cpu=device.type == "cpu")
    _refuse_other_ranks(arguments, settings)
    if device.type == "cuda" and engine_tp > 1 and segments_expand():
        _refuse_custom_all_reduce(settings)
        arguments["disable_custom_all_reduce"] = True
    return arguments | dict(settings)


def _refuse_other_ranks(arguments: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    ours = {"pipeline_parallel_size": 1, "data_parallel_size": 1, **arguments}
    for name in (
        "tensor_parallel_size",
        "pipeline_parallel_size",
        "data_parallel_size",
        "distributed_executor_backend",
    ):
        if settings.get(name, ours[name]) != ours[name]:
            raise ConfigError(
                f"rollout.engine_args.{name}={settings[name]!r}: a colocated engine runs on rollout.engine_tp of the "
                "trainer's own ranks; remove it, or set rollout.placement=server"
            )


def _refuse_custom_all_reduce(settings: Mapping[str, Any]) -> None:
    """Raise `ConfigError` where ``settings`` ask for vLLM's custom all-reduce.

    While CUDA graphs are captured, it takes CUDA IPC handles of the buffers in them.  CUDA has none for memory of
    expandable segments, and vLLM then ends the process without a traceback.
    """
    name = "disable_custom_all_reduce"
    if not settings.get(name, True):
        raise ConfigError(
            f"rollout.engine_args.{name}={settings[name]!r}: vLLM's custom all-reduce cannot share memory of PyTorch's "
            "expandable segments, which this process uses, and would end the process; remove the key, or start the run "
            "with PYTORCH_CUDA_ALLOC_CONF=expandable_segments:False"
        )
