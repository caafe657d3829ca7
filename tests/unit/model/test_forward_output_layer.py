# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Fused with the loss, Megatron's output layer leaves the gradients that it leaves without fusion."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import layouts
import models
import pytest
import torch
from layouts import Case, Joined, Outcome, Outcomes, worst_difference
from models import parallel
from tiers import combinations

from megatron_selfdistill.compat import repairs  # noqa: F401  isort: skip  (must come before megatron.core)
from megatron.core.tensor_parallel import layers

from megatron_selfdistill.compat.older_megatron import submodules_of
from megatron_selfdistill.config import OptimizerConfig, OptimizerConstants, ParallelConfig, from_mapping
from megatron_selfdistill.model import architecture, build
from megatron_selfdistill.model.forward import Fusion, unwrapped
from megatron_selfdistill.model.fused_loss import MainGrad
from megatron_selfdistill.model.output_layer import decided_output_layer, unfusable

MODES = ("keep_gradient", "low_memory")
FUSIONS = {mode: Fusion(mode, 5) for mode in MODES}  # 5 tokens: of a microbatch's 1 to 50
COLUMNS = 72  # of an output layer's shard, and of no other layer
LAYOUTS: dict[str, tuple[str, ParallelConfig, int]] = {
    "one rank": ("shallow", parallel(), 1),
    "tied": ("tied", parallel(), 1),
    "TP2": ("shallow", parallel(tp=2), 2),
    "TP2+SP": ("shallow", parallel(tp=2, sp=True), 2),
    "TP4+SP tied": ("tied", parallel(tp=4, sp=True), 4),
    "PP2 tied": ("tied", parallel(pp=2), 2),
    "PP2xVPP2 tied": ("tied", parallel(pp=2, vpp=2), 2),
    "TP2xPP2+SP tied": ("tied", parallel(tp=2, pp=2, sp=True), 4),
    "CP2xTP2+SP": ("shallow", parallel(cp=2, tp=2, sp=True), 4),
    "DP2": ("shallow", parallel(), 2),
    "EP2xTP2+SP": ("moe", parallel(ep=2, tp=2, etp=1, sp=True), 2),
}


@dataclasses.dataclass(frozen=True)
class Patches:
    """What is put under Megatron on each rank."""

    apex: bool = False
    engine: bool = False
    """Layers that accumulate weight gradients by themselves, as Transformer Engine's do."""
    bucket_size: int | None = None


PLAIN = Patches()


class StandInForApex:
    """``fused_weight_gradient_mlp_cuda``, which needs a GPU."""

    shapes: ClassVar[list[tuple[int, ...]]] = []
    """Of the gradients of all calls, since it was cleared."""

    @staticmethod
    def wgrad_gemm_accum_fp32(hidden: torch.Tensor, gradient: torch.Tensor, main_grad: torch.Tensor) -> None:
        assert hidden.is_contiguous() and gradient.is_contiguous() and main_grad.dtype == torch.float32
        main_grad.addmm_(gradient.T, hidden)
        StandInForApex.shapes.append(tuple(gradient.shape))


class EngineColumn(layers.ColumnParallelLinear):
    """Stands in for Transformer Engine's column-parallel layer: its kernel needs no apex."""


class EngineRow(layers.RowParallelLinear):
    """Stands in for Transformer Engine's row-parallel layer."""


def engine_spec(config: Any, vp_stage: int | None = None, *, transformer_engine: bool | None = None) -> Any:
    """Return the local layer spec with the stand-ins for Transformer Engine's linear layers."""
    assert transformer_engine
    block = architecture.layer_spec(config, vp_stage, transformer_engine=False)
    for spec in block.layer_specs:
        mlp = submodules_of(spec.submodules.mlp)
        linear = [spec.submodules.self_attention.submodules]
        linear.append(submodules_of(mlp.experts) if hasattr(mlp, "experts") else mlp)
        for submodules in linear:
            for name, module in vars(submodules).items():
                stand_in = {layers.ColumnParallelLinear: EngineColumn, layers.RowParallelLinear: EngineRow}
                if module in stand_in:
                    setattr(submodules, name, stand_in[module])
    return block


