# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The bound for the logits of two implementations follows from how much the models amplify the rounding of weights."""

from __future__ import annotations

import copy

import hf_models
import pytest
import torch
from conditioning import CHANGE, ROUNDINGS, UNIT_ROUNDOFF

QUICK = ("qwen3", "qwen3_5")
ROUTED_OTHERWISE = "qwen3_next_unnormalised"
"""A model whose routers choose other experts after a change of the weights: its logits jump."""


@torch.no_grad()
@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=() if kind in QUICK else pytest.mark.full)
        for kind in hf_models.CONFIGS
        if kind != ROUTED_OTHERWISE
    ],
)
def test_three_roundings_of_the_weights_move_the_logits_by_at_most_the_bound(tmp_path, kind):
    model = hf_models.write(kind, tmp_path)
    changed, draw = copy.deepcopy(model), torch.Generator().manual_seed(1)
    for weight in changed.parameters():
        weight.mul_(1 + CHANGE / 4 * (2 * torch.randint(0, 2, weight.shape, generator=draw) - 1))
    logits = (hf_models.hf_logits(one, hf_models.SEQUENCES) for one in (model, changed))
    moved = (torch.sub(*logits)).abs().max().item() / (CHANGE / 4) * UNIT_ROUNDOFF
    assert hf_models.logits_bound(kind) / 10 < ROUNDINGS * moved < hf_models.logits_bound(kind)
