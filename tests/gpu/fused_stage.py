# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Stage: the fused output layer on the device, values and gradients against float64 through the definition of the loss.

python -m tests.gpu.fused_stage
"""

from __future__ import annotations

import itertools
import math
import sys
from functools import partial

import fused_layer
import torch
from fused_layer import DIVERGENCES, TARGETS, VOCAB_SIZE, WIDTH, Example, relative

from megatron_selfdistill.choices import FUSED_MODES
from megatron_selfdistill.loss import Divergence, Target
from tests.gpu.results import Outcome, all_held, largest

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FLOAT32_ERROR = 2 * WIDTH * 2.0**-24 * WIDTH * 2 / math.pi
"""Twice the largest error of a logit: that of `WIDTH` products of normal numbers, whose mean size is 2 / pi.  The other
half is for the exponentials of a GPU, whose error is a few units of the last place."""
BF16_RATIO = 1.5
"""The error of the fused layer to that of the logits in full, in bf16: both round the same logits."""
NUM_TOKENS_BF16, CHUNK_BF16 = 200, 64


def main() -> int:
    return all_held({f"fused {mode} against float64": partial(compared, mode) for mode in FUSED_MODES})


def compared(mode: str) -> Outcome:
    """Compare every target and divergence in float32 with float64, and bf16 with the logits in full."""
    errors: dict[str, dict[str, float]] = {"loss, nats": {}, "dgrad, relative": {}, "wgrad, relative": {}}
    for tied, rule, kind in itertools.product((False, True), TARGETS, DIVERGENCES):
        example, case = Example(tied).to(DEVICE), f"{rule}, {kind}, {'tied' if tied else 'untied'}"
        loss, dgrad, wgrad = fused_layer.reference(example, TARGETS[rule], DIVERGENCES[kind])
        stats, *gradients = fused_layer.fused(example, TARGETS[rule], DIVERGENCES[kind], mode)
        error = (stats.loss.double() - loss).abs() / loss.abs().clamp(min=1)
        errors["loss, nats"][case] = float(error.max())
        for name, got, expected in zip(list(errors)[1:], with_valid_rows(*gradients), (dgrad, wgrad), strict=True):
            errors[name][case] = relative(got, expected)
    figures = [largest(f"float32: {name}", values, FLOAT32_ERROR) for name, values in errors.items()]
    return Outcome((*figures, largest("bf16: error to that of the logits in full", bf16_ratios(mode), BF16_RATIO)))


def bf16_ratios(mode: str) -> dict[str, float]:
    """Return the errors of the gradients in bf16, divided by those of the loss of logits in full."""
    example = Example(False, torch.bfloat16, num_tokens=NUM_TOKENS_BF16).to(DEVICE)
    _, *expected = fused_layer.reference(example, Target(anchor="student"), Divergence())
    _, *whole = fused_layer.materialised(example, Target(anchor="student"), Divergence())
    _, *fused = fused_layer.fused(example, Target(anchor="student"), Divergence(), mode, CHUNK_BF16)
    errors = [list(map(relative, with_valid_rows(*got), expected)) for got in (fused, whole)]
    return {name: ours / theirs for name, ours, theirs in zip(("dgrad", "wgrad"), *errors, strict=True)}


def with_valid_rows(
    dgrad: torch.Tensor | None, wgrad: torch.Tensor | None
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Return both gradients, the weight's without the rows that pad the vocabulary."""
    return dgrad, None if wgrad is None else wgrad[:VOCAB_SIZE]


if __name__ == "__main__":
    sys.exit(main())
