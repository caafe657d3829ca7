# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Test the refusal of FP8, the token counts of its layers, and the teacher's quantised weights."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any

import models
import pytest
import torch
import torch.nn.functional as F
from models import parallel
from torch import Tensor

from megatron_selfdistill.compat import repairs  # noqa: F401  isort: skip  (must come before megatron.core)
import megatron.core.models.common.embeddings.rope_utils as rope_utils
import megatron.core.transformer.transformer_config as megatron_config
from megatron.core.tensor_parallel import ColumnParallelLinear

from megatron_selfdistill.compat.older_megatron import submodules_of, version
from megatron_selfdistill.config import ModelConfig, OptimizerConfig, ParallelConfig, ScheduleConfig
from megatron_selfdistill.errors import ConfigError
from megatron_selfdistill.model import architecture, build
from megatron_selfdistill.model.architecture import transformer_config
from megatron_selfdistill.model.build import build_chunks, build_optimizer, wrap_for_training
from megatron_selfdistill.model.forward import unwrapped
from megatron_selfdistill.model.teacher_weights import Teacher
from megatron_selfdistill.pipeline.configured_packing import token_multiple

UNCUT = ParallelConfig()
MODEL = ModelConfig()
RECIPES = ("delayed", "tensorwise", "mxfp8", "blockwise")


def configured(model: ModelConfig, cuts: ParallelConfig = UNCUT, te: bool = True, **transformer: Any):
    """Return the configuration on a GPU, with or without Transformer Engine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(architecture.cpu, "ON_CPU", False)
        patch.setattr(architecture, "uses_transformer_engine", lambda: te)
        patch.setattr(rope_utils, "fused_apply_rotary_pos_emb", object())
        patch.setattr(megatron_config, "is_te_min_version", lambda *_, **__: True)
        model = dataclasses.replace(model, transformer=model.transformer | transformer)
        return transformer_config(model, cuts, OptimizerConfig(), ScheduleConfig())


REFUSED = [
    (False, {"fp8": "hybrid"}, "needs a GPU and Transformer Engine's layers"),
    (True, {"fp8": "hybrid", "fp8_param": True}, "fp8_param"),
    (True, {"fp4": "e2m1"}, "fp4"),
]
if version() >= (0, 18):  # which has this field
    REFUSED.append((True, {"fp8": "e4m3", "fp8_recipe": "mxfp8", "fp8_output_proj": True}, "fp8_output_proj"))


def test_what_cannot_be_trained_in_fp8_is_refused_although_asked_for():
    for te, transformer, named in REFUSED:
        with pytest.raises(ConfigError, match=named) as caught:
            configured(MODEL, te=te, **transformer)
        assert "\n" not in str(caught.value)


# -- tokens per rank -----


CUTS = [parallel(), parallel(tp=2), parallel(tp=4, sp=True), parallel(cp=2), parallel(tp=2, cp=4, sp=True)]


def test_every_ranks_tokens_divide_by_what_the_recipe_takes():
    """Transformer Engine asserts multiples of 8, and blocks of 32 (mxfp8) or 128 (blockwise) to gather sequences."""
    for cuts, recipe in itertools.product(CUTS, RECIPES):
        tokens = token_multiple(configured(MODEL, cuts, fp8="hybrid", fp8_recipe=recipe)) / cuts.context_parallel_size
        if cuts.sequence_parallel:
            tokens /= cuts.tensor_model_parallel_size
        assert tokens % {"mxfp8": 32, "blockwise": 128}.get(recipe, 16) == 0, (cuts, recipe)
    assert token_multiple(configured(ModelConfig())) is None, "without fp8 any length will do"


# -- the teacher's weights -----


class Quantised(ColumnParallelLinear):
    """A layer that keeps a copy of its weight from its first forward pass, as Transformer Engine's FP8 layers do."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.is_first_microbatch = True
        self.copy: Tensor | None = None

    def forward(self, x: Tensor, weight: Tensor | None = None, **_: Any) -> tuple[Tensor, None]:
        if self.is_first_microbatch or self.copy is None:
            self.copy = self.weight.detach().clone()
        self.is_first_microbatch = False
        return F.linear(x, self.copy), None


def quantised_spec(config: Any, vp_stage: int | None = None, **_: Any) -> Any:
    block = architecture.layer_spec(config, vp_stage, transformer_engine=False)
    for spec in block.layer_specs:
        submodules_of(spec.submodules.mlp).linear_fc1 = Quantised
    return block


def stale_layers(weights: str, change: str) -> int:
    """Return the number of the teacher's layers that compute with outdated weights after ``change``."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "layer_spec", quantised_spec)
        settings = OptimizerConfig(precision="fp32", lr=1e-2, use_distributed_optimizer=False)
        chunks, grid = models.build(models.model_config(), ParallelConfig(), optimizer=settings)
        config = unwrapped(chunks[0]).config
        config.fp8 = "hybrid"
        student = wrap_for_training(chunks, settings)
        optimizer, _ = build_optimizer(student, settings, 10)
        copy = functools.partial(build_chunks, models.model_config(), config, grid, models.VOCAB_SIZE)
        teacher = Teacher(weights, student, copy)
    layers = [m for m in unwrapped(teacher.chunks[0]).modules() if isinstance(m, Quantised)]

    def read() -> None:
        for layer in layers:
            layer(torch.zeros(2, 1, layer.weight.size(1)))

    read()
    if change == "update":
        for param in unwrapped(student[0]).parameters():
            param.main_grad.fill_(1.0)
        optimizer.step()
        teacher.update(optimizer)
    elif change == "load_state_dict":
        state = unwrapped(teacher.chunks[0]).state_dict()
        moved = {f"teacher.{n}": value + 1 if torch.is_tensor(value) else value for n, value in state.items()}
        teacher.load_state_dict({"teacher0": moved})
    else:
        models.fill_from_names(student, seed=3)
        teacher.copy_student()
    assert layers and not layers[0].copy.equal(layers[0].weight), "the teacher must have changed"
    read()
    return sum(not layer.copy.equal(layer.weight) for layer in layers)


def stale_after_each(cases: list[tuple[str, str]]) -> list[int]:
    return [stale_layers(*case) for case in cases]


def test_the_teachers_layers_quantise_anew_whatever_changes_its_weights(ranks):
    cases = [("ema", "update"), *itertools.product(["ema", "frozen"], ["load_state_dict", "copy_student"])]
    assert ranks.run(stale_after_each, cases, world_size=1) == [[0] * len(cases)]
