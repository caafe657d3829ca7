# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The two halves of an optimizer step are Megatron's whole one, to the last bit, with each piece done once."""

from __future__ import annotations

from typing import Any

import models
import pytest
import torch
from models import parallel

from megatron_selfdistill.compat import repairs  # noqa: F401  isort: skip  (must come before megatron.core)
import megatron.core.optimizer.optimizer as megatrons

from megatron_selfdistill.config import OptimizerConfig, ParallelConfig
from megatron_selfdistill.model.build import build_optimizer, unwrapped, wrap_for_training
from megatron_selfdistill.model.optimizer_step import apply_gradients, gradient_norm


def stepped(kind: str, cuts: ParallelConfig, config: OptimizerConfig, halves: bool) -> dict[str, Any]:
    """Parameters after three steps with random gradients, and how often norms were taken and gradients prepared."""
    chunks, _ = models.build(models.model_config(kind), cuts, optimizer=config)
    student = wrap_for_training(chunks, config)
    optimizer, _ = build_optimizer(student, config, 10)
    calls = {"norms_taken": 0, "preparations": 0}
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    with pytest.MonkeyPatch.context() as patch:

        def counted(key: str, original: Any) -> Any:
            def call(*args: Any, **kwargs: Any) -> Any:
                calls[key] += 1
                return original(*args, **kwargs)

            return call

        patch.setattr(megatrons, "get_grad_norm_fp32", counted("norms_taken", megatrons.get_grad_norm_fp32))
        for part in parts:
            patch.setattr(part, "prepare_grads", counted("preparations", part.prepare_grads))
        norms = []
        for step in range(3):
            generator = torch.Generator().manual_seed(step)
            for chunk in student:
                for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers):
                    values = torch.randn(buffer.grad_data.shape, generator=generator)
                    buffer.grad_data.copy_(values * 10.0 ** (step - 1))
            if halves:
                norms.append(gradient_norm(optimizer))
                apply_gradients(optimizer, norms[-1])
            else:
                norms.append(optimizer.step()[1])
    parameters = {f"{i}.{n}": p.clone() for i, c in enumerate(student) for n, p in unwrapped(c).named_parameters()}
    return {"parameters": parameters, "norms": norms, "parts": len(parts), **calls}


CASES = {
    "fp32": ("gqa", parallel(), OptimizerConfig(precision="fp32", use_distributed_optimizer=False), 1),
    "bf16, distributed": ("gqa", parallel(), OptimizerConfig(precision="bf16", use_distributed_optimizer=True), 2),
    "sgd": (
        "tied",
        parallel(tp=2),
        OptimizerConfig(optimizer="sgd", precision="fp32", lr=0.1, use_distributed_optimizer=False),
        2,
    ),
    "experts": ("moe", parallel(ep=2), OptimizerConfig(precision="bf16", use_distributed_optimizer=True), 2),
    "no clipping": (
        "gqa",
        parallel(),
        OptimizerConfig(precision="fp32", clip_grad=0.0, use_distributed_optimizer=False),
        1,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_both_halves_together_are_megatrons_step_to_the_last_bit(ranks, name):
    kind, cuts, config, world_size = CASES[name]
    whole = ranks.run(stepped, kind, cuts, config, False, world_size=world_size)
    halves = ranks.run(stepped, kind, cuts, config, True, world_size=world_size)
    for one, other in zip(whole, halves, strict=True):
        assert one["norms"] == other["norms"] and other["norms"][2] > 1
        assert one["parameters"].keys() == other["parameters"].keys()
        for key, value in one["parameters"].items():
            assert torch.equal(value, other["parameters"][key]), key
        assert other["preparations"] == 3 * other["parts"] and other["norms_taken"] <= 3 * other["parts"]


def test_experts_have_an_optimizer_of_their_own_which_the_two_halves_reach(ranks):
    kind, cuts, config, world_size = CASES["experts"]
    for found in ranks.run(stepped, kind, cuts, config, True, world_size=world_size):
        assert found["parts"] == 2
