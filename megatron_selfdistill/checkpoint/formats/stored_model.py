# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Read the architecture of a checkpoint's model from the stored arguments, so that no user has to type it again.

Megatron-LM's own ``--use-checkpoint-args`` omits the epsilon of the norms, QK-norm, the sizes of multi-latent
attention and the scaling of RoPE; this module reads all of them.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
from collections.abc import Collection
from pathlib import Path
from typing import Any

from megatron_selfdistill.checkpoint.formats import directory
from megatron_selfdistill.checkpoint.formats.directory import find
from megatron_selfdistill.checkpoint.formats.torch_dist import read_common
from megatron_selfdistill.checkpoint.formats.unpickler import load_pickled
from megatron_selfdistill.config import Config, ModelConfig, YarnConfig
from megatron_selfdistill.errors import CheckpointError, ConfigError
from megatron_selfdistill.model.model_values import LATENT_ONLY, ROPE_FACTOR, TRANSFORMER_DEFAULTS, differences


def with_stored_architecture(config: Config, given: Collection[str] | None = None) -> Config:
    """Return ``config`` with the architecture of the checkpoint from which the run resumes, or else starts.

    ``given``: the keys that the user has set (`config.GivenKeys`); null takes every ``model.*`` that differs from its
    default.  Each rank reads for itself; a process group is not needed.

    Raises: ConfigError with both values where ``model.*`` contradicts the checkpoint; CheckpointError where the
    checkpoint is missing or corrupt.
    """
    if config.model.provider is not None:
        return config
    args = None
    if config.run_dir and config.checkpoint.resume:
        args = _args_of_newest(Path(config.run_dir) / "checkpoints")
    if args is None and config.checkpoint.load is not None:
        args = stored_args(Path(config.checkpoint.load))
    if args is None:
        return config
    fields = fields_set(config.model, given)
    return dataclasses.replace(config, model=reconcile(config.model, fields, architecture_from_args(args)))


def stored_args(path: Path) -> argparse.Namespace | None:
    """Return the arguments that the checkpoint at ``path`` stores; None if it stores no arguments."""
    found, is_legacy = find(path)
    state = (
        load_pickled(min(found.glob(f"mp_rank_*/{directory.LEGACY_FILE}")), mmap=True)
        if is_legacy
        else read_common(found)
    )
    args: argparse.Namespace | None = state.get("args")
    return args


def _args_of_newest(checkpoints: Path) -> argparse.Namespace | None:
    """Return the arguments of the first readable checkpoint of `directory.candidates`; None if there is none.

    The run reports the faults of the other checkpoints when it reads all of their files.
    """
    for path in directory.candidates(checkpoints):
        if directory.incomplete(path) is None:
            with contextlib.suppress(CheckpointError):
                return stored_args(path)
    return None


def architecture_from_args(args: argparse.Namespace) -> ModelConfig:
    """Return the model that stored arguments describe; its ``vocab_size`` comes from `stored_vocab_size`, or is null.

    Raises: CheckpointError for arguments that lack a size, or that describe a model that this program cannot build.
    """
    stored, fields = vars(args), dataclasses.fields(YarnConfig)
    _require_known(stored)
    values = {ours: stored[theirs] for ours, theirs in _SAME.items() if stored.get(theirs) is not None}
    missing = [name for name in ("num_layers", "hidden_size", "num_attention_heads") if name not in values]
    if missing:
        raise CheckpointError(f"the checkpoint's arguments have no {missing[0]}: give the architecture in model.*")
    epsilon = next((stored[name] for name in ("layernorm_epsilon", "norm_epsilon") if stored.get(name)), None)
    if epsilon is not None:
        values["layernorm_epsilon"] = epsilon
    if not stored.get("group_query_attention", True):
        values["num_query_groups"] = values["num_attention_heads"]  # Megatron-LM stores an unused 1
    values |= _activation(stored)
    if "untie_embeddings_and_output_weights" in stored:
        values["share_embeddings_and_output_weights"] = not stored["untie_embeddings_and_output_weights"]
    if stored.get("use_rotary_position_embeddings") and stored.get("position_embedding_type") in (None, "rope"):
        values["position_embedding_type"] = "rope"  # the older flag
    if values.get("num_moe_experts") is None:
        values = {name: value for name, value in values.items() if not name.startswith("moe_")}
    if stored.get("use_rope_scaling"):
        values["rope_scaling_factor"] = stored.get("rope_scaling_factor") or ROPE_FACTOR
    # Megatron-LM has flags for this YaRN since 0.19, some without the prefix, and divides positions since 0.18.
    is_yarn = stored.get("position_embedding_type") == "yarn"
    yarn = {f.name: stored.get(f"yarn_{f.name}", stored.get(f.name) if is_yarn else None) for f in fields}
    if _NEW in stored and "num_passthrough_mtp_layers" not in stored:
        values["seq_len_interpolation_factor"] = stored.get("rotary_seq_len_interpolation_factor")
    values["vocab_size"] = stored_vocab_size(args)
    values["transformer"] = _transformer(stored)
    try:
        values["yarn"] = YarnConfig(**{name: value for name, value in yarn.items() if value is not None})
        return ModelConfig(**values)
    except ConfigError as error:
        raise CheckpointError(f"the checkpoint's arguments describe no model: {error}") from error


