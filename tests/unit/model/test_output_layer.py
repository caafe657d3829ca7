# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Fused with the loss, Megatron's output layer leaves the gradients that it leaves alone; and when it is fused."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, ClassVar

import layouts
import models
import pytest
import torch
from layouts import Case, Outcome, join, worst_difference
from models import parallel
from tiers import combinations

from megatron_selfdistill.compat import repairs  # noqa: F401  isort: skip  (must come before megatron.core)
from megatron.core.tensor_parallel import layers

from megatron_selfdistill.config import OptimizerConfig, ParallelConfig
from megatron_selfdistill.config.compose import from_mapping
from megatron_selfdistill.errors import ConfigError
from megatron_selfdistill.loss.sharded.vocab_parallel import VocabShard
from megatron_selfdistill.model import architecture, build, output_layer
from megatron_selfdistill.model.build import unwrapped
from megatron_selfdistill.model.output_layer import Fusion, MainGrad, OutputLayer, choose_output_layer, unfusable
from megatron_selfdistill.pipeline import schedule

MODES = ("keep_gradient", "low_memory")
FUSIONS = {mode: Fusion(mode, 5) for mode in MODES}  # 5 tokens: of a microbatch's 1 to 50
COLUMNS = 72  # of an output layer's shard, and of no other layer
LAYOUTS: dict[str, tuple[str, ParallelConfig, int]] = {
    "one rank": ("gqa", parallel(), 1),
    "tied": ("tied", parallel(), 1),
    "TP2": ("gqa", parallel(tp=2), 2),
    "TP2+SP": ("gqa", parallel(tp=2, sp=True), 2),
    "TP4+SP tied": ("tied", parallel(tp=4, sp=True), 4),
    "TP4 tied": ("tied", parallel(tp=4), 4),
    "PP2 tied": ("tied", parallel(pp=2), 2),
    "PP2xVPP2 tied": ("tied", parallel(pp=2, vpp=2), 2),
    "TP2xPP2+SP tied": ("tied", parallel(tp=2, pp=2, sp=True), 4),
    "CP2xTP2+SP": ("gqa", parallel(cp=2, tp=2, sp=True), 4),
    "DP2": ("gqa", parallel(), 2),
    "EP2xTP2+SP": ("moe", parallel(ep=2, tp=2, etp=1, sp=True), 2),
}


@dataclasses.dataclass(frozen=True)
class Patches:
    """What is put under Megatron on each rank."""

    apex: bool = False
    engine: bool = False
    """Layers that accumulate weight gradients by themselves, as Transformer Engine's do."""
    bucket_size: int | None = None


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
        mlp = spec.submodules.mlp.submodules
        linear = [spec.submodules.self_attention.submodules]
        linear.append(mlp.experts.submodules if hasattr(mlp, "experts") else mlp)
        for submodules in linear:
            for name, module in vars(submodules).items():
                stand_in = {layers.ColumnParallelLinear: EngineColumn, layers.RowParallelLinear: EngineRow}
                if module in stand_in:
                    setattr(submodules, name, stand_in[module])
    return block


def run(case: Case, patches: Patches = Patches()) -> Outcome:
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
        return layouts.run(case)


def on_ranks(ranks, case: Case, world_size: int, patches: Patches = Patches()):
    per_rank = ranks.run(run, case, patches, world_size=world_size)
    whole = not case.optimizer.use_distributed_optimizer
    grads = join([o.grads for o in per_rank]) if whole else {}
    return per_rank[0], grads, join([o.params for o in per_rank])


def assert_alike(got, expected, tolerance: float = 1e-5) -> None:
    assert expected[0].loss > 0.05
    assert got[0].loss == pytest.approx(expected[0].loss, rel=tolerance)
    assert got[0].grad_norm == pytest.approx(expected[0].grad_norm, rel=tolerance)
    for mine, theirs in zip(got[1:], expected[1:], strict=True):
        worst, where = worst_difference(mine, theirs)
        assert worst <= tolerance, f"{where} differs by {worst:.1e}"


@combinations(
    name=list(LAYOUTS), mode=MODES, quick={"name": ["tied", "TP2+SP", "PP2xVPP2 tied", "DP2", "EP2xTP2+SP"]}, strength=1
)
def test_gradients_equal_the_materialised_ones_of_one_rank(ranks, name, mode):
    kind, cuts, world_size = LAYOUTS[name]
    case = Case(kind=kind, parallel=cuts, divergence="jsd")
    expected = on_ranks(ranks, dataclasses.replace(case, parallel=parallel(), extra_weightless=0), 1)
    assert_alike(on_ranks(ranks, dataclasses.replace(case, fusion=FUSIONS[mode]), world_size), expected)


