# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The rules of a decoder: one rule for each tensor, from Megatron's key to transformers' names.

Megatron's keys are the keys of Transformer Engine's layer spec, in which the norm before a linear layer belongs to the
linear layer.  Our local spec stores the same keys.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_selfdistill.checkpoint.formats.model_tensors import PASSTHROUGH
from megatron_selfdistill.errors import ConfigError
from megatron_selfdistill.interop.hf.rules import Arrangement, FusedExperts, MegatronSlice, Rule, rows

Architecture = dict[str, Any]
Place = Callable[..., MegatronSlice]
"""A function from the name of a tensor in its layer, and the number of an expert, to the place of the tensor."""


@dataclass(frozen=True)
class TensorNames:
    """The parts of tensors' names that differ between families, such as ``model.layers.3.{block}.experts.0.{gate}``."""

    block: str = "mlp"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    shared: str = "shared_experts"
    fused_projections: bool = True
    """Whether a gated delta net's projections are two tensors rather than four (`gated_delta_rules`)."""
    mtp: str | None = None
    """The prefix of a module for multi-token prediction beside the model, such as ``mtp``; None for further layers."""
    router: str = "gate"
    fused: bool = False
    """Whether one tensor holds all experts of a layer, with gate and up interleaved, as in GPT-OSS."""


def decoder_rules(arch: Architecture, names: TensorNames) -> list[Rule]:
    """Return one rule for each tensor of the model; ``arch`` is the result of `family.architecture`.

    As in Megatron, the layers are stacked under one key, unless the model has several kinds of layers.
    """
    if arch["vocab_size"] is None:
        raise ConfigError("model.vocab_size is null: a conversion needs the number of vocabulary rows")
    num_layers, hidden = arch["num_layers"], arch["hidden_size"]
    is_moe = arch["moe_layer_freq"] or [0] * num_layers
    is_linear = arch["linear_attention_freq"] or [0] * num_layers
    stacked = len(set(is_moe)) == 1 and not any(is_linear)
    vocabulary = (arch["vocab_size"], hidden)
    embedding = MegatronSlice("embedding.word_embeddings.weight")
    rules = [rows(embedding, {"model.embed_tokens.weight": vocabulary}, vocabulary=True)]
    for layer in range(num_layers):
        kind = {"is_moe": bool(is_moe[layer]), "is_linear": bool(is_linear[layer])}
        rules += layer_rules(arch, names, f"model.layers.{layer}", _place(layer, stacked), **kind)
    rules.append(rows(MegatronSlice("decoder.final_layernorm.weight"), {"model.norm.weight": (hidden,)}))
    if not arch["share_embeddings_and_output_weights"]:
        rules.append(rows(MegatronSlice("output_layer.weight"), {"lm_head.weight": vocabulary}, vocabulary=True))
    if names.mtp is not None:
        return rules + list(_mtp_module_rules(arch, names, names.mtp) if arch["num_passthrough_mtp_layers"] else ())
    for layer in range(num_layers, num_layers + arch["num_passthrough_mtp_layers"]):
        rules += _mtp_layer_rules(arch, names, f"model.layers.{layer}")
    return rules


def layer_rules(
    arch: Architecture, names: TensorNames, hf: str, place: Place, is_moe: bool, is_linear: bool = False
) -> Iterator[Rule]:
    """Yield the rules of one transformer layer, named ``hf``, such as ``model.layers.3``.

    ``is_linear``: whether a gated delta net takes the place of attention.
    """
    attention = _latent_attention if arch["multi_latent_attention"] else _attention
    if is_linear:
        yield from gated_delta_rules(arch, hf, place, names.fused_projections)
    else:
        yield from attention(arch, hf, place)
    norm = {f"{hf}.post_attention_layernorm.weight": (arch["hidden_size"],)}
    if is_moe:
        yield rows(place("pre_mlp_layernorm.weight"), norm)
        yield from _experts(arch, names, f"{hf}.{names.block}", place)
    else:
        yield rows(place("mlp.linear_fc1.layer_norm_weight"), norm)
        yield from _mlp("mlp", arch["hidden_size"], arch["ffn_hidden_size"], f"{hf}.mlp", TensorNames(), place)


def _mtp_layer_rules(arch: Architecture, names: TensorNames, hf: str) -> Iterator[Rule]:
    """Yield the rules of a multi-token-prediction layer.

    The layer has an embedding, a projection, norms and an output layer around a transformer layer.  A directory may
    lack the embedding and the output layer, which are copies of the model's own.
    """
    hidden, vocabulary = arch["hidden_size"], (arch["vocab_size"], arch["hidden_size"])
    shapes: dict[str, tuple[int, ...]] = {
        f"{hf}.embed_tokens.weight": vocabulary,
        f"{hf}.enorm.weight": (hidden,),
        f"{hf}.hnorm.weight": (hidden,),
        f"{hf}.eh_proj.weight": (hidden, 2 * hidden),
        f"{hf}.shared_head.norm.weight": (hidden,),
        f"{hf}.shared_head.head.weight": vocabulary,
    }
    yield from _passthrough_rules(arch, names, hf, shapes)


