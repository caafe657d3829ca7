# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Read and write the rotary positions of a config.json.

The older spelling has ``rope_theta`` and ``rope_scaling``; transformers 5 has ``rope_parameters``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_selfdistill.errors import ConfigError
from megatron_selfdistill.model.hf.family import HFConfig

_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""The constants in Megatron Core's code."""


@dataclass(frozen=True)
class Rope:
    """The rotary positions of a config.json."""

    base: int
    """The base of the rotary frequencies."""
    kind: str
    """The type: default, llama3, yarn, ..."""
    parameters: dict[str, Any] = field(default_factory=dict)


def read_rope(config: HFConfig) -> Rope:
    """Return the rotary positions as transformers 5 reads them.

    They come from ``rope_scaling`` where it is set, else from ``rope_parameters``, each completed by ``rope_theta``.

    Raises: ConfigError where both are set and differ (transformers then drops ``rope_parameters`` with its base, other
    programs drop ``rope_scaling``), for a base that is not an integer, and where only some of the channels rotate.
    """
    scaling, parameters = config["rope_scaling"], config["rope_parameters"]
    if scaling and parameters and _read(config, scaling) != _read(config, parameters):
        raise ConfigError(
            f"config.json of {config.architecture} has rope_scaling={scaling} and rope_parameters={parameters}, which "
            "differ: programs disagree on which one counts; keep only rope_parameters, with rope_theta and the scaling"
        )
    return _read(config, scaling or parameters or {})


def _read(config: HFConfig, given: Mapping[str, Any]) -> Rope:
    theta, partial = config["rope_theta"], config["partial_rotary_factor"]
    parameters = dict(given)
    theta = parameters.pop("rope_theta", None) or theta
    partial = parameters.pop("partial_rotary_factor", None) or partial
    older = parameters.pop("type", None)
    kind = parameters.pop("rope_type", None) or older or "default"
    if any(isinstance(value, dict) for value in parameters.values()):
        raise ConfigError("config.json has another rope per kind of layer in rope_parameters, which Megatron lacks")
    if partial not in (None, 1, 1.0):
        raise ConfigError(f"config.json has partial_rotary_factor={partial}: only 1 is known here")
    if int(theta) != theta:
        raise ConfigError(f"config.json has rope_theta={theta}, but Megatron's rotary_base is a whole number")
    return Rope(int(theta), kind, parameters)


def llama3_fields(rope: Rope, config: HFConfig) -> dict[str, Any]:
    """Return the fields of `ModelConfig` for a family with plain positions or the scaling of Llama 3."""
    fields: dict[str, Any] = {"rotary_base": rope.base}
    if rope.kind == "default":
        return fields
    if rope.kind != "llama3":
        raise ConfigError(
            f"config.json of {config.architecture} has rope_type={rope.kind!r}: only default and llama3 are known here"
        )
    for name, expected in _LLAMA3.items():
        got = rope.parameters.get(name)
        if got is None and name == "original_max_position_embeddings":
            got = config["max_position_embeddings"]
        if got != expected:
            raise ConfigError(f"config.json has llama3 rope with {name}={got}, but Megatron computes with {expected}")
    return {**fields, "rope_scaling": True, "rope_scaling_factor": float(rope.parameters["factor"])}


def write_llama3(arch: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of config.json for ``arch``: the inverse of `llama3_fields`."""
    scaling = None
    if arch["rope_scaling"]:
        scaling = {"rope_type": "llama3", "factor": arch["rope_scaling_factor"], **_LLAMA3}
    return {"rope_theta": float(arch["rotary_base"]), "rope_scaling": scaling}


def yarn_fields(rope: Rope, config: HFConfig) -> dict[str, Any]:
    """Return the keys of ``model.transformer`` for latent attention: plain rotary positions, or YaRN.

    transformers multiplies cos and sin by m(mscale) / m(mscale_all_dim) where both are set, else by m(1), with m(x) =
    0.1 x log(factor) + 1, and scores by m(mscale_all_dim)^2; Megatron always takes the ratio.
    """
    if rope.kind == "default":
        return {"rope_type": "rope"}
    if rope.kind != "yarn":
        raise ConfigError(
            f"config.json of {config.architecture} has rope_type={rope.kind!r}: only default and yarn are known here"
        )
    given = rope.parameters
    if given.get("attention_factor") is not None:
        raise ConfigError("config.json has yarn rope with attention_factor, which Megatron derives from mscale alone")
    if not given.get("truncate", True):
        raise ConfigError("config.json has yarn rope with truncate=false, but Megatron rounds the correction range")
    mscale, all_dim = given.get("mscale"), given.get("mscale_all_dim")
    if all_dim and not mscale:
        raise ConfigError("config.json has yarn rope with mscale_all_dim but no mscale, which Megatron cannot express")
    original = given.get("original_max_position_embeddings") or config["max_position_embeddings"]
    factor = given.get("factor") or config["max_position_embeddings"] / original
    return {
        "rope_type": "yarn",
        "rotary_scaling_factor": factor,
        "original_max_position_embeddings": original,
        "beta_fast": given.get("beta_fast") or 32,
        "beta_slow": given.get("beta_slow") or 1,
        "mscale": float(mscale) if mscale and all_dim else 1.0,
        "mscale_all_dim": float(all_dim or 0.0),
    }


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
