# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Read and write the rotary positions of a config.json.

The older spelling has ``rope_theta`` and ``rope_scaling``; transformers 5 has ``rope_parameters``.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from megatron_selfdistill.config import YarnConfig
from megatron_selfdistill.errors import ConfigError
from megatron_selfdistill.interop.hf.family import HFConfig

_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""The constants in Megatron Core's code."""
_LENGTH = "original_max_position_embeddings"
_WITH_A_LENGTH = ("llama3", "yarn", "longrope")
"""The types of rope that are computed from the length of the sequences before the scaling."""


@dataclass(frozen=True)
class Rope:
    """The rotary positions of a config.json."""

    base: int
    """The base of the rotary frequencies."""
    kind: str
    """The type: default, llama3, yarn, ..."""
    parameters: dict[str, Any] = field(default_factory=dict)
    partial: float = 1.0
    """The share of a head's channels that rotate."""


def read_rope(config: HFConfig, *, partial: bool = False) -> Rope:
    """Return the rotary positions as transformers 5 reads them.

    They come from ``rope_scaling`` if it is set, else from ``rope_parameters``, each completed by ``rope_theta`` and
    ``partial_rotary_factor``.  A length ``original_max_position_embeddings`` beside them replaces the length in them.
    ``partial``: whether the class of the family rotates only a share of the channels if ``partial_rotary_factor`` says
    so.

    Raises: ConfigError where both are set and differ (transformers then drops ``rope_parameters`` with its base, other
    programs drop ``rope_scaling``), for a base that is not an integer, and where only some of the channels rotate in a
    family without ``partial``.
    """
    scaling, parameters = config.given("rope_scaling"), config.given("rope_parameters")
    if scaling and parameters and _read(config, "rope_scaling") != _read(config, "rope_parameters"):
        raise config.error(
            f"has rope_scaling={scaling} and rope_parameters={parameters}, which differ: keep only rope_parameters"
        )
    rope = _read(config, "rope_scaling" if scaling else "rope_parameters")
    if rope.partial != 1 and not partial:
        raise config.error(f"has partial_rotary_factor={rope.partial}: only 1 is known here")
    return rope


def _read(config: HFConfig, entry: str) -> Rope:
    """Return the positions of ``rope_scaling`` or ``rope_parameters``; null is the family's default."""
    given = config.given(entry)
    parameters = dict(config.defaults[entry] or {} if given is None else given)
    if any(isinstance(value, dict) for value in parameters.values()):
        raise config.error(f"has another rope per kind of layer in {entry}, which Megatron lacks")
    theta = parameters.pop("rope_theta", None) or config["rope_theta"]
    partial = parameters.pop("partial_rotary_factor", None) or config["partial_rotary_factor"]
    kind = parameters.pop("rope_type", parameters.pop("type", "default"))
    if kind in _WITH_A_LENGTH and (length := config.given(_LENGTH)) is not None:
        parameters[_LENGTH] = length
    if (factor := parameters.pop("attn_factor", None)) not in (None, 1):
        raise config.error(
            f"has attn_factor={factor}, which transformers ignores and others multiply by YaRN's factor: remove it, or "
            "write the product as attention_factor"
        )
    if int(theta) != theta:
        raise ConfigError(f"config.json has rope_theta={theta}, but Megatron's rotary_base is a whole number")
    return Rope(int(theta), kind, parameters, 1.0 if partial is None else float(partial))


def rotary_fields(rope: Rope, config: HFConfig) -> dict[str, Any]:
    """Return the fields of `ModelConfig` for a family with ordinary attention.

    Positions are plain, or scaled as in Llama 3, linearly, or by YaRN; `Rope.partial` becomes ``rotary_percent``.

    Raises: ConfigError for another type, and for YaRN where only some of the channels rotate.
    """
    if rope.kind == "linear":
        fields: dict[str, Any] = {"rotary_base": rope.base}
        fields["seq_len_interpolation_factor"] = float(rope.parameters["factor"])
    elif rope.kind == "yarn":
        fields = {"rotary_base": rope.base, "position_embedding_type": "yarn", "yarn": _yarn_of_heads(rope, config)}
    elif rope.kind in ("default", "llama3"):
        fields = llama3_fields(rope, config)
    else:
        raise config.error(f"has rope_type={rope.kind!r}: only default, linear, llama3 and yarn are known here")
    if rope.kind == "yarn" and rope.partial != 1:
        raise ConfigError(
            f"config.json has yarn with partial_rotary_factor={rope.partial}, but Megatron's YaRN rotates all channels"
        )
    return fields if rope.partial == 1 else fields | {"rotary_percent": rope.partial}


