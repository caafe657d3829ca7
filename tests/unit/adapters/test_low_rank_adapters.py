# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Low-rank adapters: their start, their input behind fused norms, and the layers that have them."""

from __future__ import annotations

from types import SimpleNamespace

import models
import pytest
import torch

from megatron_selfdistill.adapters.low_rank_adapters import (
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


def factors_and_sizes(cuts: dict) -> tuple[dict[str, torch.Tensor], tuple]:
    """Return the factors of this rank by name, and the planned sizes; check that the factors alone are trained."""
    chunks, grid = models.build(models.model_config("gqa"), models.parallel(**cuts))
    (model,) = map(unwrapped, chunks)
    planned = adapter_sizes(model, ADAPTER, grid.tp_size)
    add_adapters(chunks, ADAPTER, grid)
    trained = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    assert sum(p.numel() for p in trained.values()) == planned.parameters
    assert {name for name, _ in model.named_parameters() if "_adapter." in name} == set(trained)
    return trained, (planned.model_parameters, planned.parameters, planned.columns)


def test_a_layout_cuts_the_same_random_factors_and_sizes_count_each_factor_once(ranks):
    ((whole, sizes),) = ranks.run(factors_and_sizes, {}, world_size=1)
    shards = ranks.run(factors_and_sizes, {"tp": 2, "sp": True}, world_size=2)
    for name, value in whole.items():
        layer = name.split(".")[-2]
        parts = [shard[name] for shard, _ in shards]
        if name.endswith(".b"):
            assert not value.any() and not any(part.any() for part in parts)
        elif layer in ("linear_qkv_adapter", "linear_fc1_adapter"):
            assert all(torch.equal(part, value) for part in parts)
        else:
            assert torch.equal(torch.cat(parts, dim=1), value)
    assert len({float(value.sum()) for name, value in whole.items() if name.endswith(".a")}) == len(whole) // 2
    of_model, parameters, columns = sizes
    assert columns == (4 * ADAPTER.rank,) * len(columns)
    for _, of_shard in shards:
        assert of_shard[0] == of_model == parameters < 2 * of_shard[1]
        assert of_shard[2] == (3 * ADAPTER.rank,) * len(columns), "z of two layers is cut into two shards"


class CopiedLinear(torch.nn.Module):
    """A stand-in for Transformer Engine's layer that is a copy on each tensor-parallel rank."""

    parallel_mode = None

    def __init__(self, weight: torch.nn.Parameter) -> None:
        super().__init__()
        self.weight = weight


def refusals() -> list[str]:
    """Return the message for a layer that the model lacks, and for one that tensor parallelism copies."""
    messages = []
    for adapter in (AdapterConfig(rank=2, layers=["linear_q_proj"]), ADAPTER):
        chunks, grid = models.build(models.model_config("gqa"), models.parallel(tp=2))
        attention = unwrapped(chunks[0]).decoder.layers[0].self_attention
        attention.linear_proj = CopiedLinear(attention.linear_proj.weight)
        with pytest.raises(ConfigError) as error:
            add_adapters(chunks, adapter, grid)
        messages.append(str(error.value))
    return messages


def test_layers_that_the_model_lacks_or_that_tensor_parallelism_copies_are_named(ranks):
    for lacking, copied in ranks.run(refusals, world_size=2):
        assert "adapter.layers=['linear_q_proj']" in lacking
        assert "decoder.layers.0.self_attention.linear_proj" in copied and "remove linear_proj from adapter" in copied


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
    norm = {"layer_norm_weight": weight - int(zero_centered), "layer_norm_bias": bias, "normalization": normalization}
    linear = SimpleNamespace(**norm, zero_centered_gamma=zero_centered, eps=1e-3)
    if normalization == "RMSNorm":
        wanted = x / (x.pow(2).mean(-1, keepdim=True) + 1e-3).sqrt() * weight
    else:
        wanted = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 1e-3).sqrt() * weight + bias
    torch.testing.assert_close(_normed(linear, x), wanted)
    assert _normed(torch.nn.Linear(8, 8), x) is x
