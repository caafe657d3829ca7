# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Checks of a configuration against the number of ranks of a launch, and of its lengths against its layout."""

from __future__ import annotations

import math

from megatron_selfdistill.config.schema.field_checks import require
from megatron_selfdistill.config.schema.model_config import ModelConfig
from megatron_selfdistill.config.schema.step_config import ParallelConfig
from megatron_selfdistill.config.schema.whole_config import Config


def check_files(config: Config) -> None:
    """Raise `ConfigError` if a path is not set or missing."""
    for key, value in (("data.path", config.data.path), ("data.tokenizer", config.data.tokenizer)):
        require(
            value is not None, f"{key} is not set: give problems, a checkpoint, a tokenizer, or see `make quickstart`"
        )
    evaluation, run_dir = config.evaluation, config.run_dir
    require(
        evaluation.path is not None or not (evaluation.every or evaluation.at_start),
        "evaluation.path is not set: set it, or evaluation.every=0 and evaluation.at_start=false",
    )
    require(
        bool(run_dir),
        "run_dir is not set: name a directory for the checkpoints and metrics of this run, such as "
        "run_dir=runs/first; an existing run is continued",
    )


def check_ranks(config: Config, world_size: int) -> None:
    """Raise `ConfigError` where the parallel sizes or the batch do not fit ``world_size`` ranks, for any model.

    The parallel sizes must divide the number of ranks, and the batch needs at least one problem per replica.
    """
    p, made_for = config.parallel, config.cluster.num_gpus
    tp, pp, cp = p.tensor_model_parallel_size, p.pipeline_model_parallel_size, p.context_parallel_size
    ep, etp = p.expert_model_parallel_size, p.expert_tensor_parallel_size or tp
    require(
        made_for is None or made_for == world_size,
        f"cluster.num_gpus is {made_for}, but the launch has {world_size} rank{'s' * (world_size > 1)}: launch "
        f"{made_for}, or set cluster.num_gpus={world_size} and look at the plan of dry_run=true",
    )
    for names, sizes in (("TP x PP x CP", (tp, pp, cp)), ("ETP x EP x PP", (etp, ep, pp))):
        require(
            world_size % math.prod(sizes) == 0,
            f"the world size {world_size} must be a multiple of {names} = {' x '.join(map(str, sizes))} = "
            f"{math.prod(sizes)}",
        )
    dp = world_size // (tp * pp * cp)
    require(
        config.data.global_batch_size >= dp,
        f"data.global_batch_size ({config.data.global_batch_size}) must be at least the number of data-parallel ranks "
        f"({dp})",
    )


def check_world(config: Config, world_size: int, *, teaches_by_experts: bool = False) -> None:
    """Raise `ConfigError` where the parallel sizes, the model or the batch do not fit ``world_size`` ranks.

    ``teaches_by_experts``: whether a teacher of another architecture is a mixture of experts.
    """
    check_ranks(config, world_size)
    ep, model = config.parallel.expert_model_parallel_size, config.model
    require(
        ep == 1 or model.num_moe_experts is not None or model.provider is not None or teaches_by_experts,
        f"parallel.expert_model_parallel_size={ep} needs a mixture of experts (model.num_moe_experts)",
    )
    if model.provider is None:
        check_model_divides(model, config.parallel)


def check_model_divides(model: ModelConfig, parallel: ParallelConfig) -> None:
    """Raise `ConfigError` where the parallel sizes do not divide the sizes of the model."""
    tp, ep = parallel.tensor_model_parallel_size, parallel.expert_model_parallel_size
    chunks = parallel.pipeline_model_parallel_size * (parallel.virtual_pipeline_model_parallel_size or 1)
    ffn = model.ffn_hidden_size or 4 * model.hidden_size
    sizes = [
        ("hidden_size", model.hidden_size, "TP", tp),
        ("num_attention_heads", model.num_attention_heads, "TP", tp),
        ("num_query_groups", model.num_query_groups or model.num_attention_heads, "TP", tp),
        ("ffn_hidden_size", ffn, "TP", tp),
    ]
    own_split = {"num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage"}
    if not (own_split | {"pipeline_model_parallel_layout"}) & set(model.transformer):
        sizes.append(("num_layers", model.num_layers, "PP x VPP", chunks))
    if model.num_moe_experts is not None:
        etp = parallel.expert_tensor_parallel_size or tp
        sizes.append(("num_moe_experts", model.num_moe_experts, "EP", ep))
        sizes.append(("moe_ffn_hidden_size", model.moe_ffn_hidden_size or ffn, "ETP", etp))
    for name, size, axis, ranks in sizes:
        require(size % ranks == 0, f"model.{name} ({size}) must be a multiple of {axis} ({ranks})")


def longest_context(config: Config) -> int:
    """Return the largest length of prompt and response, in tokens, for the model, the data and a packed sequence.

    Raises: `ConfigError` if ``data.max_length`` exceeds the model or a packed sequence.
    """
    p, model, wanted = config.parallel, config.model, config.data.max_length
    multiple = p.tensor_model_parallel_size * (2 * p.context_parallel_size if p.context_parallel_size > 1 else 1)
    longest = config.schedule.max_tokens // multiple * multiple
    require(longest >= 1, f"schedule.max_tokens ({config.schedule.max_tokens}) must be at least {multiple}")
    require(
        wanted is None or wanted <= longest,
        f"data.max_length ({wanted}) exceeds the longest packed sequence ({longest}); raise schedule.max_tokens",
    )
    require(
        wanted is None or model.provider is not None or wanted <= model.max_position_embeddings,
        f"data.max_length ({wanted}) exceeds model.max_position_embeddings ({model.max_position_embeddings})",
    )
    return min(model.max_position_embeddings if wanted is None else wanted, longest)
