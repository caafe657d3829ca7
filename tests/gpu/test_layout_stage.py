# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The stages that compare training steps: a wrong gradient fails, and so does a rank that dies, alone."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from tests.gpu import cases, layout_stage
from tests.gpu.layout_rank import file_name

SHAPE = (4, 3)
GRADIENT = torch.arange(12.0).view(SHAPE) + 1


def write(directory: Path, name: str, gradient: torch.Tensor, loss: float = 0.5) -> None:
    grads = {"w@(0, 0)": ("w", SHAPE, (0, 0), 0, gradient)}
    torch.save((loss, grads, grads), directory / file_name(name, 0))


@pytest.mark.parametrize(
    ("factor", "loss", "passes"), [(1.0, 0.5, True), (1.001, 0.5, False), (2.0, 0.5, False), (1.0, 0.51, False)]
)
def test_a_gradient_or_a_loss_that_is_off_by_a_thousandth_fails(tmp_path, factor, loss, passes):
    write(tmp_path, "reference/one", GRADIENT)
    write(tmp_path, "other", factor * GRADIENT, loss)
    one = cases.ONE_RANK["grouped queries"]
    assert layout_stage.compared(one, "other", "one", tmp_path, {}).passed is passes


def test_ranks_that_died_are_an_error_of_their_case(tmp_path):
    outcome = layout_stage.compared(cases.ONE_RANK["MLA"], "MLA", "MLA", tmp_path, {"MLA": "failed: out of memory"})
    assert not outcome.passed and outcome.error == "failed: out of memory"


def test_every_case_is_compared_with_one_uncut_rank_in_float32():
    for group in cases.GROUPS.values():
        for one in group.values():
            reference = one.reference
            assert reference.parallel == type(reference.parallel)() and reference.optimizer.precision == "fp32"
            assert reference.fusion is None and not reference.optimizer.use_distributed_optimizer
            kept = ("kind", "model_changes", "divergence", "steps", "teacher")
            assert all(getattr(reference, name) == getattr(one.case, name) for name in kept)
    different = {dataclasses.replace(c.case, parallel=c.reference.parallel).kind for c in cases.ONE_RANK.values()}
    assert different == {"gqa", "tied", "moe"}