def write_rotary(arch: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of config.json for ``arch``: the inverse of `rotary_fields`.

    ``partial_rotary_factor`` is not among them: only families whose class reads it write it.
    """
    if arch["position_embedding_type"] == "yarn":
        return {"rope_theta": float(arch["rotary_base"]), "rope_scaling": _write_yarn_of_heads(arch)}
    if arch["seq_len_interpolation_factor"] is not None:
        scaling = {"rope_type": "linear", "factor": arch["seq_len_interpolation_factor"]}
        return {"rope_theta": float(arch["rotary_base"]), "rope_scaling": scaling}
    return write_llama3(arch)


def llama3_fields(rope: Rope, config: HFConfig) -> dict[str, Any]:
    """Return the fields of `ModelConfig` for a family with plain positions or the scaling of Llama 3."""
    fields: dict[str, Any] = {"rotary_base": rope.base}
    if rope.kind == "default":
        return fields
    if rope.kind != "llama3":
        raise config.error(f"has rope_type={rope.kind!r}: only default and llama3 are known here")
    for name, expected in _LLAMA3.items():
        got = rope.parameters.get(name)
        if got is None and name == "original_max_position_embeddings":
            got = config["max_position_embeddings"]
        if got != expected:
            raise ConfigError(f"config.json has llama3 rope with {name}={got}, but Megatron computes with {expected}")
    return {**fields, "rope_scaling_factor": float(rope.parameters["factor"])}


def write_llama3(arch: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of config.json for ``arch``: the inverse of `llama3_fields`."""
    scaling = None
    if arch["rope_scaling_factor"] is not None:
        scaling = {"rope_type": "llama3", "factor": arch["rope_scaling_factor"], **_LLAMA3}
    return {"rope_theta": float(arch["rotary_base"]), "rope_scaling": scaling}


def _yarn_of_heads(rope: Rope, config: HFConfig) -> YarnConfig:
    """Return YaRN's entries for ordinary attention.

    transformers multiplies cos and sin by ``attention_factor``, else by m(mscale) / m(mscale_all_dim) where both are
    set, else by m(1), with m(x) = 0.1 x log(factor) + 1.  Megatron always takes the ratio; an ``attention_factor``
    becomes the mscale whose m it is, with mscale_all_dim = 0.
    """
    given = rope.parameters
    original = given.get("original_max_position_embeddings") or config["max_position_embeddings"]
    factor = float(given.get("factor") or config["max_position_embeddings"] / original)
    mscale, all_dim = given.get("mscale"), given.get("mscale_all_dim")
    mscale, all_dim = (float(mscale), float(all_dim)) if mscale and all_dim else (1.0, 0.0)
    if given.get("attention_factor") is not None:
        mscale, all_dim = _mscale_of(float(given["attention_factor"]), factor), 0.0
    return YarnConfig(
        rotary_scaling_factor=factor,
        original_max_position_embeddings=original,
        beta_fast=float(given.get("beta_fast") or 32),
        beta_slow=float(given.get("beta_slow") or 1),
        mscale=mscale,
        mscale_all_dim=all_dim,
        correction_range_round_to_int=bool(given.get("truncate", True)),
    )


def _mscale_of(attention_factor: float, factor: float) -> float:
    """Return the x with 0.1 x log(factor) + 1 = attention_factor, to 12 digits, so that it survives the way back."""
    if factor > 1:
        return round((attention_factor - 1) / (0.1 * math.log(factor)), 12)
    if attention_factor != 1:
        raise ConfigError(
            f"config.json has yarn rope with attention_factor={attention_factor} and factor={factor}: for a factor of "
            "at most 1 Megatron multiplies by 1; set attention_factor to null"
        )
    return 1.0


def _write_yarn_of_heads(arch: dict[str, Any]) -> dict[str, Any]:
    """Return the ``rope_scaling`` of ``arch``: the inverse of `_yarn_of_heads`."""
    factor, mscale, all_dim = (arch[f"yarn_{name}"] for name in ("rotary_scaling_factor", "mscale", "mscale_all_dim"))
    scaling = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": arch["yarn_original_max_position_embeddings"],
        "beta_fast": arch["yarn_beta_fast"],
        "beta_slow": arch["yarn_beta_slow"],
    }
    if mscale and all_dim:
        scaling |= {"mscale": mscale, "mscale_all_dim": all_dim}
    elif (mscale, all_dim) != (1.0, 0.0):
        scaling["attention_factor"] = 0.1 * mscale * math.log(factor) + 1
    if not arch["yarn_correction_range_round_to_int"]:
        scaling["truncate"] = False
    return scaling


def yarn_fields(rope: Rope, config: HFConfig) -> dict[str, Any]:
    """Return the keys of ``model.transformer`` for latent attention: plain rotary positions, or YaRN.

    As in `_yarn_of_heads`; transformers also multiplies scores by m(mscale_all_dim)^2.
    """
    if rope.kind == "default":
        return {"rope_type": "rope"}
    if rope.kind != "yarn":
        raise config.error(f"has rope_type={rope.kind!r}: only default and yarn are known here")
    given = rope.parameters
    if given.get("attention_factor") is not None:
        raise ConfigError("config.json has yarn rope with attention_factor, which Megatron derives from mscale alone")
    if not given.get("truncate", True):
        raise ConfigError("config.json has yarn rope with truncate=false, but Megatron rounds the correction range")
    if given.get("mscale_all_dim") and not given.get("mscale"):
        raise ConfigError("config.json has yarn rope with mscale_all_dim but no mscale, which Megatron cannot express")
    entries = asdict(_yarn_of_heads(rope, config))
    del entries["correction_range_round_to_int"]
    return {"rope_type": "yarn", **entries}


def write_yarn(arch: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of config.json for ``arch``: the inverse of `yarn_fields`."""
    scaling = None
    if arch["rope_type"] == "yarn":
        names = "original_max_position_embeddings beta_fast beta_slow mscale mscale_all_dim".split()
        scaling = {"rope_type": "yarn", "factor": arch["rotary_scaling_factor"], **{n: arch[n] for n in names}}
        if not arch["mscale_all_dim"]:
            if arch["mscale"] != 1.0:
                raise ConfigError(f"config.json cannot say yarn with mscale={arch['mscale']} and no mscale_all_dim")
            del scaling["mscale"], scaling["mscale_all_dim"]
    return {"rope_theta": float(arch["rotary_base"]), "rope_scaling": scaling}
