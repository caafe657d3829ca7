# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The arithmetic of a step, part by part, under the names of the phases that a run logs; nothing here is measured.

    seconds of a part = work in FLOP or bytes / rate

    rollout    batches * longest response in training * weights of a GPU / copied bytes per second, because an engine
               reads all of its weights for every token of the sequences that its KV cache holds at a time (of mean
               length, half written); and the keys and values that each token reads
    sync       weights / rate of the links
    train      2 FLOP per parameter and token of each pass and the products of attention / (GPUs * FLOP/s * `MFU`), of
               which a pipeline loses its bubble

The optimizer, the exchange of gradients and the gaps between kernels are left out.
Mean prompts and responses are a third (`MEAN`) of the longest, and no response is longer than the last rollout.horizon.
FLOP/s and links are those of NVIDIA's data sheets.
The bytes that a copy reaches are what others report of an H100 and an H200; a B200 is assumed to reach the same share.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_selfdistill.choices import GPUS
from megatron_selfdistill.config import Config
from megatron_selfdistill.config.schema.target_config import planned_controls
from megatron_selfdistill.instruments.plan.memory import GIB, Load, element_size, engine_weight_gib, update_bytes
from megatron_selfdistill.instruments.plan.stages import PlannedModel
from megatron_selfdistill.teachers.teachers_config import joins


@dataclass(frozen=True)
class Gpu:
    """What one GPU does in a second."""

    copied: float
    """The bytes that a copy within its own memory reaches, read and written together."""
    flops: float
    """The FLOP of its dense bf16 matrix products."""
    link: float
    """The bytes that the GPU sends to the GPUs of its node, and receives at the same time."""


_RATES = (
    Gpu(copied=2.9e12, flops=989e12, link=450e9),
    Gpu(copied=4.3e12, flops=989e12, link=450e9),
    Gpu(copied=7.0e12, flops=2250e12, link=900e9),
)
RATES = dict(zip(GPUS, _RATES, strict=True))
"""The kind of GPU of cluster.gpu -> its `Gpu`."""
MFU = 0.35
"""The share of `Gpu.flops` that training reaches: 30 to 40 % is usual on an H100."""
NETWORK = 45e9
"""The bytes per second that a GPU sends to other nodes, through 400 Gb/s of its own."""
_SERVER_SHARE = 0.9
"""The share of a server's GPU that weights and KV cache take if rollout.kv_cache_gb leaves the size to vLLM."""
MEAN = 1 / 3
"""The mean length of prompts and responses, as a share of the longest."""


@dataclass(frozen=True)
class StepPart:
    """One line of the arithmetic of a step."""

    phase: str
    """The phase of a step whose ``seconds/PHASE`` a run logs."""
    name: str
    work: float
    """The FLOP of all GPUs, or the bytes of one GPU."""
    unit: str
    """FLOP or B."""
    rate: float
    """The work per second."""

    @property
    def seconds(self) -> float:
        """The seconds of this part."""
        return self.work / self.rate


def parts_of_step(
    config: Config,
    student: PlannedModel,
    teachers: Mapping[str, PlannedModel],
    load: Load,
    bubble: float,
    kv_cache_gib: float,
) -> list[StepPart]:
    """Return the lines of the arithmetic, in the order of a step in which generation and training take turns.

    ``teachers``: those of another architecture than the student's, by name.  ``bubble``: the share of a step's training
    in which a pipeline stage waits.  ``kv_cache_gib``: the KV cache of a colocated engine per GPU.  The phases rollout
    and sync exist with vLLM alone.
    """
    training = [*_train(config, student, teachers, bubble)]
    if config.samples and config.rollout.engine == "vllm":
        return [*_rollout(config, student, load, kv_cache_gib), _sync(config, load), *training]
    return training


def backward_passes(config: Config) -> float:
    """Return the time of the student's backward pass, in forward passes.

    The gradients of inputs take one, and so do those of all weights, which frozen weights beside adapters lack;
    recomputing all layers is one more.
    """
    of_weights = 0.0 if config.adapter.rank else 1.0
    return 1.0 + of_weights + (config.schedule.recompute.granularity == "full")