def _mtp_module_rules(arch: Architecture, names: TensorNames, hf: str) -> Iterator[Rule]:
    hidden = arch["hidden_size"]
    shapes: dict[str, tuple[int, ...]] = {f"{hf}.fc.weight": (hidden, 2 * hidden)}
    shapes |= {f"{hf}.{norm}.weight": (hidden,) for norm in ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden")}
    yield from _passthrough_rules(arch, names, f"{hf}.layers.0", shapes)


def _passthrough_rules(
    arch: Architecture, names: TensorNames, layer: str, shapes: dict[str, tuple[int, ...]]
) -> Iterator[Rule]:
    """Yield the rules of ``shapes`` and of a transformer layer, whose keys are `PASSTHROUGH` and the name."""
    for name, shape in shapes.items():
        is_copy = name.endswith((".embed_tokens.weight", ".shared_head.head.weight"))
        yield rows(MegatronSlice(PASSTHROUGH + name), {name: shape}, may_be_absent=is_copy)
    for rule in layer_rules(arch, names, layer, _place(0, True), is_moe=arch["num_moe_experts"] is not None):
        for name, shape in zip(rule.hf_names, rule.hf_shapes, strict=True):
            yield rows(MegatronSlice(PASSTHROUGH + name), {name: shape}, float32=rule.float32)


def _place(layer: int, stacked: bool) -> Place:
    prefix = "decoder.layers." if stacked else f"decoder.layers.{layer}."

    def place(name: str, *expert: int) -> MegatronSlice:
        return MegatronSlice(prefix + name, ((layer,) if stacked else ()) + expert)

    return place


def _attention(arch: Architecture, hf: str, place: Place) -> Iterator[Rule]:
    hidden, channels = arch["hidden_size"], arch["kv_channels"]
    heads, groups = arch["num_attention_heads"], arch["num_query_groups"]
    gated = arch["attention_output_gate"]
    sizes = {"q": (1 + bool(gated)) * heads * channels, "k": groups * channels, "v": groups * channels}
    arrangement: Arrangement = HeadGroups(groups, ((heads // groups * channels,), (channels,), (channels,)))
    if gated:
        arrangement = GatedQueryGroups(heads, groups, channels)
    yield rows(place("self_attention.linear_qkv.layer_norm_weight"), {f"{hf}.input_layernorm.weight": (hidden,)})
    weights: dict[str, tuple[int, ...]] = {f"{hf}.self_attn.{x}_proj.weight": (n, hidden) for x, n in sizes.items()}
    yield rows(place("self_attention.linear_qkv.weight"), weights, arrangement)
    if arch["add_qkv_bias"] or arch["add_bias_linear"]:
        biases: dict[str, tuple[int, ...]] = {f"{hf}.self_attn.{x}_proj.bias": (n,) for x, n in sizes.items()}
        yield rows(place("self_attention.linear_qkv.bias"), biases, arrangement)
    for x in "qk" if arch["qk_layernorm"] or arch["qk_layernorm_all_heads"] else "":
        norm = {f"{hf}.self_attn.{x}_norm.weight": (sizes[x] if arch["qk_layernorm_all_heads"] else channels,)}
        yield rows(place(f"self_attention.{x}_layernorm.weight"), norm)
    if arch["softmax_type"] == "learnable":
        yield rows(place("self_attention.core_attention.softmax_offset"), {f"{hf}.self_attn.sinks": (heads,)})
    yield rows(
        place("self_attention.linear_proj.weight"), {f"{hf}.self_attn.o_proj.weight": (hidden, heads * channels)}
    )
    if arch["add_bias_linear"]:
        yield rows(place("self_attention.linear_proj.bias"), {f"{hf}.self_attn.o_proj.bias": (hidden,)})


def _latent_attention(arch: Architecture, hf: str, place: Place) -> Iterator[Rule]:
    """Yield the rules of DeepSeek's multi-latent attention, which change no tensor.

    Both programs order the rows of heads alike (rows without position, then rotary rows; keys, then values) and rotate
    neighbouring channels.
    """
    hidden, heads = arch["hidden_size"], arch["num_attention_heads"]
    q_rank, kv_rank = arch["q_lora_rank"], arch["kv_lora_rank"]
    rotary, value = arch["qk_pos_emb_head_dim"], arch["v_head_dim"]
    queries = heads * (arch["qk_head_dim"] + rotary)
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {"input_layernorm.weight": ("input_layernorm.weight", (hidden,))}
    if q_rank is None:
        tensors["self_attention.linear_q_proj.weight"] = ("self_attn.q_proj.weight", (queries, hidden))
    else:
        tensors["self_attention.linear_q_down_proj.weight"] = ("self_attn.q_a_proj.weight", (q_rank, hidden))
        tensors["self_attention.linear_q_up_proj.layer_norm_weight"] = ("self_attn.q_a_layernorm.weight", (q_rank,))
        tensors["self_attention.linear_q_up_proj.weight"] = ("self_attn.q_b_proj.weight", (queries, q_rank))
    tensors |= {
        "self_attention.linear_kv_down_proj.weight": (
            "self_attn.kv_a_proj_with_mqa.weight",
            (kv_rank + rotary, hidden),
        ),
        "self_attention.linear_kv_up_proj.layer_norm_weight": ("self_attn.kv_a_layernorm.weight", (kv_rank,)),
        "self_attention.linear_kv_up_proj.weight": (
            "self_attn.kv_b_proj.weight",
            (heads * (arch["qk_head_dim"] + value), kv_rank),
        ),
        "self_attention.linear_proj.weight": ("self_attn.o_proj.weight", (hidden, heads * value)),
    }
    for name, (hf_name, shape) in tensors.items():
        yield rows(place(name), {f"{hf}.{hf_name}": shape})


def _experts(arch: Architecture, names: TensorNames, hf: str, place: Place) -> Iterator[Rule]:
    """Yield the rules of the router, its expert bias, each expert, and the shared experts, which are one wide MLP."""
    hidden, num_experts = arch["hidden_size"], arch["num_moe_experts"]
    yield rows(place("mlp.router.weight"), {f"{hf}.{names.router}.weight": (num_experts, hidden)})
    if arch["add_bias_linear"]:
        yield rows(place("mlp.router.bias"), {f"{hf}.{names.router}.bias": (num_experts,)})
    if arch["moe_router_enable_expert_bias"]:
        bias = {f"{hf}.gate.e_score_correction_bias": (num_experts,)}
        yield rows(place("mlp.router.expert_bias"), bias, float32=True)
    if names.fused:
        yield from _fused_experts(arch, names, f"{hf}.experts", place)
    for expert in () if names.fused else range(num_experts):
        width = arch["moe_ffn_hidden_size"]
        yield from _mlp("mlp.experts.experts", hidden, width, f"{hf}.experts.{expert}", names, place, expert)
    width = arch["moe_shared_expert_intermediate_size"]
    if width is not None:
        yield from _mlp("mlp.shared_experts", hidden, width, f"{hf}.{names.shared}", names, place)
    if arch["moe_shared_expert_gate"]:
        yield rows(place("mlp.shared_experts.gate_weight"), {f"{hf}.{names.shared}_gate.weight": (1, hidden)})


def _fused_experts(arch: Architecture, names: TensorNames, hf: str, place: Place) -> Iterator[Rule]:
    num_experts, hidden, width = arch["num_moe_experts"], arch["hidden_size"], arch["moe_ffn_hidden_size"]
    layers = {"linear_fc1": (f"{names.gate}_{names.up}", hidden, 2 * width), "linear_fc2": (names.down, width, hidden)}
    for layer, (name, inputs, outputs) in layers.items():
        arrangement = FusedExperts(interleaved=layer == "linear_fc1")
        weight, bias = (place(f"mlp.experts.experts.{layer}.{kind}") for kind in ("weight", "bias"))
        shape, hf_shape = (num_experts, outputs, inputs), (num_experts, inputs, outputs)
        yield Rule(weight, shape, (f"{hf}.{name}",), (hf_shape,), arrangement, num_experts=num_experts)
        if arch["add_bias_linear"]:
            rows_of_bias = (num_experts, outputs)
            yield Rule(
                bias, rows_of_bias, (f"{hf}.{name}_bias",), (rows_of_bias,), arrangement, num_experts=num_experts
            )


def _mlp(name: str, hidden: int, width: int, hf: str, names: TensorNames, place: Place, *expert: int) -> Iterator[Rule]:
    """Yield the rules of a gated MLP: gate above up in ``linear_fc1``, and down in ``linear_fc2``."""
    gate_up = {f"{hf}.{names.gate}.weight": (width, hidden), f"{hf}.{names.up}.weight": (width, hidden)}
    yield rows(place(f"{name}.linear_fc1.weight", *expert), gate_up)
    yield rows(place(f"{name}.linear_fc2.weight", *expert), {f"{hf}.{names.down}.weight": (hidden, width)})


@dataclass(frozen=True)
class HeadGroups:
    """The arrangement of tensors whose rows Megatron groups by head: each group has its rows of every section."""

    num_groups: int
    sections: tuple[tuple[int, ...], ...]
    """For each tensor the rows per group of its sections, which are one below the other; a tensor that is itself
    grouped is one section."""

    def join(self, tensors: tuple[Tensor, ...]) -> Tensor:
        """Return the grouped tensor."""
        parts = []
        for tensor, sizes in zip(tensors, self.sections, strict=True):
            for part in torch.split(tensor, [self.num_groups * size for size in sizes]):
                parts.append(part.reshape(self.num_groups, -1, *tensor.shape[1:]))
        return torch.cat(parts, dim=1).flatten(0, 1)

    def split(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """Return the tensors of which ``tensor`` was joined."""
        grouped = tensor.reshape(self.num_groups, -1, *tensor.shape[1:])
        flat = [size for sizes in self.sections for size in sizes]
        parts = iter([part.flatten(0, 1) for part in torch.split(grouped, flat, dim=1)])
        found = ([next(parts) for _ in sizes] for sizes in self.sections)
        return tuple(some[0] if len(some) == 1 else torch.cat(some) for some in found)


@dataclass(frozen=True)
class GatedQueryGroups:
    """The arrangement of q, k and v in a ``linear_qkv`` with an output gate.

    Each query group has its query heads, their gates, its key and its value; q of transformers has for each head its
    query and its gate.
    """

    num_attention_heads: int
    num_query_groups: int
    kv_channels: int

    def join(self, tensors: tuple[Tensor, ...]) -> Tensor:
        """Return ``linear_qkv`` from q with its gates, k and v."""
        q, *others = tensors
        q = q.reshape(self.num_query_groups, -1, 2, self.kv_channels, *q.shape[1:]).transpose(1, 2).flatten(1, 3)
        return torch.cat([q, *(t.reshape(self.num_query_groups, -1, *t.shape[1:]) for t in others)], dim=1).flatten(
            0, 1
        )

    def split(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """Return q with its gates, k and v from ``linear_qkv``."""
        queries = self.num_attention_heads // self.num_query_groups * self.kv_channels
        grouped = tensor.reshape(self.num_query_groups, -1, *tensor.shape[1:])
        q, k, v = torch.split(grouped, [2 * queries, self.kv_channels, self.kv_channels], dim=1)
        q = q.reshape(self.num_query_groups, 2, -1, self.kv_channels, *tensor.shape[1:]).transpose(1, 2)
        return q.flatten(0, 3), k.flatten(0, 1), v.flatten(0, 1)


def gated_delta_rules(
    arch: dict[str, Any], hf: str, place: Callable[..., MegatronSlice], fused_projections: bool
) -> Iterator[Rule]:
    """Yield the rules of the gated delta net of one transformer layer, named ``hf``, with the norm before it.

    ``fused_projections``: whether transformers has q, k, v and z in one tensor, grouped as Megatron groups them, and
    beta and alpha in another; else it has q, k and v in one tensor, one below the other, and z, beta and alpha alone.
    """
    hidden, kernel = arch["hidden_size"], arch["linear_conv_kernel_dim"]
    key, value = arch["linear_key_head_dim"], arch["linear_value_head_dim"]
    groups, heads = arch["linear_num_key_heads"], arch["linear_num_value_heads"]
    values, each = heads // groups * value, heads // groups
    sections: dict[str, tuple[int, ...]]
    if fused_projections:
        sections = {"in_proj_qkvz": (2 * key + 2 * values,), "in_proj_ba": (2 * each,)}
    else:
        sections = {
            "in_proj_qkv": (key, key, values),
            "in_proj_z": (values,),
            "in_proj_b": (each,),
            "in_proj_a": (each,),
        }
    name = f"{hf}.linear_attn"
    yield rows(place("self_attention.in_proj.layer_norm_weight"), {f"{hf}.input_layernorm.weight": (hidden,)})
    projections: dict[str, tuple[int, ...]] = {
        f"{name}.{part}.weight": (groups * sum(sizes), hidden) for part, sizes in sections.items()
    }
    arrangement = HeadGroups(groups, tuple(sections.values()))
    yield rows(place("self_attention.in_proj.weight"), projections, arrangement)
    channels = {f"{name}.conv1d.weight": (groups * (2 * key + values), 1, kernel)}
    yield rows(place("self_attention.conv1d.weight"), channels, HeadGroups(groups, ((key, key, values),)))
    for ours in ("dt_bias", "A_log"):
        yield rows(place(f"self_attention.{ours}"), {f"{name}.{ours}": (heads,)})
    yield rows(place("self_attention.out_norm.weight"), {f"{name}.norm.weight": (value,)})
    yield rows(place("self_attention.out_proj.weight"), {f"{name}.out_proj.weight": (hidden, heads * value)})