@combinations(
    name=["tied", "TP2xPP2+SP tied", "PP2xVPP2 tied"], mode=MODES, quick={"name": ["tied", "PP2xVPP2 tied"]}, strength=1
)
def test_current_weights_teach_alike(ranks, name, mode):
    kind, cuts, world_size = LAYOUTS[name]
    case = Case(kind=kind, parallel=cuts, teacher="current")
    expected = on_ranks(ranks, case, world_size)
    assert_alike(on_ranks(ranks, dataclasses.replace(case, fusion=FUSIONS[mode]), world_size), expected)


@combinations(
    name=["one rank", "tied", "TP2+SP", "TP2xPP2+SP tied"],
    mode=MODES,
    quick={"name": ["one rank", "TP2+SP"]},
    strength=1,
)
def test_apexs_kernel_accumulates_every_microbatch_into_main_grad(ranks, name, mode):
    kind, cuts, world_size = LAYOUTS[name]
    case = Case(kind=kind, parallel=cuts)
    expected = on_ranks(ranks, case, world_size)
    fused = dataclasses.replace(case, fusion=FUSIONS[mode])
    assert_alike(on_ranks(ranks, case, world_size, Patches(apex=True)), expected)
    assert_alike(on_ranks(ranks, fused, world_size, Patches(apex=True)), expected)


def widths_of_calls(kind: str, cuts: ParallelConfig, fusion: Fusion | None) -> set[int]:
    """Output columns of the layers whose weight gradients the kernel of a stand-in for Transformer Engine took."""
    StandInForApex.shapes.clear()
    changes = {"make_vocab_size_divisible_by": COLUMNS}
    run(Case(kind=kind, parallel=cuts, fusion=fusion, model_changes=changes), Patches(engine=True))
    return {width for _, width in StandInForApex.shapes}


@combinations(
    name=["one rank", "tied", "TP2+SP", "PP2 tied", "EP2xTP2+SP"],
    mode=["materialised", *MODES],
    quick={"name": ["one rank", "TP2+SP", "PP2 tied"]},
    strength=1,
)
def test_without_apex_the_output_layer_stays_unfused_beside_layers_that_accumulate_by_themselves(ranks, name, mode):
    kind, cuts, world_size = LAYOUTS[name]
    case = Case(kind=kind, parallel=cuts, fusion=FUSIONS.get(mode))
    expected = on_ranks(ranks, case, world_size)
    assert_alike(on_ranks(ranks, case, world_size, Patches(engine=True)), expected)
    for widths in ranks.run(widths_of_calls, kind, cuts, FUSIONS.get(mode), world_size=world_size):
        assert widths and COLUMNS not in widths


def rows_of_calls(fusion: Fusion) -> list[int]:
    """Return the rows of each call of the output layer, in a batch of one microbatch and one without tokens."""
    StandInForApex.shapes.clear()
    changes = {"make_vocab_size_divisible_by": COLUMNS}
    run(Case(fusion=fusion, max_tokens=300, model_changes=changes), Patches(apex=True))
    return [rows for rows, width in StandInForApex.shapes if width == COLUMNS]


def test_the_kernel_is_called_for_a_microbatch_or_for_each_of_its_chunks(ranks):
    """Not at all for a microbatch without tokens."""
    (whole,) = ranks.run(rows_of_calls, FUSIONS["keep_gradient"], world_size=1)[0]
    chunks = ranks.run(rows_of_calls, FUSIONS["low_memory"], world_size=1)[0]
    assert whole == sum(chunks) > 50 and set(chunks[:-1]) == {5}


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
    adam_eps=1e-4,
    use_distributed_optimizer=True,
    overlap_grad_reduce=True,
    overlap_param_gather=True,
)


@combinations(mode=MODES, kind=["gqa", "tied"], apex={"": False, "apex": True}, strength=1)
def test_overlapped_reduction_and_gather_in_small_buckets_end_in_the_same_parameters(ranks, mode, kind, apex):
    patches = Patches(apex=apex, bucket_size=2000)  # several: the output layer's alone is 64 x 32
    case = Case(kind=kind, steps=3, optimizer=OVERLAPPED, max_tokens=40)
    expected = on_ranks(ranks, case, 2, patches)
    assert_alike(on_ranks(ranks, dataclasses.replace(case, fusion=FUSIONS[mode]), 2, patches), expected)