def run(case: Case, patches: Patches) -> Outcome:
    changes: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        if patches.apex or patches.engine:
            patch.setattr(layers, "fused_weight_gradient_mlp_cuda", StandInForApex, raising=False)
        if patches.apex:
            patch.setattr(layers, "_grad_accum_fusion_available", True)
            changes = {"transformer": {"gradient_accumulation_fusion": True}}
        if patches.engine:
            patch.setattr(build, "layer_spec", engine_spec)
            for module in (architecture, build):
                patch.setattr(module, "uses_transformer_engine", lambda: True)
            changes = {"transformer": {"apply_rope_fusion": False, "moe_grouped_gemm": False}}
        if patches.bucket_size is not None:
            config = partial(build.DistributedDataParallelConfig, bucket_size=patches.bucket_size)
            patch.setattr(build, "DistributedDataParallelConfig", config)
        StandInForApex.shapes.clear()
        outcome = layouts.run(dataclasses.replace(case, model_changes=case.model_changes | changes))
        if patches.engine:
            widths = {width for _, width in StandInForApex.shapes}
            assert widths and COLUMNS not in widths, "the output layer called the kernel"
        return outcome


def run_each(jobs: list[tuple[Case, Patches]]) -> list[Outcome]:
    return [run(*job) for job in jobs]


@pytest.fixture(scope="module")
def outcomes(ranks) -> Outcomes:
    return Outcomes(ranks, run_each)


def case_of(name: str, **changes: Any) -> tuple[Case, int]:
    """Return the case of a layout, and its number of ranks."""
    kind, cuts, world_size = LAYOUTS[name]
    return Case(kind=kind, parallel=cuts, **changes), world_size


def fused(case: Case, mode: str) -> Case:
    return dataclasses.replace(case, fusion=FUSIONS.get(mode))


def assert_alike(got: Joined, expected: Joined, tolerance: float = 1e-5) -> None:
    assert expected[0].loss > 0.05
    assert got[0].loss == pytest.approx(expected[0].loss, rel=tolerance)
    assert got[0].grad_norm == pytest.approx(expected[0].grad_norm, rel=tolerance)
    for mine, theirs in zip(got[1:], expected[1:], strict=True):
        worst, where = worst_difference(mine, theirs)
        assert worst <= tolerance, f"{where} differs by {worst:.1e}"


@combinations(name=list(LAYOUTS), mode=MODES, quick={"name": ["PP2xVPP2 tied", "EP2xTP2+SP"]}, strength=1)
def test_gradients_equal_the_materialised_ones_of_one_rank(outcomes, name, mode):
    case, world_size = case_of(name, divergence="jsd")
    alone = dataclasses.replace(case, parallel=parallel(), extra_weightless=0)
    assert_alike(outcomes((fused(case, mode), PLAIN), world_size), outcomes((alone, PLAIN)))


@pytest.mark.full
@combinations(name=["tied", "PP2xVPP2 tied"], mode=MODES)
def test_current_weights_teach_alike(outcomes, name, mode):
    case, world_size = case_of(name, teacher="current")
    expected, got = outcomes.of([(case, PLAIN), (fused(case, mode), PLAIN)], world_size)
    assert_alike(got, expected)


@combinations(
    name=["one rank", "tied", "TP2+SP"], mode=MODES, quick={"name": ["one rank"], "mode": ["keep_gradient"]}, strength=1
)
def test_apexs_kernel_accumulates_every_microbatch_into_main_grad(outcomes, name, mode):
    case, world_size = case_of(name)
    apex = Patches(apex=True)
    expected, *others = outcomes.of([(case, PLAIN), (case, apex), (fused(case, mode), apex)], world_size)
    for got in others:
        assert_alike(got, expected)


@pytest.mark.full
@combinations(
    name=["one rank", "TP2+SP", "EP2xTP2+SP"],
    mode=["materialised", *MODES],
    quick={"name": ["one rank"], "mode": ["low_memory"]},
    strength=1,
)
def test_without_apex_the_output_layer_stays_unfused_beside_layers_that_accumulate_by_themselves(outcomes, name, mode):
    case, world_size = case_of(name, model_changes={"make_vocab_size_divisible_by": COLUMNS})
    case = fused(case, mode)
    expected, got = outcomes.of([(case, PLAIN), (case, Patches(engine=True))], world_size)
    assert_alike(got, expected)


