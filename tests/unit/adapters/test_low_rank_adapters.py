# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Low-rank adapters: their start, their input behind fused norms, and the layers that have them."""

from __future__ import annotations

from types import SimpleNamespace

import models
import pytest
import torch

from megatron_selfdistill.adapters.low_rank_adapters import (
    AdapterSizes,
    LowRankAdapter,
    WithoutAdapters,
    _normed,
    adapter_sizes,
    add_adapters,
)
from megatron_selfdistill.config.schema.adapter_config import AdapterConfig
from megatron_selfdistill.errors import ConfigError
from megatron_selfdistill.model.forward import unwrapped

ADAPTER = AdapterConfig(rank=3, alpha=6.0)


def factors(kind: str, sizes: dict, adapter: AdapterConfig = ADAPTER) -> dict[str, torch.Tensor]:
    """Return the factors of this rank by name, and check that they alone are trained."""
    chunks, grid = models.build(models.model_config(kind), models.parallel(**sizes))
    (model,) = map(unwrapped, chunks)
    planned = adapter_sizes(model, adapter, grid.tp_size)
    add_adapters(chunks, adapter, grid)
    trained = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    assert sum(p.numel() for p in trained.values()) == planned.parameters
    assert {name for name, _ in model.named_parameters() if "_adapter." in name} == set(trained)
    return trained


def test_a_layout_cuts_the_same_random_factors(ranks):
    (whole,) = ranks.run(factors, "gqa", {}, world_size=1)
    shards = ranks.run(factors, "gqa", {"tp": 2}, world_size=2)
    for name, value in whole.items():
        layer = name.split(".")[-2]
        parts = [shard[name] for shard in shards]
        if name.endswith(".b"):
            assert not value.any() and not any(part.any() for part in parts)
        elif layer in ("linear_qkv_adapter", "linear_fc1_adapter"):
            assert all(torch.equal(part, value) for part in parts)
        else:
            assert torch.equal(torch.cat(parts, dim=1), value)
    assert len({float(value.sum()) for name, value in whole.items() if name.endswith(".a")}) == len(whole) // 2


def sizes(kind: str, cuts: dict) -> AdapterSizes:
    chunks, grid = models.build(models.model_config(kind), models.parallel(**cuts))
    return adapter_sizes(unwrapped(chunks[0]), ADAPTER, grid.tp_size)


def test_the_whole_model_counts_each_factor_once_and_each_rank_the_columns_of_its_tokens(ranks):
    (whole,) = ranks.run(sizes, "gqa", {}, world_size=1)
    shards = ranks.run(sizes, "gqa", {"tp": 2, "sp": True}, world_size=2)
    for shard in shards:
        assert shard.model_parameters == whole.model_parameters == whole.parameters < 2 * shard.parameters
    assert whole.columns == (4 * ADAPTER.rank,) * len(whole.columns)
    assert shards[0].columns == (3 * ADAPTER.rank,) * len(whole.columns), "z of two layers is cut into two shards"


def test_routed_experts_and_other_layers_have_no_adapters(ranks):
    (found,) = ranks.run(factors, "moe", {}, AdapterConfig(rank=2, layers=["linear_proj", "linear_fc2"]), world_size=1)
    layers = {name.split("layers.")[1].split(".", 1)[1] for name in found}
    assert layers == {"self_attention.linear_proj_adapter.a", "self_attention.linear_proj_adapter.b"}


def refused() -> str:
    chunks, grid = models.build(models.model_config("gqa"), models.parallel())
    with pytest.raises(ConfigError) as error:
        add_adapters(chunks, AdapterConfig(rank=2, layers=["linear_q_proj"]), grid)
    return str(error.value)


def test_layers_that_the_model_lacks_are_one_sentence(ranks):
    (message,) = ranks.run(refused, world_size=1)
    assert "adapter.layers=['linear_q_proj']: a stage of the pipeline has no such layer" in message


class CopiedLinear(torch.nn.Module):
    """A stand-in for Transformer Engine's layer that is a copy on each tensor-parallel rank."""

    parallel_mode = None

    def __init__(self, weight: torch.nn.Parameter) -> None:
        super().__init__()
        self.weight = weight


def refused_copy() -> str:
    chunks, grid = models.build(models.model_config("gqa"), models.parallel(tp=2))
    attention = unwrapped(chunks[0]).decoder.layers[0].self_attention
    attention.linear_proj = CopiedLinear(attention.linear_proj.weight)
    with pytest.raises(ConfigError) as error:
        add_adapters(chunks, ADAPTER, grid)
    return str(error.value)


def test_a_layer_that_tensor_parallelism_copies_is_one_sentence(ranks):
    for message in ranks.run(refused_copy, world_size=2):
        assert message == (
            "decoder.layers.0.self_attention.linear_proj is a whole copy on each of 2 tensor-parallel ranks, expected "
            "a layer that they share: remove linear_proj from adapter.layers, or set "
            "parallel.tensor_model_parallel_size=1"
        )


def base_and_adapted() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the output of the embedding and first layer: of the base, with new adapters, and with changed adapters."""
    chunks, grid = models.build(models.model_config("shallow"), models.parallel())
    (model,) = map(unwrapped, chunks)
    tokens = torch.arange(7)[None]

    def output(module):
        return module(tokens, tokens, torch.ones(1, 1, 7, 7).triu(1).bool())

    before = output(model)
    add_adapters(chunks, ADAPTER, grid)
    new = output(model)
    for module in model.modules():
        if isinstance(module, LowRankAdapter):
            torch.nn.init.normal_(module.b)
    assert not torch.equal(output(model), before)
    without = output(WithoutAdapters(chunks[0]))
    assert all(m.enabled for m in model.modules() if isinstance(m, LowRankAdapter))
    return before.detach(), new.detach(), without.detach()


def test_the_model_is_the_base_at_the_start_and_without_its_adapters(ranks):
    ((before, new, without),) = ranks.run(base_and_adapted, world_size=1)
    assert torch.equal(new, before) and torch.equal(without, before)


@pytest.mark.parametrize("zero_centered", [False, True])
@pytest.mark.parametrize("normalization", ["RMSNorm", "LayerNorm"])
def test_a_layer_with_a_fused_norm_gives_its_adapter_the_normed_input(normalization, zero_centered):
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in [(5, 1, 8), 8, 8])
    linear = SimpleNamespace(
        layer_norm_weight=weight - int(zero_centered),
        layer_norm_bias=bias,
        zero_centered_gamma=zero_centered,
        normalization=normalization,
        eps=1e-3,
    )
    if normalization == "RMSNorm":
        wanted = x / (x.pow(2).mean(-1, keepdim=True) + 1e-3).sqrt() * weight
    else:
        wanted = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 1e-3).sqrt() * weight + bias
    torch.testing.assert_close(_normed(linear, x), wanted)
    assert _normed(torch.nn.Linear(8, 8), x) is x