def _lengths(config: Config) -> tuple[float, float]:
    """Return the mean tokens of a prompt and of a response in training."""
    longest, horizon = config.rollout.max_new_tokens, config.rollout.longest_trained
    return MEAN * ((config.data.max_length or 2 * longest) - longest), min(MEAN * longest, horizon)


def _rollout(config: Config, student: PlannedModel, load: Load, kv_cache_gib: float) -> Iterator[StepPart]:
    """Yield the reads of an engine; a response reads its prompt and what it has written, for each of its tokens."""
    rollout, cluster, (prompt, response) = config.rollout, config.cluster, _lengths(config)
    copied, weight_gib = RATES[cluster.gpu].copied, engine_weight_gib(config, load.model_parameters)
    num_engines = (cluster.num_gpus or 1) // rollout.engine_tp
    if rollout.placement == "server":
        num_engines = len(rollout.servers) or rollout.num_servers
        kv_cache_gib = rollout.kv_cache_gb or _SERVER_SHARE * cluster.memory_of_gpu - weight_gib
    sequences = config.data.global_batch_size * rollout.num_samples / num_engines
    held = (prompt + response / 2) * kv_cache_bytes(config, student.transformer)
    batches = max(1.0, sequences / max(1, int(kv_cache_gib * GIB / held)))
    yield StepPart("rollout", "weights", batches * rollout.longest_trained * weight_gib * GIB, "B", copied)
    yield StepPart("rollout", "keys and values", sequences * response * held, "B", copied)


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


def _sync(config: Config, load: Load) -> StepPart:
    """Return the update of the engines: over the links of a replica, or from one GPU to all servers."""
    p, size = config.parallel, update_bytes(config, load)
    if config.rollout.placement == "server":
        return StepPart("sync", "weights to servers", size, "B", NETWORK)
    apart = config.cluster.num_gpus or 1 if p.pipeline_model_parallel_size > 1 else p.tensor_model_parallel_size
    one_node = max(apart, p.expert_model_parallel_size) <= config.cluster.gpus_per_node
    rate = RATES[config.cluster.gpu].link if one_node else NETWORK
    return StepPart("sync", "weights to engines", size / config.rollout.engine_tp, "B", rate)


def _train(
    config: Config, student: PlannedModel, teachers: Mapping[str, PlannedModel], bubble: float
) -> Iterator[StepPart]:
    """Yield the passes of each model; several teachers read equal shares, and each teacher of a product reads all."""
    responses, length = config.data.global_batch_size * config.rollout.num_samples, sum(_lengths(config))
    rate = (config.cluster.num_gpus or 1) * RATES[config.cluster.gpu].flops * MFU * (1 - bubble)
    names = list(config.named_teachers)
    each = 1.0 if joins(config.teachers) or not names else 1.0 / len(names)
    alike = (len(names) - len(teachers)) * each if names else 1.0
    models = {"student": (1 + backward_passes(config), student)}
    if config.has_teacher and alike:
        models["teacher"] = (alike, student)
        if controls := planned_controls(config):
            models["controls"] = (alike * controls, student)
    models |= {f"teacher {name}": (each, model) for name, model in teachers.items()}
    if config.is_anchored:
        models["reference"] = (1.0, student)
    for name, (passes, model) in models.items():
        yield StepPart("train", name, passes * responses * _forward_flops(model, length), "FLOP", rate)


def _forward_flops(model: PlannedModel, length: float) -> float:
    """Return the FLOP of one sequence of ``length`` tokens; attention is causal."""
    config = model.transformer
    width = config.kv_channels * 2
    if getattr(config, "multi_latent_attention", False):
        width = config.qk_head_dim + config.qk_pos_emb_head_dim + config.v_head_dim
    products = float(config.num_layers * config.num_attention_heads * width) * length**2
    return 2.0 * active_parameters(model) * length + products


def active_parameters(model: PlannedModel) -> float:
    """Return the number of parameters that a token uses: all but those of the experts that it does not visit."""
    config = model.transformer
    if not config.num_moe_experts:
        return model.parameters
    num_layers = sum(experts for stage in model.stages for chunk in stage.chunks for experts in chunk)
    width = config.moe_ffn_hidden_size or config.ffn_hidden_size
    expert = (3 if config.gated_linear_unit else 2) * config.hidden_size * width
    return float(model.parameters - num_layers * expert * (config.num_moe_experts - config.moe_router_topk))
