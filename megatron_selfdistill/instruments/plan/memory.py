# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The GiB on one rank of a pipeline stage, part by part, while it trains and while it samples responses.

The numbers are arithmetic, not measurement: parameters are counted exactly, activations after Korthikanti et al. 2022
(arXiv 2205.05198, section 4) for grouped queries, gated MLPs and experts, with flash attention, Transformer Engine's
fused layers, no dropout, and an equal number of tokens for every expert.  `reserved_gib` stands for the rest.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_selfdistill.config.schema.target_config import planned_controls
from megatron_selfdistill.teachers.teachers_config import joins, keeps_start

from megatron_selfdistill.compat import repairs  # noqa: F401  isort: skip  (must come before megatron.core)
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_selfdistill.config import Config
from megatron_selfdistill.instruments.plan.stages import Stage
from megatron_selfdistill.model.layers import ALL_HEADS
from megatron_selfdistill.model.output_layer import choose_output_layer

if TYPE_CHECKING:
    from megatron_selfdistill.interop.hf.rules import Rule

CONTEXT_GIB = 3.0
"""The GiB of CUDA's context, the libraries' workspaces and fragmentation."""
COMMUNICATOR_GIB = 0.3
"""The GiB of the buffers of one communicator of NCCL."""
_LAYERS_PER_GIB = 36  # of the CUDA graphs of a vLLM engine, which stay when the engine sleeps

GIB = 2**30
NAMED = "named teachers"
"""The part of the teachers of the key ``teachers`` that have weights of their own."""


@dataclass(frozen=True)
class Load:
    """The load of a step on a rank, besides parameters."""

    seq_length: int
    """The tokens of one microbatch."""
    response_tokens: int
    """The largest number of response tokens of one replica and step."""
    in_flight: int
    """The student's microbatches, of one chunk each, whose activations are held at a time."""
    alternating: bool
    """Whether the pair order alternates, so that the rank holds the teacher's hidden states of one microbatch only."""
    vocab_size: int
    """The rows of the output layer's weight, padding included."""
    model_parameters: int
    """The parameters of the whole model, which a colocated engine holds."""
    engine_factors: int = 0
    """The elements of the factors of adapters that an engine holds beside them; at most all of them on each GPU."""
    other_widths: Mapping[str, int] = field(default_factory=dict)
    """The hidden size of each teacher of another architecture by name; their states of a whole step wait."""


@dataclass(frozen=True)
class Memory:
    """The GiB of each part of a rank's memory; parts of 0 GiB are listed, too."""

    training: dict[str, float]
    rollout: dict[str, float]
    """The parts while the rank samples; empty if the run does not sample."""

    @property
    def training_peak(self) -> float:
        """The GiB while the rank trains."""
        return sum(self.training.values())

    @property
    def rollout_peak(self) -> float:
        """The GiB while the rank samples."""
        return sum(self.rollout.values())

    @property
    def peak(self) -> float:
        """The GiB of the larger of both peaks."""
        return max(self.training_peak, self.rollout_peak)


