# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The factors of the adapters of a model: merged into its weights, and other ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import models
import torch

from megatron_selfdistill.adapters.low_rank_adapters import LowRankAdapter
from megatron_selfdistill.config.schema.adapter_config import AdapterConfig
from megatron_selfdistill.model.forward import unwrapped

ADAPTER = AdapterConfig(rank=3, alpha=0.3)
"""Adapters whose effect stays small beside the weights, since the factors of the tests are large."""


@torch.no_grad()
def merge(adapted: Sequence[Any], plain: Sequence[Any]) -> None:
    """Add the product of the factors of ``adapted`` to the weights of ``plain``, the same model without adapters."""
    for chunk, target in zip(adapted, plain, strict=True):
        weights = dict(unwrapped(target).named_parameters())
        for name, module in unwrapped(chunk).named_modules():
            if isinstance(module, LowRankAdapter):
                weight = weights[f"{name.removesuffix('_adapter')}.weight"]
                weight += (module.scale * module.b.double() @ module.a.double()).to(weight)


@torch.no_grad()
def other_factors(chunks: Sequence[Any], seed: int) -> None:
    """Set the factors of ``chunks`` to those of ``seed``, and the weights to those that they always are."""
    models.fill_from_names(chunks, seed)
    parameters = [p for chunk in chunks for name, p in chunk.named_parameters() if "_adapter." in name]
    factors = [p.detach().clone() for p in parameters]
    models.fill_from_names(chunks)
    for parameter, factor in zip(parameters, factors, strict=True):
        parameter.copy_(factor)
