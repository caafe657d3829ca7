# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Refuse FP8 layers that the user has not allowed, and pad sequences to the multiples that FP8 needs.

FP8 has never run on hardware with this program.  Only layers of Transformer Engine compute in FP8.  The output layer is
Megatron Core's own and stays in bf16, so logits and loss are computed as in other runs.
"""

from __future__ import annotations

from megatron_selfdistill.compat import repairs  # noqa: F401  isort: skip  (must come before megatron.core)
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_selfdistill.errors import ConfigError

_ROWS = {"delayed": 16, "tensorwise": 16, "mxfp8": 32, "blockwise": 128, "custom": 128}
"""The number of tokens, by recipe, of which a rank's share must be a multiple.

Both layouts of an operand, [tokens, h] and its transpose, are cut into blocks of this size, and matrix products need
multiples of 16.
"""


def refuse_untested_precision(config: TransformerConfig, *, allow_fp8: bool, transformer_engine: bool) -> None:
    """Raise `ConfigError` for layers in FP8 or FP4 that the user has not allowed, or that cannot be trained.

    ``allow_fp8``: ``model.allow_untested_fp8``.  ``transformer_engine``: whether the layers are Transformer Engine's.
    """
    faults = [
        (
            bool(config.fp4) or config.use_kitchen,
            "fp4 and kitchen's quantisation have never been tried with self-distillation: unset model.transformer.fp4 "
            "and model.transformer.use_kitchen",
        ),
        (
            bool(config.fp8) and not allow_fp8,
            f"fp8={config.fp8} has never been tried on hardware with self-distillation: set "
            "model.allow_untested_fp8=true to try it, or do not set model.transformer.fp8",
        ),
        (
            bool(config.fp8) and not transformer_engine,
            f"fp8={config.fp8} needs a GPU and Transformer Engine's layers, but this run has Megatron's local layers: "
            "do not set model.transformer.fp8",
        ),
        (
            config.fp8_param,
            "fp8_param keeps the parameters in fp8, which teachers, checkpoints and samplers cannot read: set "
            "model.transformer.fp8_param=false, which keeps the matrix products in fp8",
        ),
    ]
    for found, message in faults:
        if found:
            raise ConfigError(message)


def token_multiple(config: TransformerConfig) -> int | None:
    """Return the number of tokens of which the length of a packed sequence must be a multiple; None without FP8.

    With FP8 each rank's share of a sequence, over TP and CP, is a multiple of the block size of the recipe.
    """
    if not config.fp8:
        return None
    block = _ROWS[str(getattr(config.fp8_recipe, "value", config.fp8_recipe))]
    tp, cp = int(config.tensor_model_parallel_size), int(config.context_parallel_size)
    return block * tp * (2 * cp if cp > 1 else 1)