def arrivals(kind: str, teacher: str) -> tuple[list[str], float]:
    """Return the order in which the output weight arrives and is read, and the loss with the arrived weight."""
    case = Case(kind=kind, teacher=teacher, fusion=FUSIONS["low_memory"], max_tokens=300, extra_weightless=0)
    seen: list[str] = []
    read = output_layer.fused_distillation_loss
    with pytest.MonkeyPatch.context() as patch:
        wrap = layouts.wrap_for_training

        def with_a_gather(chunks: Any, optimizer: OptimizerConfig) -> Any:
            layer = unwrapped(chunks[0]).output_layer
            layer.register_forward_pre_hook(lambda module, inputs: seen.append(f"arrives for {len(inputs)}"))
            return wrap(chunks, optimizer)

        patch.setattr(layouts, "wrap_for_training", with_a_gather)
        patch.setattr(output_layer, "fused_distillation_loss", lambda *a, **k: (seen.append("read"), read(*a, **k))[1])
        return seen, layouts.run(case).loss


@pytest.mark.parametrize("teacher", ["frozen", "current"])
@pytest.mark.parametrize("kind", ["gqa", "tied"])
def test_the_weight_is_read_after_the_layers_forward_hooks(ranks, kind, teacher):
    """DDP's waits for the weight's bucket under overlap_param_gather."""
    seen, _ = ranks.run(arrivals, kind, teacher, world_size=1)[0]
    assert seen == ["arrives for 1", "read"]


def reasons() -> list[str | None]:
    def of(change: Any) -> str | None:
        chunks, _ = models.build(models.model_config("gqa"), ParallelConfig())
        layer = unwrapped(chunks[-1]).output_layer
        change(layer)
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


def test_a_layer_that_does_more_than_multiply_is_not_fused(ranks):
    (found,) = ranks.run(reasons, world_size=1)
    assert found[0] is None and found[-1] is None
    for reason, words in zip(
        found[1:-1], ["Capped does more", "does more", "a bias", "gathers", "hooks", "hooks"], strict=True
    ):
        assert reason is not None and words in reason


GIB = 2**30
ROWS = 16384
COLUMNS = 32768  # in bf16 a row is 64 KiB, so 16384 of them are 1 GiB


def chosen(cannot: str | None = None, **loss: Any) -> OutputLayer:
    sections: dict[str, Any] = {"schedule": {"max_tokens": ROWS}, "loss": loss}
    return choose_output_layer(from_mapping(sections), COLUMNS, cannot)


@pytest.mark.parametrize(
    ("limit", "chunk", "mode", "size"),
    [
        (2.0, 4096, "materialised", 2.0),
        (1.99, 4096, "keep_gradient", 1.25),
        (1.25, 4096, "keep_gradient", 1.25),
        (1.24, 4096, "low_memory", 0.5),
        (0.1, 4096, "low_memory", 0.5),
        (0.1, 1024, "low_memory", 0.125),
        (0.1, 16384, "materialised", 2.0),
    ],
)
def test_the_choice_by_the_size_of_the_logits(limit, chunk, mode, size):
    layer = chosen(max_logits_gb=limit, fused_chunk_tokens=chunk)
    assert (layer.mode, layer.largest / GIB) == (mode, size)
    assert layer.fusion == (None if mode == "materialised" else Fusion(mode, chunk))


def test_the_default_limit_is_a_twentieth_of_the_memory():
    for memory, mode in [(40.0, "materialised"), (39.9, "keep_gradient")]:
        config = from_mapping({"schedule": {"max_tokens": ROWS}, "cluster": {"gpu_memory_gb": memory}})
        assert choose_output_layer(config, COLUMNS).mode == mode


def test_every_cut_of_rows_and_columns_counts():
    def size(**sections: Any) -> float:
        config = from_mapping({"schedule": {"max_tokens": ROWS}, **sections})
        return choose_output_layer(config, COLUMNS).largest / GIB

    assert size() == 2
    assert size(parallel={"tensor_model_parallel_size": 2}) == 1
    assert size(parallel={"context_parallel_size": 2}) == 1
    assert size(optimizer={"precision": "fp32"}) == 4
    assert size(objective="rft") == 3, "there is no teacher, but a copy in float32"
    assert size(objective="rft", optimizer={"precision": "fp32"}) == 2, "written over"


NEXT_TOKEN_ROWS, WIDTH, PADDED = 64, 8, 8192


