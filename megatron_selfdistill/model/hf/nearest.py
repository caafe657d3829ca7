# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Find the known family that is nearest to the config.json of an unknown architecture, and say what differs."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from megatron_selfdistill.errors import ConfigError, first_few
from megatron_selfdistill.model.hf.config_fields import shown
from megatron_selfdistill.model.hf.family import Family, HFConfig

_WITHOUT_LOGITS = {
    *"architectures model_type auto_map name_or_path transformers_version dtype torch_dtype".split(),
    *"quantization_config use_cache return_dict is_encoder_decoder chunk_size_feed_forward id2label label2id".split(),
    *"bos_token_id eos_token_id pad_token_id sep_token_id decoder_start_token_id problem_type".split(),
    *"initializer_range pretraining_tp output_hidden_states output_attentions output_router_logits".split(),
    *"router_aux_loss_coef router_z_loss_coef router_jitter_noise aux_loss_alpha seq_aux ep_size".split(),
    *"attention_dropout hidden_dropout embedding_dropout embd_pdrop attn_pdrop resid_pdrop resid_dropout".split(),
}
"""The fields of config.json that change no logit of an evaluation."""


_ALWAYS_READ = {
    *"vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads max_position_embeddings".split()
}
"""The fields that every family reads, also where it refuses a config.json before it has read them."""
_REASONS = {
    "Gemma2ForCausalLM Gemma3ForCausalLM Gemma3ForConditionalGeneration": (
        "its layers have norms behind attention and MLP, and Gemma 3 has another RoPE base in layers with a window: "
        "Megatron Core 0.16 has neither"
    ),
    "GraniteForCausalLM": (
        "it multiplies embeddings, residual branches and logits by constants: Megatron Core 0.16 has no such factors, "
        "and weights that contain the factors would not return bit by bit"
    ),
    "Ernie4_5_MoeForCausalLM": (
        "it chooses experts by softmax probabilities with biases: Megatron Core 0.16 has biases of experts for sigmoid "
        "routers only"
    ),
    "BailingMoeV2ForCausalLM": ("transformers has no class for it, with which a conversion could be compared"),
    "DeepseekV32ForCausalLM GlmMoeDsaForCausalLM": (
        "Megatron Core 0.16 computes its sparse attention with a CUDA extension alone, and has no layer spec for it"
    ),
    "Qwen3_5ForConditionalGeneration Qwen3_5MoeForConditionalGeneration": (
        "only its text model is known: load it with transformers' AutoModelForCausalLM, and save it"
    ),
}
"""Why architectures that are often asked for cannot be converted, by their names."""


def why_unknown(named: Iterable[str]) -> str:
    """Return in brackets why one of the architectures ``named`` is unknown; empty where no reason is known."""
    for architecture in named:
        for names, reason in _REASONS.items():
            if architecture in names.split():
                return f" ({reason})"
    return ""


def describe_nearest(hf_config: Mapping[str, Any], families: Iterable[Family]) -> str:
    """Return a sentence with the family that differs least from a config.json, and the differences.

    A difference is a field that the family does not read, unless it is null, false or empty; the message with which the
    family refuses the config.json; and experts, where only one of the two has them.
    """
    named = " ".join(hf_config.get("architectures") or [str(hf_config.get("model_type"))])
    found = []
    for family in families:
        differences = _differences(hf_config, family)
        unlike = 1 - difflib.SequenceMatcher(None, named, family.architecture).ratio()
        found.append((len(differences), unlike, family.architecture, differences))
    _, _, nearest, differences = min(found)
    what = first_few(differences, ", ") if differences else "its tensors or its code, not its fields"
    return f"the nearest is {nearest}, from which it differs in {what}"


def _differences(hf_config: Mapping[str, Any], family: Family) -> list[str]:
    config, refusal = HFConfig(family.architecture, hf_config, family.defaults), []
    try:
        family.read(config)
    except ConfigError as error:
        refusal = [f"what {family.architecture} refuses ({error})"]
    known = config.asked | family.defaults.keys() | _WITHOUT_LOGITS | _ALWAYS_READ
    fields = [f"{name}={shown(value)}" for name, value in sorted(hf_config.items()) if name not in known and value]
    experts = [any("expert" in name for name in keys) for keys in (hf_config, family.defaults)]
    return fields + (["experts"] if experts[0] != experts[1] else []) + refusal
