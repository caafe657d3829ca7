# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Checks of a configuration against the number of ranks of a launch, and of its lengths against its layout."""

from __future__ import annotations

import os
from pathlib import Path

from megatron_selfdistill.config.schema.field_checks import require, value_of_variable
from megatron_selfdistill.config.schema.model_config import ModelConfig
from megatron_selfdistill.config.schema.step_config import ParallelConfig
from megatron_selfdistill.config.schema.whole_config import Config
from megatron_selfdistill.errors import ConfigError


def check_files(config: Config) -> None:
    """Raise `ConfigError` if the data, tokenizer or recorded responses are missing, or ``run_dir`` cannot be written.

    Nothing is created.
    """
    for key, value in (("data.path", config.data.path), ("data.tokenizer", config.data.tokenizer)):
        if value is None:
            raise ConfigError(f"{key} is not set: give problems, a checkpoint, a tokenizer, or see `make quickstart`")
    evaluation = config.evaluation
    if evaluation.path is None and (evaluation.every or evaluation.at_start):
        raise ConfigError("evaluation.path is not set: set it, or evaluation.every=0 and evaluation.at_start=false")
    value_of_variable("environment.options.api_key_env", config.environment.options.get("api_key_env"))
    _check_run_dir(config.run_dir)
    replay = config.rollout.replay
    if replay is not None and not os.path.isfile(replay):
        raise ConfigError(f"rollout.replay={replay}: there is no such file; give one that rollout.record has written")


def _check_run_dir(run_dir: str | None) -> None:
    if not run_dir:
        raise ConfigError(
            "run_dir is not set: name a directory for the checkpoints and metrics of this run, such as "
            "run_dir=runs/first; an existing run is continued"
        )
    path = Path(run_dir).absolute()
    try:
        nearest = next(place for place in (path, *path.parents) if _exists(place))
        longest = os.pathconf(nearest if nearest.is_dir() else nearest.parent, "PC_NAME_MAX")
    except OSError as error:
        raise ConfigError(f"run_dir={run_dir}: {error.strerror}; choose another directory") from error
    for part in path.relative_to(nearest).parts:
        if len(os.fsencode(part)) > longest:
            raise ConfigError(f"run_dir={run_dir}: the name {part[:20]}... has more than {longest} bytes; shorten it")
    if not nearest.is_dir():
        raise ConfigError(f"run_dir={run_dir}: expected a directory, but {nearest} is a file; choose another name")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise ConfigError(f"run_dir={run_dir}: {nearest} may not be written by this user; choose another directory")


def _exists(path: Path) -> bool:
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def check_ranks(config: Config, world_size: int) -> None:
    """Raise `ConfigError` where the parallel sizes or the batch do not fit ``world_size`` ranks, for any model.

    The parallel sizes must divide the number of ranks, and the batch needs at least one problem per replica.
    """
    p = config.parallel
    tp, pp, cp = p.tensor_model_parallel_size, p.pipeline_model_parallel_size, p.context_parallel_size
    ep, etp = p.expert_model_parallel_size, p.expert_tensor_parallel_size or tp
    model_size = tp * pp * cp
    made_for = config.cluster.num_gpus
    require(
        made_for is None or made_for == world_size,
        f"cluster.num_gpus is {made_for}, but the launch has {world_size} rank{'s' * (world_size > 1)}: launch "
        f"{made_for}, or set cluster.num_gpus={world_size} and look at the plan of dry_run=true",
    )
    require(
        world_size % model_size == 0,
        f"the world size {world_size} must be a multiple of TP x PP x CP = {tp} x {pp} x {cp} = {model_size}",
    )
    require(
        world_size % (etp * pp * ep) == 0,
        f"the world size {world_size} must be a multiple of ETP x EP x PP = {etp} x {ep} x {pp} = {etp * ep * pp}",
    )
    dp = world_size // model_size
    require(
        config.data.global_batch_size >= dp,
        f"data.global_batch_size ({config.data.global_batch_size}) must be at least the number of "
        f"data-parallel ranks ({dp})",
    )


