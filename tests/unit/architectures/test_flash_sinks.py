# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Sinks beside Transformer Engine's layers: flash attention, corrected by its log-sum-exp, is the softmax with a sink.

The operators of flash attention are those of `tests.support.flash_attention`, whose backward pass reads the output and
the log-sum-exp that it is handed, as the CUDA kernel does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import flash_attention
import pytest
import torch
import torch.distributed as dist
from hf_models import packed
from models import fill_from_names
from torch import Tensor

from megatron_selfdistill.compat import repairs  # noqa: F401  isort: skip  (must come before megatron.core)
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_selfdistill.architectures.flash_sinks import FlashSinkAttention
from megatron_selfdistill.config import ModelConfig, OptimizerConfig, ParallelConfig, ScheduleConfig, load
from megatron_selfdistill.data.context_parallel import context_parallel_positions
from megatron_selfdistill.distributed.ranks import initialize
from megatron_selfdistill.errors import ConfigError
from megatron_selfdistill.model import architecture
from megatron_selfdistill.model.architecture import layer_spec, transformer_config
from megatron_selfdistill.model.build import build_chunks
from megatron_selfdistill.model.forward import ModelInputs, hidden_states, project, unwrapped, uses_local_attention
from megatron_selfdistill.model.known_faults import refuse_known_faults

HEADS, GROUPS, CHANNELS = 4, 2, 8
SINKS = (0.5, -2.0, 3.0, 1.0)
LENGTHS = [1, 3, 40, 17, 1, 8]
VARIANTS: dict[str, dict[str, Any]] = {"full": {}, "window": {"window_size": (5, 0)}}
ROWS: dict[str, tuple[float, list[float], list[int]]] = {
    "peaked": (3.0, list(SINKS), LENGTHS),
    "logits of thousands": (1e3, [5e3, -5e3, 1e3, 0.0], LENGTHS),
    "sinks far above": (1.0, [1e4, 60.0, 30.0, 1e3], LENGTHS),
    "sinks far below": (1.0, [-1e4, -60.0, -30.0, -1e3], LENGTHS),
    "sequences of one token": (3.0, list(SINKS), [1, 1, 1]),
}
"""Name -> the size of queries, the sinks, and the lengths of the packed sequences."""


@pytest.fixture(autouse=True)
def flash_attention_on_cpu() -> Iterator[None]:
    with flash_attention.on_cpu():
        yield


def config(**changes: Any) -> TransformerConfig:
    values = {"num_layers": 1, "hidden_size": HEADS * CHANNELS, "num_attention_heads": HEADS}
    values |= {"num_query_groups": GROUPS, "softmax_type": "learnable", "use_cpu_initialization": True}
    return TransformerConfig(**values | {"attention_dropout": 0.0} | changes)


def attention(sinks: list[float], dtype: torch.dtype, group: Any = None, **changes: Any) -> FlashSinkAttention:
    one = SimpleNamespace(size=lambda: 1, rank=lambda: 0)
    made = FlashSinkAttention(config(**changes), 1, None, "self", pg_collection=SimpleNamespace(cp=group or one))
    made.softmax_offset.data = torch.tensor(sinks, dtype=dtype)
    return made


def segments(lengths: list[int]) -> PackedSeqParams:
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    longest = max(lengths)
    return PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds, max_seqlen_q=longest, max_seqlen_kv=longest
    )