def test_without_the_kernel_a_gradient_in_chunks_is_no_less_exact_than_in_one_product():
    torch.manual_seed(0)
    hidden, gradient = torch.randn(256, 16).bfloat16(), torch.randn(256, 48).bfloat16()
    exact = gradient.double().t() @ hidden.double()
    weight = torch.nn.Parameter(torch.zeros(48, 16, dtype=torch.bfloat16))
    layer = torch.nn.Module()
    layer.gradient_accumulation_fusion = False
    assert MainGrad.of(weight, layer) is None  # DDP has not wrapped it
    weight.main_grad, weight.grad_added_to_main_grad = torch.zeros(48, 16), False
    adds = MainGrad.of(weight, layer)
    for chunk in range(0, 256, 8):
        adds.add(hidden[chunk : chunk + 8], gradient[chunk : chunk + 8])
    once = gradient.t() @ hidden
    assert (weight.main_grad - exact).norm() <= 1.1 * (once.double() - exact).norm()
    assert adds.for_autograd().shape == weight.shape and weight.grad_added_to_main_grad


OVERLAPPED = OptimizerConfig(
    **{"precision": "fp32", "lr": 1e-3, "constants": OptimizerConstants(adam_eps=1e-4)},
    **dict.fromkeys(("use_distributed_optimizer", "overlap_grad_reduce", "overlap_param_gather"), True),
)


@pytest.mark.full
@pytest.mark.parametrize("apex", [False, True])
@pytest.mark.parametrize("kind", ["shallow", "tied"])
@pytest.mark.parametrize("mode", MODES)
def test_overlapped_reduction_and_gather_in_small_buckets_end_in_the_same_parameters(outcomes, mode, kind, apex):
    patches = Patches(apex=apex, bucket_size=2000)  # several: the output layer's alone is 64 x 32
    case = Case(kind=kind, steps=2, optimizer=OVERLAPPED, max_tokens=40)
    expected, got = outcomes.of([(case, patches), (fused(case, mode), patches)], 2)
    assert_alike(got, expected)


class Capped(layers.ColumnParallelLinear):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        logits, bias = super().forward(*args, **kwargs)
        return 30 * torch.tanh(logits / 30), bias


CHANGES: list[tuple[str | None, Callable[[Any], Any]]] = [
    (None, lambda layer: None),
    ("Capped does more", lambda layer: setattr(layer, "__class__", Capped)),
    ("does more", lambda layer: setattr(layer, "forward", torch.tanh)),
    ("a bias", lambda layer: setattr(layer, "bias", torch.nn.Parameter(torch.zeros(64)))),
    ("gathers", lambda layer: setattr(layer, "gather_output", True)),
    ("hooks", lambda layer: layer.register_forward_hook(lambda *_: None)),
    ("hooks", lambda layer: layer.register_full_backward_hook(lambda *_: None)),
    (None, lambda layer: layer.register_forward_pre_hook(lambda *_: None)),
]
"""What is said of an output layer that cannot be fused, and the change that makes it so."""


def check_reasons() -> None:
    for reason, change in CHANGES:
        chunks, _ = models.build(models.model_config("gqa", num_layers=1), parallel())
        change(unwrapped(chunks[-1]).output_layer)
        found = unfusable(unwrapped(chunks[-1]))
        assert found is None if reason is None else reason in found
    # a run with a reference prefers fused layers
    config = from_mapping({"target": {"anchor": "reference"}, "loss": {"max_logits_gb": 0, "fused_chunk_tokens": 8}})
    assert decided_output_layer(config, chunks).mode in MODES
    unwrapped(chunks[-1]).output_layer.forward = torch.tanh
    told = str(decided_output_layer(config, chunks))
    assert "materialised" in told and "not fused" in told


def test_a_layer_that_does_more_than_multiply_is_not_fused(ranks):
    ranks.run(check_reasons, world_size=1)