def check_world(config: Config, world_size: int, *, teaches_by_experts: bool = False) -> None:
    """Raise `ConfigError` where the parallel sizes, the model or the batch do not fit ``world_size`` ranks.

    ``teaches_by_experts``: whether a teacher of another architecture is a mixture of experts.
    """
    check_ranks(config, world_size)
    p, m = config.parallel, config.model
    ep = p.expert_model_parallel_size
    require(
        ep == 1 or m.num_moe_experts is not None or m.provider is not None or teaches_by_experts,
        f"parallel.expert_model_parallel_size={ep} needs a mixture of experts (model.num_moe_experts)",
    )
    if m.provider is None:
        check_model_divides(m, p)


def check_model_divides(model: ModelConfig, parallel: ParallelConfig) -> None:
    """Raise `ConfigError` where the parallel sizes do not divide the sizes of the model."""
    p, m, ep = parallel, model, parallel.expert_model_parallel_size
    tp, pp = p.tensor_model_parallel_size, p.pipeline_model_parallel_size
    ffn = m.ffn_hidden_size or 4 * m.hidden_size
    for name, size in [
        ("model.hidden_size", m.hidden_size),
        ("model.num_attention_heads", m.num_attention_heads),
        ("model.num_query_groups", m.num_query_groups or m.num_attention_heads),
        ("model.ffn_hidden_size", ffn),
    ]:
        require(size % tp == 0, f"{name} ({size}) must be a multiple of tensor_model_parallel_size ({tp})")
    chunks = pp * (p.virtual_pipeline_model_parallel_size or 1)
    uneven = {"num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage"}
    if not uneven & set(m.transformer) and "pipeline_model_parallel_layout" not in m.transformer:
        require(
            m.num_layers % chunks == 0,
            f"model.num_layers ({m.num_layers}) must be a multiple of PP x VPP = {chunks}, "
            "or give model.transformer.num_layers_in_first_pipeline_stage / ..._last_...",
        )
    if m.num_moe_experts is not None:
        require(
            m.num_moe_experts % ep == 0,
            f"model.num_moe_experts ({m.num_moe_experts}) must be a multiple of EP ({ep})",
        )
        etp = p.expert_tensor_parallel_size or tp
        expert_ffn = m.moe_ffn_hidden_size or ffn
        require(
            expert_ffn % etp == 0,
            f"model.moe_ffn_hidden_size ({expert_ffn}) must be a multiple of the tensor parallelism "
            f"inside an expert ({etp}): set parallel.expert_tensor_parallel_size",
        )
        require(
            tp == 1 or p.sequence_parallel,
            "a mixture of experts with tensor parallelism needs parallel.sequence_parallel=true",
        )


def longest_context(config: Config) -> int:
    """Return the largest length of prompt and response, in tokens, for the model, the data and a packed sequence.

    Raises: `ConfigError` if ``data.max_length`` exceeds the model or a packed sequence.
    """
    p = config.parallel
    multiple = p.tensor_model_parallel_size * (2 * p.context_parallel_size if p.context_parallel_size > 1 else 1)
    longest = config.schedule.max_tokens // multiple * multiple
    if longest < 1:
        raise ConfigError(f"schedule.max_tokens ({config.schedule.max_tokens}) must be at least {multiple}")
    wanted = config.data.max_length
    if wanted is not None and wanted > longest:
        raise ConfigError(
            f"data.max_length ({wanted}) exceeds the longest packed sequence ({longest}); raise schedule.max_tokens"
        )
    if wanted is not None and config.model.provider is None and wanted > config.model.max_position_embeddings:
        raise ConfigError(
            f"data.max_length ({wanted}) exceeds model.max_position_embeddings ({config.model.max_position_embeddings})"
        )
    limit = wanted if wanted is not None else config.model.max_position_embeddings
    return min(limit, longest)
