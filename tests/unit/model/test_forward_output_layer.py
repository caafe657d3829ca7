# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Fused with the loss, Megatron's output layer leaves the gradients that it leaves without fusion."""

from __future__ import annotations

import dataclasses
import itertools
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
from megatron_selfdistill.distributed.ranks import initialize
from megatron_selfdistill.model import architecture, build, forward, fused_loss
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
    with pytest.MonkeyPatch.context() as patch:
        if patches.apex:
            patch.setattr(layers, "fused_weight_gradient_mlp_cuda", StandInForApex, raising=False)
            patch.setattr(layers, "_grad_accum_fusion_available", True)
            changes = {**case.model_changes, "transformer": {"gradient_accumulation_fusion": True}}
            case = dataclasses.replace(case, model_changes=changes)
        if patches.engine:
            patch.setattr(layers, "fused_weight_gradient_mlp_cuda", StandInForApex, raising=False)
            patch.setattr(build, "layer_spec", engine_spec)
            for module in (architecture, build):
                patch.setattr(module, "uses_transformer_engine", lambda: True)
            changes = {"transformer": {"apply_rope_fusion": False, "moe_grouped_gemm": False}}
            case = dataclasses.replace(case, model_changes=case.model_changes | changes)
        if patches.bucket_size is not None:
            config = partial(build.DistributedDataParallelConfig, bucket_size=patches.bucket_size)
            patch.setattr(build, "DistributedDataParallelConfig", config)
        StandInForApex.shapes.clear()
        outcome = layouts.run(case)
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


@combinations(name=["tied", "PP2xVPP2 tied"], mode=MODES, quick={"name": ["tied", "PP2xVPP2 tied"]}, strength=1)
def test_current_weights_teach_alike(outcomes, name, mode):
    case, world_size = case_of(name, teacher="current")
    expected, got = outcomes.of([(case, PLAIN), (fused(case, mode), PLAIN)], world_size)
    assert_alike(got, expected)


@combinations(name=["one rank", "tied", "TP2+SP"], mode=MODES, quick={"name": ["one rank"]}, strength=1)
def test_apexs_kernel_accumulates_every_microbatch_into_main_grad(outcomes, name, mode):
    case, world_size = case_of(name)
    jobs = [(case, PLAIN), (case, Patches(apex=True)), (fused(case, mode), Patches(apex=True))]
    expected, *others = outcomes.of(jobs, world_size)
    for got in others:
        assert_alike(got, expected)


@combinations(
    name=["one rank", "TP2+SP", "EP2xTP2+SP"], mode=["materialised", *MODES], quick={"name": ["one rank"]}, strength=1
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
    precision="fp32",
    lr=1e-3,
    constants=OptimizerConstants(adam_eps=1e-4),
    use_distributed_optimizer=True,
    overlap_grad_reduce=True,
    overlap_param_gather=True,
)


@pytest.mark.full
@combinations(
    mode=MODES,
    kind=["shallow", "tied"],
    apex={"": False, "apex": True},
    quick={"mode": ["low_memory"], "kind": ["tied"], "apex": ["apex"]},
    strength=1,
)
def test_overlapped_reduction_and_gather_in_small_buckets_end_in_the_same_parameters(outcomes, mode, kind, apex):
    patches = Patches(apex=apex, bucket_size=2000)  # several: the output layer's alone is 64 x 32
    case = Case(kind=kind, steps=2, optimizer=OVERLAPPED, max_tokens=40)
    expected, got = outcomes.of([(case, patches), (fused(case, mode), patches)], 2)
    assert_alike(got, expected)


def arrivals(kind: str, teacher: str) -> list[str]:
    """Return the order in which the output weight arrives and is read."""
    case = Case(kind=kind, teacher=teacher, fusion=FUSIONS["low_memory"], max_tokens=300, extra_weightless=0)
    seen: list[str] = []
    read = fused_loss.fused_distillation_loss
    with pytest.MonkeyPatch.context() as patch:
        wrap = layouts.wrap_for_training

        def with_a_gather(chunks: Any, optimizer: OptimizerConfig) -> Any:
            layer = unwrapped(chunks[0]).output_layer
            layer.register_forward_pre_hook(lambda module, inputs: seen.append(f"arrives for {len(inputs)}"))
            return wrap(chunks, optimizer)

        patch.setattr(layouts, "wrap_for_training", with_a_gather)
        patch.setattr(fused_loss, "fused_distillation_loss", lambda *a, **k: (seen.append("read"), read(*a, **k))[1])
        layouts.run(case)
    return seen


