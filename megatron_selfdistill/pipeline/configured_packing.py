# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The packing of a run: how its layers, its precision and its layout cut the contexts of a step."""

from __future__ import annotations

import math

from megatron_selfdistill.compat import repairs  # noqa: F401  isort: skip  (must come before megatron.core)
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_selfdistill.config import Config
from megatron_selfdistill.config.schema.data_config import contexts_per_sample, joins_turns
from megatron_selfdistill.config.world_checks import longest_context
from megatron_selfdistill.distributed.ranks import RankGrid
from megatron_selfdistill.pipeline.batch import Packing


def configured_packing(config: Config, grid: RankGrid, model: TransformerConfig, num_controls: int = 0) -> Packing:
    """Return the packing of the steps of a run."""
    return packing_of_model(
        model,
        max_tokens=config.schedule.max_tokens,
        pair_order=pair_order_of_all_steps(config, grid.dp_size, model, num_controls),
        with_teacher=config.has_teacher,
        with_reference=config.is_anchored,
        joins_turns=joins_turns(config),
        num_controls=num_controls,
        stored_tokens=stored_tokens(config, model, num_controls),
    )


def pair_order_of_all_steps(config: Config, dp_size: int, model: TransformerConfig, num_controls: int) -> str | None:
    """Return ``schedule.pair_order``, or for null teacher_first where the states of any step fit; None if some do not.

    With None each step chooses its order (`Packing.pair_order`), and those of the longest responses alternate.
    """
    all_fit = math.prod(most_responses(config, dp_size)) <= stored_tokens(config, model, num_controls)
    return config.schedule.pair_order or ("teacher_first" if all_fit else None)


def stored_tokens(config: Config, model: TransformerConfig, num_controls: int) -> float:
    """Return the most response tokens of a replica whose states fit ``schedule.teacher_store_gb``; inf in a pipeline.

    Paired with a teacher whose prompts are longer, the student leaves its microbatches partly empty.  So the teacher
    comes first, in a pipeline anyway, and else in the steps whose states fit: ``1 + K`` of it with its controls and one
    of a reference per response token.
    """
    if model.pipeline_model_parallel_size > 1:
        return math.inf
    values = model.hidden_size * (1 + num_controls + config.is_anchored)
    cuts = model.context_parallel_size * model.tensor_model_parallel_size
    num_bytes: int = values * model.params_dtype.itemsize // cuts
    return config.schedule.teacher_store_gb * 2**30 / num_bytes


def most_responses(config: Config, dp_size: int) -> tuple[int, int]:
    """Return the most contexts that a replica trains in a step, and the most response tokens of each.

    A response that is not sampled may fill its context, and is the only one to its prompt.
    Raises: `ConfigError` as `longest_context`.
    """
    num_samples, longest = config.rollout.num_samples, config.rollout.max_new_tokens
    if not config.samples_responses:
        num_samples, longest = 1, longest_context(config)
    return math.ceil(config.data.global_batch_size / dp_size) * num_samples * contexts_per_sample(config), longest


def packing_of_model(
    model: TransformerConfig,
    *,
    max_tokens: int,
    pair_order: str | None,
    with_teacher: bool,
    with_reference: bool = False,
    joins_turns: bool = False,
    num_controls: int = 0,
    stored_tokens: float = math.inf,
) -> Packing:
    """Return the packing for the layers of a model.

    ``attention_tokens`` is 12 h: a layer of width h takes 24 h^2 FLOPs per token, and its causal attention 2 h L
    per token of a context of L tokens (Narayanan et al. 2021, arXiv 2104.04473, appendix, where no mask is causal).
    """
    return Packing(
        max_tokens,
        pair_order,
        with_teacher,
        with_reference,
        seq_multiple=token_multiple(model),
        attention_tokens=12 * model.hidden_size,
        joins_turns=joins_turns,
        num_controls=num_controls,
        stored_tokens=stored_tokens,
    )


_ROWS = {"delayed": 16, "tensorwise": 16, "mxfp8": 32, "blockwise": 128, "custom": 128}
"""The number of tokens, by recipe, of which a rank's share must be a multiple.

Both layouts of an operand, [tokens, h] and its transpose, are cut into blocks of this size, and matrix products need
multiples of 16.
"""


def token_multiple(config: TransformerConfig) -> int | None:
    """Return the number of tokens of which the length of a packed sequence must be a multiple; None without FP8.

    With FP8 each rank's share of a sequence, over TP and CP, is a multiple of the block size of the recipe.
    """
    if not config.fp8:
        return None
    block = _ROWS[str(getattr(config.fp8_recipe, "value", config.fp8_recipe))]
    tp, cp = int(config.tensor_model_parallel_size), int(config.context_parallel_size)
    return block * tp * (2 * cp if cp > 1 else 1)
