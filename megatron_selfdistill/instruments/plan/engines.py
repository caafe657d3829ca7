# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The load of the vLLM engines of a plan: arithmetic, not measurement.

An engine is full when the number of its sequences reaches the balance of the machine, or the number that the KV cache
holds at a time:

    balance = `Gpu.balance` * all parameters / parameters that a token uses (fewer in a mixture of experts)

The mean response and the mean prompt are assumed to be a third (`MEAN`) of the longest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_selfdistill.config import Config
from megatron_selfdistill.instruments.plan.gpus import RATES
from megatron_selfdistill.instruments.plan.memory import GIB, Load, element_size, engine_weight_gib
from megatron_selfdistill.instruments.plan.stages import Stage

if TYPE_CHECKING:
    from megatron_selfdistill.interop.hf.rules import Rule

MEAN = 1 / 3
"""The mean length of prompts and responses, as a share of the longest."""
# The share of a server's GPU that weights and KV cache take together if rollout.kv_cache_gb leaves the size to vLLM.
_SERVER_SHARE = 0.9


@dataclass(frozen=True)
class Engines:
    """The vLLM engines of a plan in one step."""

    sequences: float
    """The sequences that one engine generates in a step."""
    capacity: int
    """The sequences of mean length, half generated, that the KV cache of one engine holds at a time."""
    balance: float
    """The sequences at which computing takes as long as reading the weights."""
    update_bytes: int
    """The bytes that an engine receives after a step: all weights, or the factors of the adapters."""

    @property
    def full(self) -> float:
        """The number of sequences up to which further sequences take no more time."""
        return min(self.balance, self.capacity)


def engines(
    config: Config, transformer: Any, built: Sequence[Stage], num_gpus: int, kv_cache_gib: float, load: Load
) -> Engines:
    """Return the `Engines` of a configuration that samples with vLLM.

    ``transformer``: Megatron's configuration of the model.  ``built``: its stages.  ``kv_cache_gib``: GiB per GPU of a
    colocated engine's KV cache; this function computes the KV cache of a server.
    """
    rollout, data = config.rollout, config.data
    colocated = rollout.placement == "colocated"
    count = num_gpus // rollout.engine_tp if colocated else len(rollout.servers) or rollout.num_servers
    sequences = data.global_batch_size * rollout.num_samples / count
    parameters = sum(stage.model_parameters for stage in built)
    weight_gib = engine_weight_gib(config, parameters)
    if not colocated:
        left = _SERVER_SHARE * config.cluster.memory_of_gpu - weight_gib
        kv_cache_gib = left if rollout.kv_cache_gb is None else rollout.kv_cache_gb
    prompt = (data.max_length or 2 * rollout.max_new_tokens) - rollout.max_new_tokens
    held = MEAN * (prompt + rollout.max_new_tokens / 2)
    capacity = max(1, int(kv_cache_gib * GIB / kv_cache_bytes(config, transformer) / held))
    balance = RATES[config.cluster.gpu].balance * parameters / active_parameters(transformer, built)
    return Engines(
        sequences=sequences,
        capacity=capacity,
        balance=balance * element_size(config) / 2,
        update_bytes=(load.engine_factors or parameters) * element_size(config),
    )


def active_parameters(transformer: Any, built: Sequence[Stage]) -> float:
    """Return the number of parameters that a token uses: all but those of the experts that it does not visit."""
    held = sum(stage.model_parameters for stage in built)
    if not transformer.num_moe_experts:
        return held
    num_layers = sum(experts for stage in built for chunk in stage.chunks for experts in chunk)
    width = transformer.moe_ffn_hidden_size or transformer.ffn_hidden_size
    expert = (3 if transformer.gated_linear_unit else 2) * transformer.hidden_size * width
    return float(held - num_layers * expert * (transformer.num_moe_experts - transformer.moe_router_topk))


def engine_factors(config: Config, vocab_size: int) -> int:
    """Return the elements of the factors that vLLM engines receive: each module has its own copy of A.

    The modules are those of the model's Hugging Face family; 0 without adapters or without vLLM.
    """
    if not config.adapter.rank or not config.samples or config.rollout.engine != "vllm":
        return 0
    return sum(math.prod(shape) for rule in factor_rules(config, vocab_size) for shape in rule.hf_shapes)


def factor_rules(config: Config, vocab_size: int) -> list[Rule]:
    """Return the rules of the adapters' factors for the Hugging Face family of the model, with ``vocab_size`` rows."""
    from megatron_selfdistill.interop.hf.adapter_rules import adapter_rules
    from megatron_selfdistill.interop.hf.mapping import family_of, family_of_model
    from megatron_selfdistill.interop.hf_files import read_config

    given = config.rollout.hf_config
    family = family_of_model(config.model) if given is None else family_of(read_config(Path(given)))
    return adapter_rules(family.rules(replace(config.model, vocab_size=vocab_size)), config.adapter)


def backward_passes(config: Config) -> float:
    """Return the time of the student's backward pass, in forward passes.

    The gradients of inputs take one, and so do those of all weights, which frozen weights beside adapters lack;
    recomputing all layers is one more.
    """
    of_weights = 0.0 if config.adapter.rank else 1.0
    return 1.0 + of_weights + (config.schedule.recompute.granularity == "full")


def kv_cache_bytes(config: Config, transformer: Any) -> float:
    """Return the bytes of one token in the KV cache of one GPU of an engine.

    An engine with more GPUs than key heads holds each head more than once.  Every GPU holds the one vector of latent
    attention.  A layer with a sliding window counts like a layer with full attention, which is the most that it holds.
    """
    layers, size = transformer.num_layers, element_size(config)
    if getattr(transformer, "multi_latent_attention", False):
        return float(layers * size * (transformer.kv_lora_rank + transformer.qk_pos_emb_head_dim))
    heads = max(1.0, transformer.num_query_groups / config.rollout.engine_tp)
    return float(layers * size * 2 * heads * transformer.kv_channels)
