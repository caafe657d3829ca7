# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""A lab's own model trains as the built-in one does, and a lab's own Megatron Core is what is used."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from layouts import Case, Outcomes
from models import parallel
from tiers import combinations

from megatron_selfdistill.compat import repairs  # noqa: F401  isort: skip  (must come before megatron.core)
import megatron.core
import megatron.core.optimizer.optimizer as megatrons

from megatron_selfdistill.config import OptimizerConfig, OptimizerConstants, ParallelConfig
from megatron_selfdistill.config.schema.step_config import LearningRateDecay
from megatron_selfdistill.errors import ConfigError
from megatron_selfdistill.learner import apply_gradients, gradient_norm
from megatron_selfdistill.model.build import build_optimizer, megatron_in_use, wrap_for_training
from megatron_selfdistill.model.forward import unwrapped


@pytest.fixture(autouse=True)
def lab_models_on_the_path(monkeypatch):
    """Put the directory of the models on PYTHONPATH, as a lab would; the ranks take pytest's own path over."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


PP2_VPP2 = ParallelConfig(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2)
TP2_SP = ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True)


PROVIDERS = {
    "one rank": (ParallelConfig(), ["model_provider", "without_vp_stage"]),
    "PP2xVPP2": (PP2_VPP2, ["model_provider", "with_keywords"]),
    "TP2+SP": (TP2_SP, ["without_vp_stage"]),
}


@combinations(layout=list(PROVIDERS), quick={"layout": ["one rank", "PP2xVPP2"]}, strength=1)
def test_a_providers_model_has_the_built_in_models_gradient(ranks, layout):
    parallel, providers = PROVIDERS[layout]
    case = Case(parallel=parallel)
    provided = [dataclasses.replace(case, model_changes={"provider": f"lab_models.{name}"}) for name in providers]
    (built_in, expected, _), *others = Outcomes(ranks).of([case, *provided], 1 if layout == "one rank" else 2)
    assert built_in.loss > 0.05
    for outcome, got, _ in others:
        assert outcome.loss == built_in.loss
        assert got.keys() == expected.keys()
        for key, gradient in expected.items():
            assert got[key].equal(gradient), key


def refusals(providers: list[str], parallel: ParallelConfig) -> list[str]:
    """Return the messages with which this rank refuses providers."""
    messages = []
    for provider in providers:
        with pytest.raises(ConfigError) as caught:
            models.build(models.model_config("shallow", provider=provider), parallel)
        messages.append(str(caught.value))
    return messages


REFUSED = {
    "one rank": (
        ParallelConfig(),
        {
            "lab_models.no_gpt": "must return a megatron.core GPTModel, got Linear",
            "lab_models.returns_a_list": "must return a megatron.core GPTModel, got list",
            "lab_models.of_another_context_parallel_size": (
                "built with context_parallel_size=2, but parallel.context_parallel_size is 1"
            ),
            "lab_models.of_another_expert_parallel_size": (
                "built with expert_model_parallel_size=2, but parallel.expert_model_parallel_size is 1"
            ),
            "lab_models.that_gathers_its_logits": "must build with parallel_output=True",
            "lab_models.that_caps_its_logits": "SoftCapped has its own _postprocess",
            "lab_models.with_scaled_logits": "use_mup multiplies the logits after the output layer",
            "lab_models.with_megatrons_gated_delta_net": "those of Megatron Core, which take no packed sequences",
            "lab_models.with_dropout": "dropout makes the trained student",
            "lab_models.absent": "got 'lab_models.absent'; module 'lab_models' has no attribute",
            "no_such_lab.provider": "cannot be imported: No module named 'no_such_lab'",
            "provider": "a dotted path (package.module.function), or null, got 'provider'",
            "lab_models.not_a_function": "got 'lab_models.not_a_function', which is a int",
        },
    ),
    "TP2+SP": (
        TP2_SP,
        {
            "lab_models.without_sequence_parallelism": (
                "built with sequence_parallel=False, but parallel.sequence_parallel is True"
            )
        },
    ),
    "PP2xVPP2": (PP2_VPP2, {"lab_models.without_vp_stage": "must take vp_stage"}),
}


@pytest.mark.parametrize("layout", REFUSED)
def test_a_provider_that_cannot_be_used_is_refused_in_one_sentence(ranks, layout):
    parallel, expected = REFUSED[layout]
    for messages in ranks.run(refusals, list(expected), parallel, world_size=1 if layout == "one rank" else 2):
        for (provider, words), message in zip(expected.items(), messages, strict=True):
            assert words in message and "\n" not in message, provider


# -- chunks and optimizer -----------------------------------------------------------------------------------


def dtypes(precision: str) -> dict:
    optimizer = OptimizerConfig(precision=precision, use_distributed_optimizer=False, lr=1e-3)
    chunks, _ = models.build(models.model_config("shallow"), ParallelConfig(), optimizer=optimizer)
    student = wrap_for_training(chunks, optimizer)
    megatron_optimizer, scheduler = build_optimizer(student, optimizer, 10)
    parameter = next(student[0].parameters())
    scheduler.step(1)
    return {
        "parameter": parameter.dtype,
        "gradient": parameter.main_grad.dtype,
        "updated": {p.dtype for group in megatron_optimizer.param_groups for p in group["params"]},
        "lr": megatron_optimizer.param_groups[0]["lr"],
    }


def test_bf16_parameters_have_float32_gradients_and_main_parameters(ranks):
    (bf16,) = ranks.run(dtypes, "bf16", world_size=1)
    assert (bf16["parameter"], bf16["gradient"], bf16["updated"]) == (torch.bfloat16, torch.float32, {torch.float32})
    (fp32,) = ranks.run(dtypes, "fp32", world_size=1)
    assert (fp32["parameter"], fp32["gradient"], fp32["updated"]) == (torch.float32, torch.float32, {torch.float32})
    assert bf16["lr"] == fp32["lr"] == 1e-3


def refused_precision() -> str:
    chunks, _ = models.build(models.model_config("shallow"), ParallelConfig())
    with pytest.raises(ConfigError) as caught:
        wrap_for_training(chunks, OptimizerConfig(precision="bf16"))
    return str(caught.value)


def test_a_model_of_another_precision_than_the_optimizers_is_refused(ranks):
    (text,) = ranks.run(refused_precision, world_size=1)
    assert text == "the model was built in fp32, expected optimizer.precision=bf16"


def learning_rates(num_steps: int, **changes) -> list[float]:
    optimizer = OptimizerConfig(precision="fp32", optimizer="sgd", use_distributed_optimizer=False, **changes)
    chunks, _ = models.build(models.model_config("gqa", num_layers=1), ParallelConfig(), optimizer=optimizer)
    megatron_optimizer, scheduler = build_optimizer(wrap_for_training(chunks, optimizer), optimizer, num_steps)
    rates = []
    for _ in range(num_steps):
        scheduler.step(1)
        rates.append(megatron_optimizer.param_groups[0]["lr"])
    return rates


def test_the_learning_rate_warms_up_and_decays_over_the_steps_of_the_run(ranks):
    (rates,) = ranks.run(
        learning_rates,
        6,
        lr=1.0,
        min_lr=0.2,
        lr_warmup_steps=2,
        lr_decay=LearningRateDecay(style="linear"),
        world_size=1,
    )
    assert rates == pytest.approx([0.5, 1.0, 0.8, 0.6, 0.4, 0.2])


# -- which Megatron Core ------------------------------------------------------------------------------------


def test_every_setting_reaches_megatrons_optimizer(monkeypatch):
    from megatron_selfdistill.model import build

    seen = {}
    monkeypatch.setattr(build, "get_megatron_optimizer", lambda config, *args, **kwargs: seen.update(vars(config)))
    monkeypatch.setattr(build, "OptimizerParamScheduler", lambda *args, **kwargs: None)
    constants = {"adam_beta1": 0.4, "adam_beta2": 0.5, "adam_eps": 0.006, "sgd_momentum": 0.7}
    settings = {
        **{"lr": 0.1, "min_lr": 0.02, "weight_decay": 0.3},
        **{"clip_grad": 0.8, "optimizer": "adam", "use_distributed_optimizer": True},
    }
    optimizer = OptimizerConfig(constants=OptimizerConstants(**constants), **settings)
    build.build_optimizer([], optimizer, num_steps=3)
    assert {name: seen[name] for name in constants | settings} == constants | settings


def test_a_version_that_was_never_tested_is_noted(monkeypatch):
    monkeypatch.setattr(megatron.core, "__version__", "0.99.0")
    assert megatron_in_use().startswith("megatron.core 0.99.0 from ")
    assert megatron_in_use().endswith("(not tested; tested: 0.16.1 and 0.19.2)")


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