def memory(config: Config, transformer: TransformerConfig, stage: Stage, load: Load) -> Memory:
    """Return the memory of the stage's first rank; a KV cache without a configured size takes a third of the rest."""
    resident = parameter_bytes(config, stage)
    frozen = {name: resident.pop(name) for name in ("teacher", "reference", NAMED) if name in resident}
    reserved = reserved_gib(config, stage, transformer.num_layers) * GIB
    # Host memory holds the states of the teacher beyond this limit.
    states = min(teacher_state_bytes(config, transformer, load), config.schedule.teacher_store_gb * GIB)
    working = {
        **frozen,
        "activations": activation_bytes(transformer, stage, load),
        "teacher states": states if stage.projects else 0.0,
        "logits": logit_bytes(config, transformer, load) if stage.projects else 0.0,
        "output gradient": output_gradient_bytes(config, transformer, load) if stage.projects else 0.0,
        "reserved": reserved,
    }
    if (joins(config.teachers) or load.other_widths) and stage.projects:
        working["output layers of teachers"] = joined_weight_bytes(config, transformer, load)
    training = _gib(resident | working)
    if not config.samples:
        return Memory(training, {})
    rollout = config.rollout
    guides = config.is_anchored and rollout.samples_target  # these weights then sample responses, too
    rests = config.teacher.offload == "cpu" and not guides
    engine = {name: 0.0 if rests else size for name, size in frozen.items()}
    engine |= {"engine weights": 0.0, "weight bucket": 0.0}
    if rollout.engine == "vllm":
        engine["weight bucket"] = rollout.bucket_mb * 2**20
    engine["reserved"] = reserved
    if rollout.is_colocated:  # the engine sleeps while the trainer trains
        engine["engine weights"] = engine_weight_gib(config, load.model_parameters) * GIB
        engine["engine weights"] += load.engine_factors * element_size(config)
        resident = resident | {"gradients": 0.0}  # `Learner.release_gradients`
    if rollout.engine == "megatron" or rollout.placement == "colocated":
        free = config.cluster.memory_of_gpu * GIB - sum(resident.values()) - sum(engine.values())
        given = rollout.kv_cache_gb
        engine["KV cache"] = max(free, 0.0) / 3 if given is None else given * GIB
    return Memory(training, _gib(resident | engine))


def engine_weight_gib(config: Config, model_parameters: int) -> float:
    """Return the GiB of weights that one GPU of a vLLM engine holds, in the trainer's precision."""
    return model_parameters * element_size(config) / config.rollout.engine_tp / GIB


def update_bytes(config: Config, load: Load) -> int:
    """Return the bytes that a vLLM engine receives after a step: all weights, or the factors of the adapters."""
    return (load.engine_factors or load.model_parameters) * element_size(config)


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


def element_size(config: Config) -> int:
    """Return the bytes of a weight."""
    return 2 if config.optimizer.precision == "bf16" else 4


def parameter_bytes(config: Config, stage: Stage) -> dict[str, float]:
    """Return the bytes of weights, gradients, optimizer state, teacher and reference on this rank.

    The gradients are float32.  The optimizer keeps two moments of Adam, or SGD's momentum, and in bf16 training a
    float32 copy of the weights.  An average teacher also has a float32 master, unless it rests in host memory.  A
    frozen teacher is also the reference; beside another teacher the reference is one more copy.  The distributed
    optimizer divides its part over the ranks that hold the same parameters.  With adapters, these alone have gradients
    and optimizer state, and neither teacher nor reference is a copy.  `NAMED` has a copy for each architecture
    of the teachers of the key ``teachers``, and their adapters.
    """
    optimizer, teacher = config.optimizer, config.teacher
    size = element_size(config)
    of_teachers = [max(kind.values()) for kind in _kinds_of_teachers(config, stage)]
    named = {NAMED: sum(of_teachers)} if of_teachers else {}
    state = optimizer_state_bytes(config)
    sharers = (stage.dp_cp_size, stage.expert_dp_size) if optimizer.use_distributed_optimizer else (1, 1)
    if config.adapter.rank:
        return {
            "weights": (stage.parameters + stage.adapter_parameters) * size,
            "gradients": stage.adapter_parameters * 4,
            "optimizer": state * stage.adapter_parameters / sharers[0],
            "teacher": 0,
            "reference": 0,
            **named,
        }
    taught = 0
    reads_start = keeps_start(config) or bool(stage.teacher_parameters)
    if config.keeps_teacher and reads_start and teacher.weights != "current":
        taught = size + (4 if teacher.weights == "ema" and teacher.offload == "none" else 0)
    return {
        "weights": stage.parameters * size,
        "gradients": stage.parameters * 4,
        "optimizer": state * (stage.dense_parameters / sharers[0] + stage.expert_parameters / sharers[1]),
        "teacher": stage.parameters * taught,
        "reference": stage.parameters * size if config.copies_reference else 0,
        **named,
    }