def bytes_of_next_token_training(dtype: torch.dtype, num_valid: int) -> tuple[int, int]:
    """Return the peak of memory from hidden states to the gradients, and the memory without logits."""
    models.build(models.model_config("gqa"), parallel())  # Megatron's groups
    hidden = torch.randn(NEXT_TOKEN_ROWS, WIDTH, dtype=dtype, requires_grad=True)
    weight = torch.randn(PADDED, WIDTH, dtype=dtype, requires_grad=True)
    tokens = torch.arange(NEXT_TOKEN_ROWS)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        stats = schedule.next_token(hidden @ weight.t(), None, tokens, VocabShard(0, PADDED, num_valid))
        stats.loss.sum().backward()
    now = peak = 0
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak, weight.nbytes


@pytest.mark.parametrize("num_valid", [PADDED, PADDED - 100])
@pytest.mark.parametrize(("dtype", "precision", "logits"), [(torch.bfloat16, "bf16", 3), (torch.float32, "fp32", 1)])
def test_next_token_training_takes_the_rows_of_logits_that_a_run_announces(ranks, dtype, precision, logits, num_valid):
    config = from_mapping({"objective": "rft", "optimizer": {"precision": precision}})
    layer = choose_output_layer(config, PADDED)
    announced = layer.tokens_with_logits(NEXT_TOKEN_ROWS) * layer.token_bytes
    assert announced == logits * NEXT_TOKEN_ROWS * PADDED * dtype.itemsize
    ((peak, rest),) = ranks.run(bytes_of_next_token_training, dtype, num_valid, world_size=1)
    assert announced <= peak < announced + 2 * rest


def test_what_is_asked_for_is_taken_whatever_its_size():
    for mode in MODES:
        assert chosen(fused=mode).mode == mode
    assert chosen(fused="none", max_logits_gb=0).mode == "materialised"
    baseline = from_mapping({"objective": "rft", "loss": {"max_logits_gb": 0}})
    assert choose_output_layer(baseline, COLUMNS).mode == "materialised"


def test_what_cannot_be_fused_is_refused_or_told():
    with pytest.raises(
        ConfigError, match=r"loss.fused=low_memory is not possible .* because it has a bias: set loss.fused"
    ):
        chosen("it has a bias", fused="low_memory")
    assert str(chosen("it has a bias", max_logits_gb=0)).endswith("; not fused, because it has a bias")
    assert chosen("it has a bias").note == "" and chosen("it has a bias", fused="none").note == ""
    assert "fused_chunk_tokens=16384 would not need less" in str(chosen(max_logits_gb=0, fused_chunk_tokens=ROWS))


def test_the_choice_is_told_in_a_line():
    assert str(chosen()) == "output layer: materialised, at most 2.00 GiB of logits per microbatch"
    assert str(chosen(fused="keep_gradient")) == (
        "output layer: fused with the loss in chunks of 4096 tokens, keep_gradient, at most 1.25 GiB of logits per "
        "microbatch"
    )


def own_rows_of(num_tokens: int, seed: int) -> tuple[int, bool]:
    """Rows that are sent per rank, and whether the tokens find theirs."""
    cuts = parallel(tp=4, sp=True)
    _, grid = models.build(models.model_config("gqa"), cuts)
    generator = torch.Generator().manual_seed(seed)
    whole = torch.randn(64, 1, 6, generator=generator)
    rows = torch.randperm(64, generator=generator)[:num_tokens]
    positions = output_layer.ResponsePositions.on_host(rows, len(whole), grid)
    own = whole.chunk(4)[grid.tp_rank][positions.own]
    everyones = torch.cat(_gathered(own, grid))
    return len(own), torch.equal(everyones[positions.gathered], whole[rows])


def _gathered(own: torch.Tensor, grid: Any) -> list[torch.Tensor]:
    parts = [torch.empty_like(own) for _ in range(grid.tp_size)]
    torch.distributed.all_gather(parts, own, group=grid.tp_group)
    return parts


@combinations(num_tokens=[0, 1, 7, 30, 64], seed=[0, 1], quick={"num_tokens": ["0", "7", "64"]}, strength=1)
def test_under_sequence_parallelism_each_rank_sends_its_own_rows_of_tokens(ranks, num_tokens, seed):
    found = ranks.run(own_rows_of, num_tokens, seed, world_size=4)
    (sent,) = {sent for sent, _ in found}
    assert all(right for _, right in found)
    assert -(-num_tokens // 4) <= sent <= min(num_tokens, 16)
