# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The factors of adapters as Hugging Face tensors, from a live model in several layouts."""

from __future__ import annotations

from typing import Any

import adapted
import hf_models
import models
import pytest
import torch
from tiers import combinations
from torch import Tensor

from megatron_selfdistill.adapters.low_rank_adapters import add_adapters
from megatron_selfdistill.config import ModelConfig, ParallelConfig
from megatron_selfdistill.config.schema.adapter_config import AdapterConfig
from megatron_selfdistill.errors import ConfigError
from megatron_selfdistill.interop.export import Exporter
from megatron_selfdistill.interop.hf.adapter_rules import PEFT_PREFIX, adapter_rules, is_adapter_key
from megatron_selfdistill.interop.hf.family import Family
from megatron_selfdistill.interop.hf.mapping import family_of
from megatron_selfdistill.model.build import build_chunks
from megatron_selfdistill.model.forward import unwrapped

LATENT = "linear_q_down_proj linear_q_up_proj linear_kv_down_proj linear_kv_up_proj"
ADAPTER = AdapterConfig(rank=3, alpha=6.0)
DENSE = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
MOE = {"tp": 2, "ep": 2, "etp": 1, "sp": True}
ATTENTION = ["k_proj", "o_proj", "q_proj", "v_proj"]
COMPRESSED = "down_proj gate_proj kv_a_proj_with_mqa kv_b_proj o_proj q_a_proj q_b_proj up_proj".split()
LAYOUTS: dict[str, tuple[str, dict[str, Any], int, list[str]]] = {
    "Qwen2, TP2xPP2xVPP2": ("qwen2", {"tp": 2, "pp": 2, "vpp": 2}, 4, DENSE),
    "Phi-3, TP2": ("phi3", {"tp": 2}, 2, ["down_proj", "gate_up_proj", "o_proj", "qkv_proj"]),
    "GLM, TP2xEP2+SP": ("glm4_moe", MOE, 2, DENSE),
    "OLMoE, TP2+SP": ("olmoe", {"tp": 2, "sp": True}, 2, ATTENTION),
    "Qwen2-MoE, TP2xEP2+SP": ("qwen2_moe", MOE, 2, DENSE),
    "Qwen3-Next, TP2+SP": ("qwen3_next", {"tp": 2, "sp": True}, 2, DENSE),
    "GPT-OSS, TP2xEP2+SP": ("gpt_oss", MOE, 2, ATTENTION),
    "DeepSeek, PP2": ("deepseek_v3", {"pp": 2}, 2, COMPRESSED),
}
"""Name -> the kind of the model, its layout and ranks, and the modules that have adapters."""
QUICK = ["GLM, TP2xEP2+SP", "DeepSeek, PP2"]


def of_kind(kind: str) -> tuple[Family, ModelConfig]:
    config = hf_models.hf_config(kind).to_dict() | {"architectures": [], "vocab_size": models.VOCAB_SIZE}
    family = family_of(config)
    return family, family.model_config(config | {"architectures": [family.architecture]})


def layers_of(model: ModelConfig) -> AdapterConfig:
    if not model.transformer.get("multi_latent_attention"):
        return ADAPTER
    return AdapterConfig(rank=3, alpha=6.0, layers=[*ADAPTER.layers, *LATENT.split()])


def exported(kind: str, parallel: ParallelConfig) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Return the Hugging Face tensors of the base, of the factors, and of the model with the factors merged."""
    family, model = of_kind(kind)
    chunks, grid = models.build(model, parallel)
    adapter = layers_of(model)
    add_adapters(chunks, adapter, grid)
    models.fill_from_names(chunks)
    plain = build_chunks(model, unwrapped(chunks[0]).config, grid, models.VOCAB_SIZE)
    models.fill_from_names(plain)
    adapted.merge(chunks, plain)
    rules = family.rules(model)
    factors = adapter_rules(rules, adapter)

    def tensors(*arguments, **options) -> dict[str, Tensor]:
        stream = Exporter(*arguments, bucket_bytes=4_000, **options).stream()
        return {name: tensor.clone() for bucket in stream for name, tensor in bucket}

    base = tensors(chunks, grid, rules, part=lambda key: not is_adapter_key(key))
    return base, tensors(chunks, grid, factors, part=is_adapter_key), tensors(plain, grid, rules)


@combinations(layout=list(LAYOUTS), quick={"layout": QUICK}, strength=1)
def test_the_product_of_the_factors_is_what_each_module_gains(ranks, layout):
    kind, sizes, world_size, modules = LAYOUTS[layout]
    for base, factors, merged in ranks.run(exported, kind, models.parallel(**sizes), world_size=world_size):
        assert base.keys() == merged.keys()
        adapted_modules = set()
        for name, weight in base.items():
            module = PEFT_PREFIX + name.removesuffix(".weight")
            a, b = (factors.pop(f"{module}.lora_{factor}.weight", None) for factor in "AB")
            if a is None or b is None:
                assert a is None and b is None and torch.equal(weight, merged[name]), name
                continue
            assert a.shape == (3, weight.shape[1]) and b.shape == (weight.shape[0], 3)
            assert ".experts." not in name
            gained = weight + (2.0 * b.double() @ a.double()).float()
            torch.testing.assert_close(merged[name], gained, rtol=1e-6, atol=1e-6)
            assert not torch.allclose(merged[name], weight, atol=1e-2), name
            adapted_modules.add(name.split(".")[-2])
        assert not factors and sorted(adapted_modules) == modules


def test_factors_return_to_megatron_and_modules_that_share_a_layer_must_share_a():
    family, model = of_kind("qwen2")
    rules = adapter_rules(family.rules(model), AdapterConfig(rank=2, layers=["linear_qkv"]))
    assert len(rules) == 2 * model.num_layers and all(is_adapter_key(rule.megatron.key) for rule in rules)
    for rule in rules[:2]:
        factor = torch.randn(rule.shape)
        assert torch.equal(rule.to_megatron(*rule.to_hf(factor)), factor)
    names = [name.removeprefix(f"{PEFT_PREFIX}model.layers.0.self_attn.") for name in rules[0].hf_names]
    assert names == ["q_proj.lora_A.weight", "k_proj.lora_A.weight", "v_proj.lora_A.weight"]
    a = torch.randn(rules[0].shape)
    with pytest.raises(ConfigError, match="different factors A"):
        rules[0].to_megatron(a, a, a + 1)
    with pytest.raises(ConfigError, match="linear_q_proj"):
        adapter_rules(family.rules(model), AdapterConfig(rank=2, layers=["linear_q_proj"]))