def optimizer_state_bytes(config: Config) -> int:
    """Return the bytes of the moments and of the float32 copy that the optimizer keeps of each trained parameter."""
    state = 8 if config.optimizer.optimizer == "adam" else 4 if config.optimizer.constants.sgd_momentum else 0
    return state + (4 if config.optimizer.precision == "bf16" else 0)


def named_teacher_bytes(config: Config, stage: Stage) -> dict[str, float]:
    """Return the bytes of the weights, or of the adapters, of each teacher with a directory on a rank of ``stage``."""
    kinds = _kinds_of_teachers(config, stage)
    return dict(sorted((name, size) for kind in kinds for name, size in kind.items()))


def _kinds_of_teachers(config: Config, stage: Stage) -> list[dict[str, float]]:
    """Return `named_teacher_bytes` of the teachers that share a copy, one kind per copy, and last of the adapters."""
    kinds = [kind for kind in (*stage.teacher_copies, stage.teacher_parameters) if kind]
    return [{name: float(parameters * element_size(config)) for name, parameters in kind.items()} for kind in kinds]


def resting_teacher_bytes(config: Config, stage: Stage) -> dict[str, float]:
    """Return the part of `named_teacher_bytes` that rests in host memory and is swapped in each step.

    It has all teachers with ``teacher.offload=cpu``, else those with full weights of one architecture, and those that
    are adapters, where there are several of the kind.
    """
    offload, kinds = config.teacher.offload == "cpu", _kinds_of_teachers(config, stage)
    return {name: size for kind in kinds if offload or len(kind) > 1 for name, size in kind.items()}


