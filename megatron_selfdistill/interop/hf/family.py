# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Convert the config.json of a Hugging Face family to a `ModelConfig` and back, and give the rules of its tensors."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_selfdistill.config import ModelConfig
from megatron_selfdistill.config.schema.field_checks import kinds_of
from megatron_selfdistill.config.schema.model_config import MAX_LAYERS
from megatron_selfdistill.config.schema.ranges import taken_apart
from megatron_selfdistill.errors import ConfigError
from megatron_selfdistill.interop.hf.decoder import TensorNames, decoder_rules
from megatron_selfdistill.interop.hf.rules import Rule
from megatron_selfdistill.model.model_values import TRANSFORMER_DEFAULTS, architecture, differences


@dataclass(frozen=True)
class HFConfig:
    """The values of a config.json, completed by the defaults of transformers' configuration class."""

    architecture: str
    values: Mapping[str, Any]
    defaults: Mapping[str, Any]

    def __getitem__(self, key: str) -> Any:
        if key in self.values:
            return self.values[key]
        if key in self.defaults:
            return self.defaults[key]
        raise self.error(f"has no {key}")

    def given(self, key: str) -> Any:
        """Return the value of ``key`` in the config.json itself; None if it has none."""
        return self[key] if key in self.values else None

    def error(self, fault: str) -> ConfigError:
        """Return the error of a config.json that ``fault``, such as "has no layer with experts"."""
        return ConfigError(f"config.json of {self.architecture} {fault}")

    def require(self, key: str, allowed: tuple[Any, ...], otherwise: str) -> None:
        """Raise ConfigError for a value of ``key`` that is not in ``allowed``; ``otherwise`` ends the message."""
        if self[key] not in allowed:
            raise self.error(f"has {key}={self[key]!r}: {otherwise}")


