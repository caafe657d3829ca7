# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The family MiniMax-M2: a sigmoid router with biases, norms over all heads, and rotary positions in some channels."""

from __future__ import annotations

from typing import Any

from megatron_selfdistill.config import ModelConfig
from megatron_selfdistill.errors import ConfigError
from megatron_selfdistill.interop.hf.decoder import TensorNames
from megatron_selfdistill.interop.hf.dense import expert_fields, read_common, write_decoder
from megatron_selfdistill.interop.hf.experts import require_experts
from megatron_selfdistill.interop.hf.family import Family, HFConfig
from megatron_selfdistill.interop.hf.rope import read_rope, rotary_fields
from megatron_selfdistill.interop.hf.rules import renamed
from megatron_selfdistill.interop.hf.sigmoid_router import ROUTER_FIELDS, ROUTER_KEYS, require_normalised

_ALWAYS: dict[str, tuple[tuple[Any, ...], str]] = {
    "attention_bias": ((False, None), "MiniMaxM2ForCausalLM has no biases in attention"),
    "scoring_func": (("sigmoid", None), "MiniMaxM2ForCausalLM always takes the sigmoid of the scores"),
    "use_routing_bias": ((True, None), "MiniMaxM2ForCausalLM always chooses experts with biases"),
    "use_qk_norm": ((True, None), "MiniMaxM2ForCausalLM always normalises queries and keys"),
    "qk_norm_type": (("per_layer", None), "MiniMaxM2ForCausalLM always normalises all heads together (per_layer)"),
    "shared_intermediate_size": ((0, None), "MiniMaxM2ForCausalLM has no shared experts"),
    "sliding_window": ((None,), "MiniMaxM2ForCausalLM has no sliding window"),
}
"""The fields that the code of transformers does not read, with the values that say what the code does."""


def _read(config: HFConfig) -> ModelConfig:
    for name, (allowed, otherwise) in _ALWAYS.items():
        config.require(name, allowed, otherwise)
    if any(kind != 1 for kind in config["attn_type_list"] or ()):
        raise ConfigError("config.json has an attn_type_list with other layers than 1, which is softmax attention")
    require_normalised(config)
    return read_common(
        config,
        qk_layernorm_all_heads=True,
        **expert_fields(config, "num_local_experts", "intermediate_size"),
        transformer=dict(ROUTER_KEYS),
        **ROUTER_FIELDS,
        **rotary_fields(read_rope(_with_share(config), partial=True), config),
    )


def _with_share(config: HFConfig) -> HFConfig:
    """Return ``config`` with ``rotary_dim`` as a share of the channels, where no ``partial_rotary_factor`` is given.

    Raises: ConfigError where both are given and differ, because programs disagree on which of them counts.
    """
    width, channels = config["rotary_dim"], config["head_dim"] or config["hidden_size"] // config["num_attention_heads"]
    if width is None:
        return config
    given = (config["rope_parameters"] or {}).get("partial_rotary_factor")
    if given is None and "partial_rotary_factor" in config.values:
        given = config["partial_rotary_factor"] or 1.0  # transformers takes null for all channels
    if given is not None and int(channels * given) != width:
        raise ConfigError(f"config.json has rotary_dim={width} and partial_rotary_factor={given}: keep one of them")
    share = {**config.values, "partial_rotary_factor": width / channels if given is None else given}
    return HFConfig(config.architecture, share, config.defaults)


def _write(arch: dict[str, Any]) -> dict[str, Any]:
    require_experts(arch)
    return {
        **write_decoder(arch),
        "rotary_dim": int(arch["kv_channels"] * arch["rotary_percent"]),
        "num_local_experts": arch["num_moe_experts"],
        "num_experts_per_tok": arch["moe_router_topk"],
        "scoring_func": "sigmoid",
        "use_routing_bias": True,
        "use_qk_norm": True,
        "qk_norm_type": "per_layer",
        "attn_type_list": [1] * arch["num_layers"],
    }


MINIMAX_M2 = Family(
    "MiniMaxM2ForCausalLM",
    "minimax_m2",
    _read,
    _write,
    {"rope_theta": 5000000.0, **dict.fromkeys((*_ALWAYS, "rotary_dim", "attn_type_list"))},
    TensorNames(block="block_sparse_moe", gate="w1", up="w3", down="w2"),
    adapt=lambda rule: renamed(rule, lambda name: name.replace(".gate.e_score", ".e_score")),
)