def stored_vocab_size(args: argparse.Namespace) -> int | None:
    """Return the size of the vocabulary before padding from the stored arguments; None if they lack it.

    Until 0.18, Megatron's ``NullTokenizer`` adds an end-of-document token to the stored ``vocab_size``; the result
    includes the row of that token.
    """
    size = getattr(args, "vocab_size", None)
    if size is None:
        return None
    adds_one = str(getattr(args, "tokenizer_type", None) or "").startswith("Null") and not hasattr(args, _NEW)
    return int(size) + adds_one


def reconcile(configured: ModelConfig, given: Collection[str], stored: ModelConfig) -> ModelConfig:
    """Return the stored model with the configured fields that do not belong to an architecture (losses, padding).

    ``given``: the fields of ``configured`` that the user has set, and the entries of its sections as ``yarn.mscale``.

    Raises: ConfigError with both values of every field that the user has set to another value than the stored one.
    """
    overlaid: dict[str, Any] = {}
    for name, _, entry in (name.partition(".") for name in given if name != "transformer"):
        value = getattr(configured, name)
        if entry:
            value = dataclasses.replace(overlaid.get(name, getattr(stored, name)), **{entry: getattr(value, entry)})
        overlaid[name] = value
    if stored.vocab_size is None:
        stored = dataclasses.replace(stored, vocab_size=configured.vocab_size)
    wanted = dataclasses.replace(stored, **overlaid, transformer={**stored.transformer, **configured.transformer})
    faults = [
        f"model.{'transformer.' * (name in configured.transformer)}{name.replace('yarn_', 'yarn.')} is {ours!r}, but "
        f"the checkpoint was saved with {theirs!r}"
        for name, (ours, theirs) in differences(wanted, stored).items()
        # RoPE has no table of positions, so a run may allow fewer or more positions.
        if name != "max_position_embeddings" or stored.position_embedding_type == "learned_absolute"
    ]
    if faults:
        raise ConfigError(f"{'; '.join(faults)}: do not set these keys, or choose another checkpoint")
    return wanted


def fields_set(model: ModelConfig, given: Collection[str] | None = None) -> set[str]:
    """Return the fields among the keys ``given``; without a record of the set keys, those without their defaults."""
    if given is not None:
        return {key.removeprefix("model.") for key in given if key.startswith("model.")}
    parts: list[tuple[str, Any, Any]] = [("", model, ModelConfig()), ("yarn.", model.yarn, YarnConfig())]
    return {
        prefix + f.name
        for prefix, part, default in parts
        for f in dataclasses.fields(part)
        if f.name != "yarn" and getattr(part, f.name) != getattr(default, f.name)
    }


