# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The checks of a plan before any model is built; this module imports no torch."""

from __future__ import annotations

from megatron_selfdistill.commands.prechecks import names_its_model, require_ranks
from megatron_selfdistill.config import Config
from megatron_selfdistill.config.world_checks import longest_context
from megatron_selfdistill.errors import ConfigError

UNKNOWN_VOCABULARY = "the vocabulary's size is not known: set model.vocab_size, or data.path and data.tokenizer"


def check_plan(config: Config) -> None:
    """Raise `ConfigError` for an impossible plan, as far as ``config`` shows without a checkpoint's arguments."""
    num_gpus = planned_gpus(config)
    require_ranks(config, num_gpus)
    if not names_its_model(config):
        return
    check_lengths(config, longest_context(config))
    check_engine(config, num_gpus)
    if config.model.vocab_size is None and not (config.data.path and config.data.tokenizer):
        raise ConfigError(UNKNOWN_VOCABULARY)


def planned_gpus(config: Config) -> int:
    """Return ``cluster.num_gpus``.  Raises: `ConfigError` if the key is not set or only a launch can see the model."""
    if config.cluster.num_gpus is None:
        raise ConfigError(
            "a dry run without a launch needs cluster.num_gpus, the number of GPUs to plan for: selfdistill plan "
            "cluster.num_gpus=1 checkpoint.load=/checkpoints/qwen3-1.7b data.tokenizer=/models/Qwen3-1.7B "
            "data.path=problems.jsonl, or a recipe that sets it: selfdistill plan recipe=qwen3_8b"
        )
    if config.model.provider is not None:
        raise ConfigError(
            f"model.provider={config.model.provider} builds a model that only a launch can see: start dry_run=true "
            "under torchrun, or describe the architecture in model.*"
        )
    return config.cluster.num_gpus


def longest_sequence(config: Config) -> int:
    """Return the longest packed sequence, up to ``schedule.max_tokens``, that SP and CP can cut."""
    p = config.parallel
    multiple = p.tensor_model_parallel_size * (2 * p.context_parallel_size if p.context_parallel_size > 1 else 1)
    return config.schedule.max_tokens // multiple * multiple


def check_lengths(config: Config, max_length: int) -> None:
    """Raise `ConfigError` where contexts of ``max_length`` tokens leave no room for a prompt."""
    new = config.rollout.max_new_tokens
    if config.needs.samples is not None and config.samples and new >= max_length:
        raise ConfigError(
            f"rollout.max_new_tokens ({new}) leaves no room for a prompt in contexts of at most {max_length} tokens: "
            "raise data.max_length and schedule.max_tokens, or lower rollout.max_new_tokens"
        )


def check_engine(config: Config, num_gpus: int) -> None:
    """Raise `ConfigError` for options that vLLM would refuse once the GPUs exist."""
    rollout, heads = config.rollout, config.model.num_attention_heads
    if rollout.engine != "vllm" or not config.samples:
        return
    if rollout.placement == "colocated" and num_gpus % rollout.engine_tp:
        raise ConfigError(
            f"rollout.engine_tp={rollout.engine_tp} ranks form one engine, but cluster.num_gpus={num_gpus} is no "
            "multiple of it; choose a divisor"
        )
    per_node = min(num_gpus, config.cluster.gpus_per_node)
    if rollout.placement == "server" and rollout.engine_tp > per_node and rollout.engine_tp % per_node:
        raise ConfigError(
            f"rollout.engine_tp={rollout.engine_tp}: a server has GPUs of one node, at most {per_node}, or all GPUs of "
            f"several; choose a multiple of {per_node}"
        )
    if heads % rollout.engine_tp:
        raise ConfigError(
            f"rollout.engine_tp={rollout.engine_tp} must divide model.num_attention_heads ({heads}), which vLLM cuts"
        )
    if rollout.hf_config is None:
        from megatron_selfdistill.interop.hf.mapping import family_of_model  # imports torch, which takes seconds

        family_of_model(config.model)