def inputs(size: float, num_tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return queries, keys, values and the gradient of the output."""
    generator = torch.Generator().manual_seed(0)
    heads = (HEADS, GROUPS, GROUPS, HEADS)
    q, k, v, dy = (torch.randn(num_tokens, n, CHANNELS, generator=generator, dtype=torch.float64) for n in heads)
    return (size * q).to(dtype), k.to(dtype), v.to(dtype), dy.flatten(1).to(dtype)


def definition(row: str, variant: str, dtype: torch.dtype) -> list[Tensor]:
    """Return the definition's output and gradients of queries, keys, values and sinks in float64."""
    size, sinks, lengths = ROWS[row]
    *qkv, dy = (x.double() for x in inputs(size, sum(lengths), dtype))
    leaves = [x.requires_grad_() for x in (*qkv, torch.tensor(sinks, dtype=dtype).double())]
    out = flash_attention.softmax_with_sinks(*leaves, lengths, *VARIANTS[variant].get("window_size", [None])[:1])
    return with_gradients(out, dy, leaves)


def with_gradients(out: Tensor, dy: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    out.backward(dy)
    return [out.detach(), *(leaf.grad for leaf in leaves)]


def computed(row: str, variant: str, dtype: torch.dtype) -> list[Tensor]:
    """Return what `definition` returns, as `FlashSinkAttention` computes it."""
    size, sinks, lengths = ROWS[row]
    *qkv, dy = inputs(size, sum(lengths), dtype)
    layer = attention(sinks, dtype, **VARIANTS[variant])
    leaves = [x.requires_grad_() for x in qkv]
    out = layer(*leaves, packed_seq_params=segments(lengths))
    return with_gradients(out, dy, [*leaves, layer.softmax_offset])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("row", ROWS)
def test_output_and_all_gradients_equal_the_definition(row, variant):
    """In float64 throughout, so that only a wrong formula can differ by more than the conditioning of the scores."""
    largest = ROWS[row][0] * 40  # the scores' bound: an error of 2**-53 in them is an error of the probabilities
    for got, expected in zip(
        computed(row, variant, torch.float64), definition(row, variant, torch.float64), strict=True
    ):
        bound = 64 * largest * 2.0**-53 * max(1.0, float(expected.abs().max()))
        assert got.dtype == torch.float64 and got.isfinite().all()
        torch.testing.assert_close(got, expected, rtol=0, atol=bound)


@pytest.mark.parametrize("variant", VARIANTS)
def test_in_bf16_the_output_is_rounded_twice_and_the_sinks_are_corrected_in_float32(variant):
    out, *_, of_sinks = computed("peaked", variant, torch.bfloat16)
    expected, *_, expected_of_sinks = definition("peaked", variant, torch.bfloat16)
    assert out.dtype == of_sinks.dtype == torch.bfloat16
    twice = 2 * 2.0**-8 + 2.0**-15  # by flash attention, and here; the rest covers float32
    torch.testing.assert_close(out.double(), expected, rtol=twice, atol=0)
    dy = inputs(ROWS["peaked"][0], sum(LENGTHS), torch.bfloat16)[-1].double()
    terms = (dy * expected).abs().unflatten(1, (HEADS, CHANNELS)).sum((0, 2))  # their rounding; P of a sink is below 1
    assert ((of_sinks.double() - expected_of_sinks).abs() <= twice * terms + 2.0**-8 * expected_of_sinks.abs()).all()


def test_in_bf16_a_sink_beside_large_logits_keeps_its_share():
    """The sum of the exponentials would overflow, and bf16 would round 40.25 - 40 to another number."""
    layer = attention([40.25] * HEADS, torch.bfloat16)
    q, k, v = (torch.ones(1, n, CHANNELS, dtype=torch.bfloat16) for n in (HEADS, GROUPS, GROUPS))
    q *= 40.0 / CHANNELS**0.5
    score = float(q[0, 0, 0].double() * CHANNELS / CHANNELS**0.5)
    share = 1 / (1 + torch.tensor(40.25 - score, dtype=torch.float64).exp())
    out = layer(q, k, v, packed_seq_params=segments([1]))
    torch.testing.assert_close(out.double(), share.expand(1, HEADS * CHANNELS), rtol=2.0**-8, atol=0)


def test_frozen_sinks_get_no_gradient_and_the_others_are_unchanged():
    *qkv, dy = inputs(3.0, sum(LENGTHS), torch.float64)
    found = []
    for frozen in (False, True):
        layer, leaves = attention(list(SINKS), torch.float64), [x.clone().requires_grad_() for x in qkv]
        layer.softmax_offset.requires_grad_(not frozen)
        found.append(with_gradients(layer(*leaves, packed_seq_params=segments(LENGTHS)), dy, leaves))
        assert (layer.softmax_offset.grad is None) == frozen
    assert all(map(torch.equal, *found))


# -- context parallelism -----

CP_LENGTHS = [8, 24, 8, 16]


def of_cp_rank(variant: str) -> list[Tensor]:
    """Return the positions of this context-parallel rank, and what `computed` returns there."""
    group = dist.group.WORLD
    held = context_parallel_positions(torch.tensor([0, *CP_LENGTHS]).cumsum(0), group.size(), group.rank())
    *qkv, dy = (x[held] for x in inputs(3.0, sum(CP_LENGTHS), torch.float64))
    layer = attention(list(SINKS), torch.float64, group, **VARIANTS[variant])
    leaves, bounds = [x.requires_grad_() for x in qkv], segments(CP_LENGTHS)
    with flash_attention.on_cpu():
        out = layer(*leaves, packed_seq_params=bounds)
        assert torch.equal(layer(*leaves, packed_seq_params=bounds), out), "the segments are kept"
        return [held, *with_gradients(out, dy, [*leaves, layer.softmax_offset])]


@pytest.mark.parametrize(
    ("variant", "cp_size"), [("full", 2), ("window", 2), pytest.param("window", 4, marks=pytest.mark.full)]
)
def test_context_parallel_ranks_compute_their_part_of_the_definition(ranks, variant, cp_size):
    *qkv, dy = inputs(3.0, sum(CP_LENGTHS), torch.float64)
    leaves = [x.requires_grad_() for x in (*qkv, torch.tensor(SINKS, dtype=torch.float64))]
    left = VARIANTS[variant].get("window_size", [None])[0]
    out = flash_attention.softmax_with_sinks(*leaves, CP_LENGTHS, left)
    *expected, of_sinks = with_gradients(out, dy, leaves)
    per_rank = ranks.run(of_cp_rank, variant, world_size=cp_size)
    for held, *parts, _ in per_rank:
        for part, whole in zip(parts, expected, strict=True):
            torch.testing.assert_close(part, whole[held])
    torch.testing.assert_close(torch.stack([of_rank[-1] for of_rank in per_rank]).sum(0), of_sinks)


# -- the operators of PyTorch -----


# -- the model -----


class EngineAttention(torch.nn.Module):
    """Stands for Transformer Engine's attention before 2.12."""

    def __init__(self, config: TransformerConfig, *_: Any, **__: Any) -> None:
        super().__init__()
        self.softmax_type = config.softmax_type

    def forward(self, *_: Any, packed_seq_params: Any = None, **__: Any) -> Tensor:
        raise ValueError("No dot product attention backend is available for the provided inputs.")


def as_if_transformer_engine(patch: pytest.MonkeyPatch) -> None:
    """Let Megatron Core's spec for Transformer Engine have the local layers, but an `EngineAttention`."""
    of_megatron = architecture.get_gpt_decoder_block_spec

    def block_spec(config: TransformerConfig, *, use_transformer_engine: bool, **options: Any) -> Any:
        if not use_transformer_engine:
            return of_megatron(config, use_transformer_engine=False, **options)
        block = layer_spec(config, options["vp_stage"], transformer_engine=False)
        for spec in block.layer_specs:
            spec.submodules.self_attention.submodules.core_attention = EngineAttention
        return block

    patch.setattr(architecture, "get_gpt_decoder_block_spec", block_spec)


def tiny_gpt_oss() -> ModelConfig:
    shipped = load(["model=gpt_oss_120b"]).model
    sizes = {"num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 32, "moe_ffn_hidden_size": 32, "kv_channels": 8}
    heads = {"num_attention_heads": HEADS, "num_query_groups": GROUPS}
    experts = {"num_moe_experts": 4, "moe_router_topk": 2, "vocab_size": 61, "make_vocab_size_divisible_by": 8}
    transformer = {**shipped.transformer, "window_size": [3, 0]}
    return dataclasses.replace(shipped, **sizes, **heads, **experts, transformer=transformer)


def logits_of_both_kinds() -> tuple[list[list[str]], list[Tensor]]:
    """Return the kinds of attention of the model for Transformer Engine and of that with local layers, and the logits.

    A model without sinks keeps the attention of Transformer Engine.
    """
    grid, model = initialize(ParallelConfig(), seed=1), tiny_gpt_oss()
    settings = transformer_config(model, ParallelConfig(), OptimizerConfig(precision="fp32"), ScheduleConfig())
    microbatch = packed([[5, 7, 11, 2, 9, 4, 1], [3], [8, 6, 10, 12, 0]])
    kinds, logits = [], []
    with pytest.MonkeyPatch.context() as patch, flash_attention.on_cpu(), torch.no_grad():
        as_if_transformer_engine(patch)
        for transformer_engine in (True, False):
            [chunk] = build_chunks(model, settings, grid, 61, transformer_engine=transformer_engine)
            fill_from_names([chunk])
            chunk.double()
            local = uses_local_attention([chunk])
            assert local == (not transformer_engine)
            layers = unwrapped(chunk).decoder.layers
            kinds.append([type(layer.self_attention.core_attention).__name__ for layer in layers])
            hidden = hidden_states(chunk, ModelInputs.on_host(microbatch, grid, local_attention=local), grid)
            logits.append(project(unwrapped(chunk), hidden))
        block = layer_spec(config(softmax_type="vanilla", normalization="RMSNorm"), transformer_engine=True)
    kinds.append([spec.submodules.self_attention.submodules.core_attention.__name__ for spec in block.layer_specs])
    return kinds, logits


def test_gpt_oss_on_transformer_engines_spec_attends_by_flash_attention_to_packed_sequences(ranks):
    [((of_engine, _, without_sinks), logits)] = ranks.run(logits_of_both_kinds, world_size=1)
    assert of_engine == ["FlashSinkAttention"] * 2 and without_sinks == ["EngineAttention"]
    torch.testing.assert_close(*logits, rtol=1e-5, atol=1e-5)
    assert logits[0].std() > 0.1


def test_sinks_that_flash_attention_cannot_compute_are_refused():
    for name in "multi_latent_attention fp8_dot_product_attention fp8_multi_head_attention deterministic_mode".split():
        refused = config(bf16=True, hidden_dropout=0.0)
        setattr(refused, name, True)
        refuse_known_faults(refused, transformer_engine=False)  # our attention can
        with pytest.raises(ConfigError, match="with Transformer Engine's layers"):
            refuse_known_faults(refused, transformer_engine=True)
        refused.softmax_type = "vanilla"
        refuse_known_faults(refused, transformer_engine=True)
    for communication in ("p2p", "a2a", "all_gather"):  # windows beside sinks are cut by our attention
        fields = {"window_size": (8, 0), "cp_comm_type": communication, "context_parallel_size": 2}
        refuse_known_faults(config(bf16=True, hidden_dropout=0.0, **fields), transformer_engine=True)