def activation_bytes(config: TransformerConfig, stage: Stage, load: Load) -> float:
    """Return the bytes that the student's microbatches in flight keep for backward.

    The bytes are ``in_flight`` times the mean chunk, plus the part that is recomputed at a time: one layer, or one unit
    of ``recompute_num_layers``.
    """
    tokens = load.seq_length / config.context_parallel_size
    inputs = tokens * _hidden(config) * (2 if config.bf16 else 4)
    full = config.recompute_granularity == "full"
    kept = recomputed = 0.0
    columns = stage.adapter_columns or [(0.0,) * len(chunk) for chunk in stage.chunks]
    for chunk, of_adapters in zip(stage.chunks, columns, strict=True):
        layers = [layer_bytes(config, tokens, *layer) for layer in zip(chunk, of_adapters, strict=True)]
        if full and layers:
            whole, unit = [sum(layer) for layer in layers], config.recompute_num_layers or 1
            if config.recompute_method == "block":
                kept += min(unit, len(whole)) * inputs + sum(whole[unit:])
                recomputed = max(recomputed, *whole)
            else:
                kept += -(-len(whole) // unit) * inputs
                recomputed = max(recomputed, *(sum(whole[i : i + unit]) for i in range(0, len(whole), unit)))
        else:
            kept += sum(stored for stored, _ in layers)
            recomputed = max(recomputed, *(dropped for _, dropped in layers), 0.0)
    return load.in_flight * kept / len(stage.chunks) + recomputed


def layer_bytes(
    config: TransformerConfig, tokens: float, experts: bool, adapter_columns: float = 0.0
) -> tuple[float, float]:
    """Return the bytes that one transformer layer keeps for backward, and the bytes that it recomputes instead.

    ``tokens``: the positions of this context-parallel rank.  ``adapter_columns``: the columns of the layer's z = x A^T,
    which adapters keep beside the inputs x of the linear layers; the gradient of A needs these inputs, while the frozen
    weight does not.  Recomputing core_attn frees nothing, because flash attention keeps no scores.
    """
    parts = {
        "inputs": 2 * _hidden(config),  # the inputs of both norms
        "layernorm": 2 * _hidden(config),  # the outputs of both norms, which are inputs of the linear layers
        **(_latent_attention(config) if getattr(config, "multi_latent_attention", False) else _attention(config)),
        **(_experts(config) if experts else _mlp(config)),
        "adapters": adapter_columns,
    }
    chosen: set[str] = set()
    if config.recompute_granularity == "selective":
        chosen = set(config.recompute_modules or [])
        if "moe" in chosen:
            chosen |= {"router", "moe_act", "shared_experts"}
    size = tokens * (2 if config.bf16 else 4)
    kept = sum(elements for part, elements in parts.items() if part not in chosen)
    return size * kept, size * (sum(parts.values()) - kept)


def _hidden(config: TransformerConfig) -> float:
    return float(config.hidden_size / (config.tensor_model_parallel_size if config.sequence_parallel else 1))


def _attention(config: TransformerConfig) -> dict[str, float]:
    """Return the elements per token: q, k, v, with QK-norm also q and k before the norm, and the output."""
    tp, channels = config.tensor_model_parallel_size, config.kv_channels
    heads, groups = config.num_attention_heads, config.num_query_groups
    before = heads + groups if config.qk_layernorm or getattr(config, ALL_HEADS, False) else 0
    return {"attention": (before + heads + 2 * groups + heads) * channels / tp}


def _latent_attention(config: Any) -> dict[str, float]:
    """Return the elements per token: both compressed vectors before and after their norm; q, k, v; the output."""
    tp, heads = config.tensor_model_parallel_size, config.num_attention_heads
    of_query, of_value = config.qk_head_dim + config.qk_pos_emb_head_dim, config.v_head_dim
    compressed = 2 * (config.q_lora_rank or 0) + 2 * config.kv_lora_rank + config.qk_pos_emb_head_dim
    return {
        "compressed": compressed,
        "mla_up_proj": heads * (2 * of_query + config.qk_head_dim + of_value + of_query) / tp,
        "attention": heads * of_value / tp,
    }


def _mlp(config: TransformerConfig) -> dict[str, float]:
    width = config.ffn_hidden_size / config.tensor_model_parallel_size
    return {"mlp": (3 if config.gated_linear_unit else 2) * width}


def _experts(config: TransformerConfig) -> dict[str, float]:
    """Return the elements per token: the router's float32 logits and probabilities, and the parts of each expert.

    Each of a token's experts keeps its input, the output of its first linear layer, and the activation before and after
    the product with the probability.
    """
    cut = config.tensor_model_parallel_size if config.sequence_parallel else 1
    topk, width = config.moe_router_topk, config.moe_ffn_hidden_size or config.ffn_hidden_size
    gathered = config.expert_tensor_parallel_size or 1
    first = (2 if config.gated_linear_unit else 1) * width
    shared = (config.moe_shared_expert_intermediate_size or 0) / config.tensor_model_parallel_size
    return {
        "router": 4 * (config.num_moe_experts or 0) / cut,
        "moe": topk * (config.hidden_size * gathered + first) / cut,
        "moe_act": topk * 2 * width / cut,
        "shared_experts": (3 if config.gated_linear_unit else 2) * shared,
    }


def teacher_state_bytes(config: Config, transformer: TransformerConfig, load: Load) -> float:
    """Return the bytes of all hidden states of the teacher that a rank of the last stage keeps at a time.

    With a reference the rank keeps as many of the reference, or, in steps that measure the teacher, of the mix, and
    with controls as many of each control.  The teachers of a product, and those of another architecture, have read all
    tokens before the student reads the first.  Where each step chooses its order, short responses fill the store.
    """
    if not config.has_teacher:
        return 0.0
    widths = _teacher_widths(config, transformer, load) or [transformer.hidden_size]
    width = sum(widths) if joins(config.teachers) else max(widths)
    width += transformer.hidden_size * (config.is_anchored + planned_controls(config))
    cuts = transformer.context_parallel_size * transformer.tensor_model_parallel_size
    of_token = width / cuts * element_size(config)
    if not load.alternating or joins(config.teachers) or load.other_widths:
        return float(load.response_tokens * of_token)
    store = 0.0 if config.schedule.pair_order else config.schedule.teacher_store_gb * GIB
    return float(max(min(load.response_tokens, load.seq_length) * of_token, store))


def joined_weight_bytes(config: Config, transformer: TransformerConfig, load: Load) -> float:
    """Return the bytes of the output layers ``[v / tp, h]`` that the last stage copies: of a product, or the widest."""
    of_all = sum(_teacher_widths(config, transformer, load))
    width = of_all if joins(config.teachers) else max(load.other_widths.values(), default=0)
    return float(load.vocab_size / transformer.tensor_model_parallel_size * width * element_size(config))


def _teacher_widths(config: Config, transformer: TransformerConfig, load: Load) -> list[int]:
    return [load.other_widths.get(name, transformer.hidden_size) for name in config.named_teachers]


def logit_bytes(config: Config, transformer: TransformerConfig, load: Load) -> float:
    """Return the bytes of the logits of one microbatch whose tokens are all response tokens.

    The bytes include the gradient that takes the place of the logits, and the full-width hidden states that the logits
    are computed from.  Scoring own solutions, which keeps nothing for backward, takes no more.
    """
    layer = choose_output_layer(config, load.vocab_size)
    tokens = load.seq_length / transformer.context_parallel_size
    hidden = layer.tokens_with_states(tokens) * transformer.hidden_size * element_size(config)
    return float(layer.tokens_with_logits(tokens) * layer.token_bytes + hidden)


def output_gradient_bytes(config: Config, transformer: TransformerConfig, load: Load) -> float:
    """Return the bytes of the output layer's gradient ``[v / tp, h]`` beside ``main_grad``; 0 beside adapters.

    Backward returns a gradient of the weight's dtype for DDP's hook.  If a kernel has already added the gradient to
    ``main_grad``, this is a dummy that Transformer Engine keeps from then on (``get_dummy_wgrad``).
    """
    if config.adapter.rank:
        return 0.0
    columns = load.vocab_size // transformer.tensor_model_parallel_size
    return float(columns * transformer.hidden_size * element_size(config))


def _gib(parts: dict[str, float]) -> dict[str, float]:
    return {name: size / GIB for name, size in parts.items()}


def reserved_gib(config: Config, stage: Stage, num_layers: int) -> float:
    """Return the GiB that a rank of ``stage`` holds besides tensors; ``num_layers``: those of the whole model."""
    graphs = min(max(num_layers / _LAYERS_PER_GIB, 1.0), 3.0) if config.samples and config.rollout.is_colocated else 0.0
    return CONTEXT_GIB + COMMUNICATOR_GIB * len(communicators(config, stage)) + graphs


def communicators(config: Config, stage: Stage) -> dict[str, int]:
    """Return the groups with collectives in a step of a rank of ``stage`` -> their sizes; groups of one rank have none.

    The names are those of Megatron's groups.  A colocated engine adds the group of its own ranks, and servers that
    receive weights add the group of a sender and its receivers.
    """
    p, num_gpus = config.parallel, config.cluster.num_gpus or 1
    tp, pp, cp = p.tensor_model_parallel_size, p.pipeline_model_parallel_size, p.context_parallel_size
    ep, etp = p.expert_model_parallel_size, p.expert_tensor_parallel_size or tp
    distributed = config.optimizer.use_distributed_optimizer
    sizes = {
        "world": num_gpus,
        "tensor": tp,
        "pipeline": pp,
        "context": cp,
        "data": num_gpus // (tp * pp * cp),
        "data with context": stage.dp_cp_size,
        # The norm of the gradient is a sum over the ranks that share an optimizer.
        "optimizer instance": num_gpus if distributed else tp * pp,
        "embedding": pp if config.model.share_embeddings_and_output_weights and (stage.embeds or stage.projects) else 1,
    }
    if config.model.num_moe_experts:
        sizes |= {
            "expert": ep,
            "expert tensor": etp,
            "expert tensor and expert": etp * ep,
            "expert data": stage.expert_dp_size,
        }
    if config.samples and config.rollout.is_colocated:
        sizes["engine"] = config.rollout.engine_tp
    elif config.samples and config.rollout.engine == "vllm" and config.rollout.transfer in (None, "nccl"):
        sizes["weights to servers"] = 1 + config.rollout.engine_tp
    return {name: size for name, size in sizes.items() if size > 1}