# The field of `ModelConfig` -> Megatron-LM's argument.
_NAMES = (
    "num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups kv_channels max_position_embeddings "
    "position_embedding_type rotary_base rotary_percent seq_len_interpolation_factor normalization add_bias_linear "
    "latent_layernorm_epsilon add_qkv_bias qk_layernorm qk_layernorm_all_heads init_method_std moe_ffn_hidden_size "
    "make_vocab_size_divisible_by moe_router_topk moe_router_enable_expert_bias moe_router_score_function "
    "num_passthrough_mtp_layers"
)
_SAME = {**{name: name for name in _NAMES.split()}, "num_moe_experts": "num_experts"}

_NOT_BUILT = (
    *("use_legacy_models", "squared_relu", "openai_gelu", "heterogeneous_layers_config_path", "moe_latent_size"),
    *("hybrid_override_pattern", "hybrid_layer_pattern", "is_hybrid_model", "use_mup", "mla_down_proj_fusion"),
    *("moe_mlp_glu_interleave_size", "moe_shared_expert_glu_interleave_size"),
)
"""The arguments of models that this program does not build."""
_NEW = "null_tokenizer_eod_id"
"""An argument that Megatron-LM stores since 0.18."""


def _require_known(stored: dict[str, Any]) -> None:
    for name in _NOT_BUILT:
        if stored.get(name):
            raise CheckpointError(f"the checkpoint has the argument {name}={stored[name]!r}, which is not built here")
    balancing = stored.get("moe_router_load_balancing_type") or ""  # a name or a list of names
    if stored.get("num_experts") and any(name in balancing for name in ("sinkhorn", "quantile_balancing")):
        raise CheckpointError(f"the checkpoint's router chooses experts by {balancing}, which is not built here")
    if stored.get("experimental_attention_variant") and "num_passthrough_mtp_layers" not in stored:
        raise CheckpointError(
            "the checkpoint holds gated delta nets as Megatron-LM stores them (experimental_attention_variant="
            f"{stored['experimental_attention_variant']!r}), whose rows have another order here: convert the Hugging "
            "Face model instead"
        )


def _activation(stored: dict[str, Any]) -> dict[str, Any]:
    if stored.get("activation") is not None:
        return {"activation": stored["activation"], "gated_linear_unit": bool(stored.get("gated_linear_unit"))}
    if stored.get("swiglu"):
        return {"activation": "silu", "gated_linear_unit": True}
    if stored.get("quick_geglu"):
        return {"activation": "quick_gelu", "gated_linear_unit": True}
    # Megatron-LM's fused gelu is the tanh approximation; it is the default where linear layers have biases.
    fused = stored.get("bias_gelu_fusion") and stored.get("add_bias_linear", True)
    return {"activation": "gelu_tanh" if fused else "gelu", "gated_linear_unit": bool(stored.get("gated_linear_unit"))}


def _transformer(stored: dict[str, Any]) -> dict[str, Any]:
    """Return the keys of ``model.transformer`` that change logits and differ from Megatron's defaults."""
    found: dict[str, Any] = {}
    latent = bool(stored.get("multi_latent_attention"))
    for name, default in TRANSFORMER_DEFAULTS.items():
        value = stored.get(name)
        if value is None and name == "layernorm_zero_centered_gamma":
            value = stored.get("apply_layernorm_1p")  # Megatron-LM's argument
        value = getattr(value, "name", value)  # an enumeration
        if name == "q_lora_rank" and latent and name in stored and value is None:
            found[name] = None  # queries without compression
        elif value is not None and value != default:
            found[name] = list(value) if isinstance(value, tuple) else value
    if not latent:
        found = {name: value for name, value in found.items() if name not in LATENT_ONLY}
    if stored.get("num_experts") is None:
        found = {name: value for name, value in found.items() if not name.startswith("moe_")}
    else:
        if stored.get("moe_router_dtype"):
            found["moe_router_dtype"] = stored["moe_router_dtype"]
        if stored.get("moe_router_enable_expert_bias"):
            # Self-distillation does not balance experts, except in runs of this program that did so before.
            ours = "num_passthrough_mtp_layers" in stored
            found["moe_router_bias_update_rate"] = stored["moe_router_bias_update_rate"] if ours else 0.0
    if found.get("window_size") is not None:
        found["window_size"] = tuple(found["window_size"])
    return found