@dataclass(frozen=True)
class Family:
    """One architecture of transformers."""

    architecture: str
    """The name in ``architectures`` of config.json, such as ``LlamaForCausalLM``."""
    model_type: str
    """The ``model_type`` of config.json, such as ``llama``, by which transformers chooses the class."""
    read: Callable[[HFConfig], ModelConfig]
    """A function that reads every field that changes logits, and refuses values that Megatron cannot compute."""
    write: Callable[[dict[str, Any]], dict[str, Any]]
    """A function from the `architecture` of a model to the fields of config.json."""
    further_defaults: Mapping[str, Any] = field(default_factory=dict)
    """The defaults that are no fields of transformers' configuration class, and those that it sets later."""
    tensor_names: TensorNames = field(default_factory=TensorNames)
    """The parts of tensors' names that differ between families."""
    adapt: Callable[[Rule], Rule] = lambda rule: rule
    """A function from a rule of `decoder_rules` to the rule of this family, which may rename or fuse tensors."""
    quantizations: tuple[str, ...] = ("fp8",)
    """The ``quant_method`` of the published weights that the converter can dequantise."""
    published_types: tuple[str, ...] = ()
    """Further values of ``model_type``, unknown to transformers, with which models of this family are published."""
    text_config: Callable[[Mapping[str, Any]], dict[str, Any]] | None = None
    """A function from the config.json of a model with further parts to that of its text model; null without them."""
    carried: tuple[str, ...] = ()
    """The prefixes of the tensors of the further parts, which Megatron does not build: conversions carry them along."""

    @property
    def defaults(self) -> dict[str, Any]:
        """The defaults of transformers' configuration class, with those of every family."""
        return {**_OF_EVERY_FAMILY, **_defaults_of_class(self.model_type), **self.further_defaults}

    def model_config(self, hf_config: Mapping[str, Any]) -> ModelConfig:
        """Return the model that a config.json describes.

        Raises: ConfigError for a missing field, or a value with which Megatron Core would compute other numbers.
        """
        config = HFConfig(self.architecture, hf_config, self.defaults)
        num_layers = hf_config.get("num_hidden_layers")
        if isinstance(num_layers, int) and num_layers > MAX_LAYERS:  # families make lists with one value per layer
            raise config.error(f"has num_hidden_layers={num_layers}: expected at most {MAX_LAYERS}")
        try:
            _require_known_quantization(config, self)
            config.require("is_causal", (True, None), "Megatron's attention is causal")
            config.require("per_layer_config", (None, {}), "Megatron has one configuration for all layers")
            model = self.read(config)
            _require_types(config, model)
            return model
        except ConfigError:
            raise
        except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
            raise config.error(f"has a value of another type ({type(error).__name__}: {error})") from error

    def hf_config(
        self, model: ModelConfig, dtype: str = "bfloat16", extra: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Return a config.json for ``model`` that any version of transformers and vLLM reads.

        ``extra``: the original config.json, or further keys such as token ids.  The result is the original with
        ``torch_dtype`` set and without ``quantization_config``, because converted weights are not quantised.

        Raises: ConfigError with the differences where the result would describe another model.
        """
        config = dict(extra or {})
        if "num_hidden_layers" not in config and not (self.text_config is not None and config):
            config = self.describe(model) | config
        config.pop("quantization_config", None)
        config["dtype" if "dtype" in config else "torch_dtype"] = dtype
        differing = differences(self.model_config(config), model)
        if differing:
            raise ConfigError(
                f"a config.json of {self.architecture} is of another model: {describe_differences(differing)}"
            )
        return config

    def describe(self, model: ModelConfig) -> dict[str, Any]:
        """Return the config.json nearest to ``model``, without the properties that this family cannot express."""
        return {"architectures": [self.architecture], "model_type": self.model_type} | self.write(architecture(model))

    def rules(self, model: ModelConfig) -> list[Rule]:
        """Return one rule per tensor of the model: embedding, layers, norm, output layer, then passthrough layers."""
        return [self.adapt(rule) for rule in decoder_rules(architecture(model), self.tensor_names)]


_OF_EVERY_FAMILY: dict[str, Any] = {
    **dict.fromkeys("quantization_config is_causal per_layer_config rope_scaling rope_parameters".split()),
    **dict.fromkeys("num_key_value_heads head_dim partial_rotary_factor sliding_window layer_types".split()),
    **dict.fromkeys("attention_bias mlp_bias use_sliding_window".split(), False),
    "rope_theta": 10000.0,
}
"""The values of a config.json that lacks a key, unless the class has a default of its own."""


@functools.cache
def _defaults_of_class(model_type: str) -> dict[str, Any]:
    from transformers import CONFIG_MAPPING  # takes seconds

    if model_type not in CONFIG_MAPPING:  # an older transformers
        return {}
    parameters = inspect.signature(CONFIG_MAPPING[model_type]).parameters.values()
    return {parameter.name: parameter.default for parameter in parameters if parameter.default is not parameter.empty}


def describe_differences(differing: Mapping[str, tuple[Any, Any]]) -> str:
    """Return the `differences` of a config.json to a model, for a message."""
    return "; ".join(f"{name} would be {a!r} but the model has {b!r}" for name, (a, b) in differing.items())


def _require_types(config: HFConfig, model: ModelConfig) -> None:
    """Raise ConfigError for a value of the model that JSON can hold and that the model cannot have."""
    for name, kind in kinds_of(ModelConfig).items():
        plain, value = taken_apart(kind)[0], getattr(model, name)
        if value is None or not isinstance(plain, type):
            continue
        known = (int, float) if plain is float else plain
        if not isinstance(value, known) or (type(value) is bool and plain is not bool):
            raise config.error(f"makes model.{name} {value!r}: expected a value of the type {plain.__name__}")
    for name, default in TRANSFORMER_DEFAULTS.items():
        value = model.transformer.get(name, default)
        is_zero = type(value) in (int, float) and not value  # which Megatron takes for an absent part
        if (is_zero and value != default) or (isinstance(value, str) and isinstance(default, int | float)):
            raise config.error(f"makes model.transformer.{name} {value!r}: expected a number above 0")


def _require_known_quantization(config: HFConfig, family: Family) -> None:
    quantization = config["quantization_config"]
    if quantization is None:
        return
    method, block = quantization.get("quant_method"), quantization.get("weight_block_size")
    known = method in family.quantizations
    if known and method == "mxfp4":
        return
    if not known or not block or len(block) != 2:
        what = "mxfp4 experts" if "mxfp4" in family.quantizations else "block-scaled fp8 weights"
        raise ConfigError(
            f"config.json has quantization_config with quant_method={method!r} and weight_block_size={block}: only "
            f"{what} can be dequantised; take the unquantised model"
        )
