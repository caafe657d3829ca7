# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The fused output layer on the device: values and gradients equal float64 through the definition of the loss."""

from __future__ import annotations

import itertools
import math

import fused_layer
import pytest
import torch
from fused_layer import DIVERGENCES, TARGETS, VOCAB_SIZE, WIDTH, Example, relative

from megatron_selfdistill.choices import FUSED_MODES
from megatron_selfdistill.loss import Divergence, Target

FLOAT32_ERROR = 2 * WIDTH * 2.0**-24 * WIDTH * 2 / math.pi
"""Twice the largest error of a logit: that of `WIDTH` products of normal numbers, whose mean size is 2 / pi.  The other
half is for the exponentials of a GPU, whose error is a few units of the last place."""
BF16_RATIO = 1.5
"""The error of the fused layer to that of the logits in full, in bf16: both round the same logits."""


@pytest.mark.smoke
@pytest.mark.parametrize("mode", FUSED_MODES)
def test_the_fused_layer_equals_float64_for_every_target_and_divergence(child, keeps, mode):
    for case, found in child(errors, mode).items():
        for name, error in found.items():
            keeps(f"{case}: {name}", error, FLOAT32_ERROR)


@pytest.mark.parametrize("mode", FUSED_MODES)
def test_in_bf16_the_fused_layer_is_as_near_to_float64_as_the_logits_in_full(child, keeps, mode):
    for name, ratio in child(bf16_ratios, mode).items():
        keeps(name, ratio, BF16_RATIO)


def on_device(example: Example) -> Example:
    return example.to(torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def errors(rank: int, mode: str) -> dict[str, dict[str, float]]:
    """Return the errors of the loss in nats, and of both gradients relative to their norms, of every case."""
    found = {}
    for tied, rule, kind in itertools.product((False, True), TARGETS, DIVERGENCES):
        example = on_device(Example(tied))
        loss, *expected = fused_layer.reference(example, TARGETS[rule], DIVERGENCES[kind])
        stats, *gradients = fused_layer.fused(example, TARGETS[rule], DIVERGENCES[kind], mode)
        off = ((stats.loss.double() - loss).abs() / loss.abs().clamp(min=1)).max()
        dgrad, wgrad = map(relative, with_valid_rows(*gradients), expected)
        case = f"{rule}, {kind}, {'tied' if tied else 'untied'}"
        found[case] = {"loss": float(off), "dgrad": dgrad, "wgrad": wgrad}
    return found


def bf16_ratios(rank: int, mode: str) -> dict[str, float]:
    """Return the errors of the gradients in bf16, divided by those of the loss of logits in full."""
    example = on_device(Example(False, torch.bfloat16, num_tokens=200))
    arguments = example, Target(anchor="student"), Divergence()
    _, *expected = fused_layer.reference(*arguments)
    _, *whole = fused_layer.materialised(*arguments)
    _, *fused = fused_layer.fused(*arguments, mode, 64)
    ours, theirs = (map(relative, with_valid_rows(*got), expected) for got in (fused, whole))
    return {name: own / other for name, own, other in zip(("dgrad", "wgrad"), ours, theirs, strict=True)}


def with_valid_rows(dgrad: torch.Tensor, wgrad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return both gradients, the weight's without the rows that pad the vocabulary."""
    return dgrad, wgrad[:VOCAB_SIZE]
