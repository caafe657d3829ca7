# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The router losses of mixture-of-experts models in a step whose microbatches are not all the student's."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch

from megatron_selfdistill.model.build import unwrapped


@contextlib.contextmanager
def router_losses_per_weighted_microbatch(chunks: Sequence[torch.nn.Module], factor: float) -> Iterator[None]:
    """Raise the coefficients of router losses, so that each is the mean over the weighted student microbatches.

    Megatron divides router losses by all microbatches and data-parallel ranks.  Teacher microbatches have no router
    losses (no gradient), and weightless microbatches should have none.
    """
    configs = {id(c): c for c in (unwrapped(chunk).config for chunk in chunks)}.values()
    before = [(c, c.moe_aux_loss_coeff, c.moe_z_loss_coeff) for c in configs]
    for config, aux, z in before:
        config.moe_aux_loss_coeff = [a * factor for a in aux] if isinstance(aux, list) else aux and aux * factor
        config.moe_z_loss_coeff = z and z * factor
    try:
        yield
    finally:
        for config, aux, z in before:
            config.moe_aux_loss_coeff, config.moe_z_loss_coeff = aux, z