def arrivals_of_each(variants: list[tuple[str, str]]) -> list[list[str]]:
    return [arrivals(*variant) for variant in variants]


def test_the_weight_is_read_after_the_layers_forward_hooks(ranks):
    """A hook of DDP waits for the weight's bucket under overlap_param_gather."""
    variants = list(itertools.product(["shallow", "tied"], ["frozen", "current"]))
    for variant, seen in zip(variants, ranks.run(arrivals_of_each, variants, world_size=1)[0], strict=True):
        assert seen == ["arrives for 1", "read"], variant


def reasons() -> list[str | None]:
    def of(change: Any) -> str | None:
        chunks, _ = models.build(models.model_config("gqa", num_layers=1), ParallelConfig())
        change(unwrapped(chunks[-1]).output_layer)
        return unfusable(unwrapped(chunks[-1]))

    class Capped(layers.ColumnParallelLinear):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            logits, bias = super().forward(*args, **kwargs)
            return 30 * torch.tanh(logits / 30), bias

    return [
        of(lambda layer: None),
        of(lambda layer: setattr(layer, "__class__", Capped)),
        of(lambda layer: setattr(layer, "forward", torch.tanh)),
        of(lambda layer: setattr(layer, "bias", torch.nn.Parameter(torch.zeros(64)))),
        of(lambda layer: setattr(layer, "gather_output", True)),
        of(lambda layer: layer.register_forward_hook(lambda *_: None)),
        of(lambda layer: layer.register_full_backward_hook(lambda *_: None)),
        of(lambda layer: layer.register_forward_pre_hook(lambda *_: None)),
    ]


def output_layers() -> list[str]:
    """Return the modes of a run with a reference, with a linear and another output layer, which prefers fused ones."""
    chunks, _ = models.build(models.model_config("shallow"), ParallelConfig())
    config = from_mapping({"target": {"anchor": "reference"}, "loss": {"max_logits_gb": 0, "fused_chunk_tokens": 8}})
    linear = decided_output_layer(config, chunks)
    unwrapped(chunks[-1]).output_layer.forward = torch.tanh
    return [linear.mode, str(decided_output_layer(config, chunks))]


def test_with_a_reference_a_layer_that_is_not_linear_is_materialised(ranks):
    (linear, other) = ranks.run(output_layers, world_size=1)[0]
    assert linear in MODES
    assert "output layer: materialised" in other and "not fused, because its" in other


def test_a_layer_that_does_more_than_multiply_is_not_fused(ranks):
    (found,) = ranks.run(reasons, world_size=1)
    assert found[0] is None and found[-1] is None
    for reason, words in zip(
        found[1:-1], ["Capped does more", "does more", "a bias", "gathers", "hooks", "hooks"], strict=True
    ):
        assert reason is not None and words in reason


def own_rows_of(variants: list[tuple[int, int]]) -> list[tuple[int, bool]]:
    """Return the rows that are sent per rank, and whether the tokens find theirs, for each (number of tokens, seed)."""
    grid = initialize(parallel(tp=4, sp=True), seed=1)
    found = []
    for num_tokens, seed in variants:
        generator = torch.Generator().manual_seed(seed)
        whole = torch.randn(64, 1, 6, generator=generator)
        rows = torch.randperm(64, generator=generator)[:num_tokens]
        positions = forward.ResponsePositions.on_host(rows, len(whole), grid)
        own = whole.chunk(4)[grid.tp_rank][positions.own]
        parts = [torch.empty_like(own) for _ in range(grid.tp_size)]
        torch.distributed.all_gather(parts, own, group=grid.tp_group)
        found.append((len(own), torch.equal(torch.cat(parts)[positions.gathered], whole[rows])))
    return found


def test_under_sequence_parallelism_each_rank_sends_its_own_rows_of_tokens(ranks):
    variants = list(itertools.product([0, 1, 7, 30, 64], [0, 1]))
    by_variant = zip(*ranks.run(own_rows_of, variants, world_size=4), strict=True)
    for (num_tokens, _), found in zip(variants, by_variant, strict=True):
        (sent,) = {sent for sent, _ in found}
        assert all(right for _, right in found), num_tokens
        assert -(-num_tokens // 4) <= sent <= min(num_tokens, 16)
