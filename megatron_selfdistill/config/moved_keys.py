# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Other names of keys: short names, words of other programs, and keys of version 0.2 that have moved.

Fields that are only handed to Megatron each had a key, such as ``model.yarn_mscale``; now a mapping has them.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from megatron_selfdistill.config.schema.model_config import YarnConfig
from megatron_selfdistill.config.schema.run_config import StartGuards
from megatron_selfdistill.config.schema.step_config import LearningRateDecay, OptimizerConstants, RecomputeConfig
from megatron_selfdistill.errors import ConfigError

SHORT = {
    "tp": "parallel.tensor_model_parallel_size",
    "pp": "parallel.pipeline_model_parallel_size",
    "cp": "parallel.context_parallel_size",
    "ep": "parallel.expert_model_parallel_size",
    "lr": "optimizer.lr",
    "batch": "data.global_batch_size",
    "steps": "num_steps",
}
"""The short name of a key on a command line -> the key."""

_WORDS = {
    "run_dir": "output_dir save_dir default_local_dir",
    "num_steps": "max_steps max_num_steps total_training_steps",
    "num_steps: steps = epochs x problems / data.global_batch_size": (
        "epochs num_epochs num_train_epochs max_epochs max_num_epochs total_epochs"
    ),
    "seed": "random_seed data_seed",
    "optimizer.optimizer": "optim",
    "optimizer.precision": "dtype torch_dtype bf16 fp16",
    "optimizer.lr": "learning_rate max_lr",
    "optimizer.lr_warmup_steps": "warmup_steps num_warmup_steps warmup_ratio",
    "optimizer.lr_decay.style": "lr_scheduler lr_scheduler_type",
    "optimizer.clip_grad": "max_grad_norm grad_clip gradient_clipping clip_grad_norm",
    "schedule.max_tokens: microbatches follow from it and from data.global_batch_size": (
        "gradient_accumulation_steps micro_batch_size train_micro_batch_size ppo_micro_batch_size_per_gpu"
    ),
    "schedule.recompute.granularity": "gradient_checkpointing activation_checkpointing",
    "data.global_batch_size": (
        "batch_size per_device_train_batch_size train_batch_size train_global_batch_size num_prompts_per_step"
    ),
    "data.path": "data dataset datasets dataset_name data_path data_files train_file train_files",
    "data.tokenizer": "tokenizer_name tokenizer_path",
    "data.max_length": "max_seq_length max_seq_len sequence_len seq_length cutoff_len",
    "rollout.max_new_tokens": "max_completion_length max_response_length",
    "rollout.num_samples": "num_generations num_generations_per_prompt n",
    "rollout.engine": "use_vllm",
    "rollout.engine_tp": "vllm_tensor_parallel_size",
    "checkpoint.load": "model model_name model_name_or_path model_path base_model checkpoint_dir",
    "checkpoint.save_every": "save_steps save_freq save_period save_interval",
    "checkpoint.keep_last": "save_total_limit max_ckpt_to_keep",
    "checkpoint.resume": "resume_from_checkpoint resume_mode",
    "evaluation.path": "eval_dataset val_file val_files",
    "evaluation.every": "eval_steps eval_freq test_freq val_period",
    "metrics.loggers": "report_to logger metric_logger log_with",
    "metrics.console_every": "logging_steps log_every_n_steps log_interval",
    "adapter.rank": "lora_r lora_rank r",
    "adapter.alpha": "lora_alpha",
    "adapter.layers": "lora_target_modules target_modules lora_attn_modules",
    "parallel.tensor_model_parallel_size": "tensor_parallel_size",
    "parallel.pipeline_model_parallel_size": "pipeline_parallel_size",
    "parallel.expert_model_parallel_size": "expert_parallel_size",
    "cluster.num_gpus": "n_gpus world_size nproc_per_node",
    "cluster.gpus_per_node": "n_gpus_per_node",
}
WORDS = {word: key for key, words in _WORDS.items() for word in words.split()}
"""The word of another program for a key -> the key, and after a colon what to do."""

_SENTENCES = {
    "metrics.console": "is now metrics.console_every, whose value 0 shows nothing",
    "model.rope_scaling": "is now model.rope_scaling_factor, whose value null scales nothing",
    "model.allow_untested_fp8": "is now model.transformer.fp8, which alone chooses FP8",
}
_RENAMED = {
    "rollout.wave_microbatches": "rollout.partial_batch_microbatches",
    **{f"model.yarn_{name}": f"model.yarn.{name}" for name in YarnConfig.__dataclass_fields__},
    **{f"model.{name}": f"model.transformer.{name}" for name in ("moe_aux_loss_coeff", "moe_z_loss_coeff")},
    **{f"optimizer.{name}": f"optimizer.constants.{name}" for name in OptimizerConstants.__dataclass_fields__},
    **{f"optimizer.lr_decay_{name}": f"optimizer.lr_decay.{name}" for name in LearningRateDecay.__dataclass_fields__},
    **{f"guards.{name}": f"guards.start.{name}" for name in StartGuards.__dataclass_fields__},
    "guards.min_entropy_ratio": "guards.entropy.min_ratio",
    "guards.max_entropy_ratio": "guards.entropy.max_ratio",
    "guards.min_entropy_rise": "guards.entropy.min_rise",
    **{f"schedule.recompute_{name}": f"schedule.recompute.{name}" for name in RecomputeConfig.__dataclass_fields__},
}
"""Keys of 0.2 with another name -> the name."""


def renamed(key: str) -> str:
    """Return the present name of a key that has another name now; every other key stays as it is."""
    return _RENAMED.get(key, key)


def moved_key(key: str) -> str | None:
    """Return a sentence that names what has replaced ``key`` of version 0.2; None for every other key."""
    new = _SENTENCES.get(key) or (f"is now {_RENAMED[key]}" if key in _RENAMED else None)
    return f"{key} {new}" if new else None


def translated(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the nested values of a checkpoint of version 0.2 in the keys of the present version.

    Raises: `ConfigError` for a checkpoint of version 0.1, whose methods had other keys.
    """
    if "method" not in values:
        raise ConfigError(
            "version 0.1 has written this checkpoint, and the present version resumes those of 0.2: let version "
            "0.2 save it, or start from its weights with checkpoint.load in another run_dir"
        )
    new = copy.deepcopy(dict(values))
    metrics, model = new.get("metrics", {}), new.get("model", {})
    if not metrics.pop("console", True):
        metrics["console_every"] = 0
    if not model.pop("rope_scaling", True):
        model["rope_scaling_factor"] = None
    for renamed, present in _RENAMED.items():
        section, _, key = renamed.partition(".")
        if key not in new.get(section, {}):
            continue
        value = new[section].pop(key)
        *mapping, name = present.split(".")[1:]
        if "transformer" not in mapping or value:  # without an entry, Megatron has no such loss
            part = new[section].setdefault(mapping[0], {}) if mapping else new[section]
            part.setdefault(name, value)
    return new
