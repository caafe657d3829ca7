# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""A lab's own model trains as the built-in one does, and its optimizer makes the steps of Megatron's own."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import Any
from unittest import mock

import models
import pytest
import torch
from layouts import Case, Outcomes
from models import parallel
from tiers import combinations

from megatron_selfdistill.compat import repairs  # noqa: F401  isort: skip  (must come before megatron.core)
import megatron.core.optimizer.optimizer as megatrons

from megatron_selfdistill.config import OptimizerConfig, OptimizerConstants, ParallelConfig
from megatron_selfdistill.config.schema.step_config import LearningRateDecay
from megatron_selfdistill.errors import ConfigError
from megatron_selfdistill.learner import apply_gradients, gradient_norm
from megatron_selfdistill.model import build
from megatron_selfdistill.model.build import build_optimizer, wrap_for_training
from megatron_selfdistill.model.forward import unwrapped


@pytest.fixture(autouse=True)
def lab_models_on_the_path(monkeypatch):
    """Put the directory of the models on PYTHONPATH, as a lab would; the ranks take pytest's own path over."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


PP2_VPP2, TP2_SP = parallel(pp=2, vpp=2), parallel(tp=2, sp=True)
PROVIDERS = {
    "one rank": (parallel(), ["model_provider", "without_vp_stage"]),
    "PP2xVPP2": (PP2_VPP2, ["model_provider", "with_keywords"]),
    "TP2+SP": (TP2_SP, ["without_vp_stage"]),
}


@pytest.mark.full
@combinations(layout=list(PROVIDERS))
def test_a_providers_model_has_the_built_in_models_gradient(ranks, layout):
    cuts, providers = PROVIDERS[layout]
    case = Case(parallel=cuts)
    provided = [dataclasses.replace(case, model_changes={"provider": f"lab_models.{name}"}) for name in providers]
    (built_in, expected, _), *others = Outcomes(ranks).of([case, *provided], 1 if layout == "one rank" else 2)
    assert built_in.loss > 0.05
    for outcome, got, _ in others:
        assert outcome.loss == built_in.loss
        assert got.keys() == expected.keys()
        assert all(got[key].equal(gradient) for key, gradient in expected.items())


def refusals(providers: list[str], cuts: ParallelConfig) -> list[str]:
    """Return the messages with which this rank refuses providers."""
    messages = []
    for provider in providers:
        with pytest.raises(ConfigError) as caught:
            models.build(models.model_config("shallow", provider=provider), cuts)
        messages.append(str(caught.value))
    return messages


REFUSED: dict[str, tuple[ParallelConfig, dict[str, str]]] = {
    "one rank": (
        parallel(),
        {
            "lab_models.returns_a_list": "got list",
            "lab_models.of_another_context_parallel_size": "parallel.context_parallel_size is 1",
            "lab_models.of_another_expert_parallel_size": "parallel.expert_model_parallel_size is 1",
            "lab_models.that_gathers_its_logits": "parallel_output=True",
            "lab_models.that_caps_its_logits": "SoftCapped has its own _postprocess",
            "lab_models.with_scaled_logits": "use_mup",
            "lab_models.with_megatrons_gated_delta_net": "those of Megatron Core",
            "lab_models.with_dropout": "dropout",
            "no_such_lab.provider": "No module named 'no_such_lab'",
            "lab_models.not_a_function": "which is a int",
        },
    ),
    "TP2+SP": (TP2_SP, {"lab_models.without_sequence_parallelism": "parallel.sequence_parallel is True"}),
    "PP2xVPP2": (PP2_VPP2, {"lab_models.without_vp_stage": "vp_stage"}),
}
"""Layout -> providers, and what their refusals name."""


@pytest.mark.parametrize("layout", REFUSED)
def test_a_provider_that_cannot_be_used_is_refused_in_one_sentence(ranks, layout):
    cuts, expected = REFUSED[layout]
    for messages in ranks.run(refusals, list(expected), cuts, world_size=1 if layout == "one rank" else 2):
        for (provider, named), message in zip(expected.items(), messages, strict=True):
            assert named in message and "\n" not in message, provider


# -- chunks and optimizer -----------------------------------------------------------------------------------


def dtypes(precision: str) -> list[Any]:
    """Return the types of a parameter, its gradient and what the optimizer updates; another precision is refused."""
    optimizer = OptimizerConfig(precision=precision, use_distributed_optimizer=False)
    chunks, _ = models.build(models.model_config("shallow"), parallel(), optimizer=optimizer)
    other = "fp32" if precision == "bf16" else "bf16"
    with pytest.raises(ConfigError, match=f"built in {precision}, expected optimizer.precision={other}"):
        wrap_for_training(chunks, OptimizerConfig(precision=other))
    student = wrap_for_training(chunks, optimizer)
    megatron_optimizer, _ = build_optimizer(student, optimizer, 10)
    parameter = next(student[0].parameters())
    updated = {p.dtype for group in megatron_optimizer.param_groups for p in group["params"]}
    return [parameter.dtype, parameter.main_grad.dtype, updated]


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_gradients_and_main_parameters_are_float32_and_the_precision_is_that_of_the_optimizer(ranks, precision):
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    assert ranks.run(dtypes, precision, world_size=1) == [[dtype, torch.float32, {torch.float32}]]


def learning_rates(num_steps: int, optimizer: OptimizerConfig) -> list[float]:
    chunks, _ = models.build(models.model_config("gqa", num_layers=1), parallel(), optimizer=optimizer)
    megatron_optimizer, scheduler = build_optimizer(wrap_for_training(chunks, optimizer), optimizer, num_steps)
    rates = []
    for _ in range(num_steps):
        scheduler.step(1)
        rates.append(megatron_optimizer.param_groups[0]["lr"])
    return rates


def test_the_learning_rate_warms_up_and_decays_over_the_steps_of_the_run(ranks):
    rates = {"lr": 1.0, "min_lr": 0.2, "lr_warmup_steps": 2, "lr_decay": LearningRateDecay(style="linear")}
    optimizer = OptimizerConfig(precision="fp32", optimizer="sgd", use_distributed_optimizer=False, **rates)
    (found,) = ranks.run(learning_rates, 6, optimizer, world_size=1)
    assert found == pytest.approx([0.5, 1.0, 0.8, 0.6, 0.4, 0.2])


def test_every_setting_reaches_megatrons_optimizer(monkeypatch):
    seen: dict[str, Any] = {}
    monkeypatch.setattr(build, "get_megatron_optimizer", lambda config, *args, **kwargs: seen.update(vars(config)))
    monkeypatch.setattr(build, "OptimizerParamScheduler", lambda *args, **kwargs: None)
    constants = {"adam_beta1": 0.4, "adam_beta2": 0.5, "adam_eps": 0.006, "sgd_momentum": 0.7}
    settings = {"lr": 0.1, "min_lr": 0.02, "weight_decay": 0.3, "clip_grad": 0.8, "optimizer": "adam"}
    settings |= {"use_distributed_optimizer": True}
    optimizer = OptimizerConfig(constants=OptimizerConstants(**constants), **settings)
    build.build_optimizer([], optimizer, num_steps=3)
    assert {name: seen[name] for name in constants | settings} == constants | settings


def stepped(kind: str, cuts: ParallelConfig, config: OptimizerConfig, halves: bool) -> dict[str, Any]:
    """Return the parameters after three steps with random gradients, and how often norms and gradients were made."""
    chunks, _ = models.build(models.model_config(kind), cuts, optimizer=config)
    student = wrap_for_training(chunks, config)
    optimizer, _ = build_optimizer(student, config, 10)
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    taking = mock.patch.object(megatrons, "get_grad_norm_fp32", wraps=megatrons.get_grad_norm_fp32)
    preparing = [mock.patch.object(part, "prepare_grads", wraps=part.prepare_grads) for part in parts]
    norms = []
    with taking as taken, contextlib.ExitStack() as stack:
        prepared = [stack.enter_context(patch) for patch in preparing]
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
    calls = {"norms_taken": taken.call_count, "preparations": sum(call.call_count for call in prepared)}
    return {"parameters": parameters, "norms": norms, "parts": len(parts), **calls}


def each_way(kind: str, cuts: ParallelConfig, config: OptimizerConfig) -> list[dict[str, Any]]:
    return [stepped(kind, cuts, config, halves) for halves in (False, True)]


FP32 = OptimizerConfig(precision="fp32", use_distributed_optimizer=False)
BF16 = OptimizerConfig(precision="bf16", use_distributed_optimizer=True)
CASES = {
    "fp32": ("gqa", parallel(), FP32, 1),
    "bf16, distributed": ("gqa", parallel(), BF16, 2),
    "sgd": ("tied", parallel(tp=2), dataclasses.replace(FP32, optimizer="sgd", lr=0.1), 2),
    "experts": ("moe", parallel(ep=2), BF16, 2),
    "no clipping": ("gqa", parallel(), dataclasses.replace(FP32, clip_grad=0.0), 1),
}


@pytest.mark.full
@combinations(name=list(CASES))
def test_both_halves_together_are_megatrons_step_to_the_last_bit(ranks, name):
    *arguments, world_size = CASES[name]
    for one, other in ranks.run(each_way, *arguments, world_size=world_size):
        assert one["norms"] == other["norms"] and other["norms"][2] > 1
        assert one["parameters"].keys() == other["parameters"].keys()
        for key, value in one["parameters"].items():
            assert torch.equal(value, other["parameters"][key]), key
        assert other["preparations"] == 3 * other["parts"] and other["norms_taken"] <= 3 * other["parts"]
        assert other["parts"] == (2 if name == "experts" else 1), "experts have an optimizer of their own"
