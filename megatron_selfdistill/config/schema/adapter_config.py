# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The section ``adapter`` of the schema: low-rank adapters on frozen weights."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

from megatron_selfdistill.config.schema.field_checks import Part, require
from megatron_selfdistill.config.schema.ranges import (
    DifferentEntries,
    FilePath,
    OneOf,
    PositiveFloat,
    Seed,
    at_least,
    at_most,
)
from megatron_selfdistill.config.schema.rollout_config import RolloutConfig


def require_engine(adapter: AdapterConfig, rollout: RolloutConfig) -> None:
    """Raise `ConfigError` if the engine of ``rollout`` does not take ``adapter``."""
    latent = [name for name in adapter.layers if name in LATENT_LAYERS]
    require(
        rollout.engine == "megatron" or not latent,
        f"adapter.layers={adapter.layers} with rollout.engine={rollout.engine}: this engine joins the projections of "
        f"latent attention, without adapters: remove {', '.join(latent)}, or set rollout.engine=megatron",
    )


LINEAR_LAYERS = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
LATENT_LAYERS = ("linear_q_proj", "linear_q_down_proj", "linear_q_up_proj", "linear_kv_down_proj", "linear_kv_up_proj")
"""The linear layers of latent attention, which other attention does not have."""
AdaptedLayer = Annotated[str, OneOf((*LINEAR_LAYERS, *LATENT_LAYERS))]


@dataclass(frozen=True)
class AdapterConfig(Part, section="adapter", free="base", fixed="rank layers seed"):
    """Low-rank adapters (LoRA): small trained factors beside the frozen weights of linear layers."""

    frees: ClassVar = {"adapter.rank": "checkpoint.load"}  # the digest of the base decides, wherever it is
    rank: Annotated[int, at_least(0), at_most(2**16)] = 0
    """Rank r of the adapters; 0 trains all weights and has no adapters."""
    alpha: PositiveFloat = 32.0
    """Numerator of the scale of the adapters, which is alpha / rank."""
    rank_stabilised: bool = False
    """Whether the scale is alpha / sqrt(rank) (rsLoRA), which keeps large ranks learning."""
    layers: Annotated[list[AdaptedLayer], DifferentEntries()] = field(default_factory=lambda: list(LINEAR_LAYERS))
    """Names of the linear layers with adapters, as Megatron names them: linear_qkv, linear_proj, linear_fc1 and
    linear_fc2; with latent attention also linear_q_proj, linear_q_down_proj, linear_q_up_proj, linear_kv_down_proj and
    linear_kv_up_proj."""
    seed: Seed = 0
    """Seed of the random factor A; B begins at 0."""
    load: FilePath | None = None
    """Checkpoint of adapters on checkpoint.load at which a run begins, with the same rank, scale and layers; null
    begins at random A and B = 0."""
    base: FilePath | None = None
    """For commands that read a checkpoint of adapters: the checkpoint of the frozen weights below them, where it has
    moved; null takes the place that the adapters state.  A run names these weights with checkpoint.load."""

    def check(self, config: Any) -> None:
        """Raise `ConfigError` where the adapters would be wrong, or would be ignored."""
        if not self.rank:
            return
        require(bool(self.layers), "adapter.layers must name at least one layer, got none")
        require_engine(self, config.rollout)
        require(
            not (config.keeps_teacher and config.teacher.weights == "ema"),
            f"adapter.rank={self.rank} with teacher.weights=ema: the average of low-rank changes has full rank, and "
            "averages of the factors are no average of the weights: set teacher.weights=frozen or current",
        )
        require(
            self.load is None or config.checkpoint.load is not None,
            f"adapter.load={self.load} with checkpoint.load=null: these adapters belong to weights: set "
            "checkpoint.load to their base",
        )

    @property
    def scale(self) -> float:
        """The factor of the adapters' output."""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilised else self.rank)
