# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""A config.json from any source is read, or refused in one sentence, and never fails otherwise."""

from __future__ import annotations

import json
import math
from typing import Any

import hf_models
import pytest
from tiers import combinations
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from megatron_selfdistill.errors import ConfigError
from megatron_selfdistill.interop.hf.family import HFConfig
from megatron_selfdistill.interop.hf.mapping import FAMILIES, check_counts, family_of

KINDS = {hf_models.CONFIGS[kind][0]: kind for kind in reversed(hf_models.CONFIGS)}.values()
"""One kind of each family."""
VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 10**9, 10**30, 0.0, 0.5, 1.5, -0.5, 1e300, math.nan, math.inf, -math.inf),
    *("", "64", "silu", [], [64], ["64"], [-1], [None], [[1]], {}, {"64": 64}, {"rope_type": {}}),
]
"""One value of each type that JSON has, numbers at the ends of each range, and values that look like others."""
WITHIN = ("rope_parameters", "rope_scaling", "quantization_config", "text_config")
"""The objects of a config.json whose fields are read."""


def config_json(kind: str) -> dict[str, Any]:
    """Return the config.json of a kind, as transformers saves it."""
    if kind == "mistral3":
        return {"architectures": ["Mistral3ForConditionalGeneration"], "text_config": config_json("mistral_window")}
    config = json.loads(json.dumps(hf_models.hf_config(kind).to_dict(), default=str))
    family = next(family for family in FAMILIES.values() if family.model_type == config["model_type"])
    return {**config, "architectures": [family.architecture]}


def fields_read(config: dict[str, Any]) -> set[str]:
    family = family_of(config)
    if family.text_config is not None:
        return {"text_config"}
    asked = {"architectures", "model_type"}

    class Recorded(HFConfig):
        def __getitem__(self, key: str) -> Any:
            asked.add(key)
            return super().__getitem__(key)

    family.read(Recorded(family.architecture, config, family.defaults))
    return asked


@combinations(
    kind=[*KINDS, "mistral3"], quick={"kind": [kind for kind in KINDS if kind in hf_models.QUICK]}, strength=1
)
def test_every_value_of_every_field_is_read_or_refused_in_a_sentence(kind):
    config = config_json(kind)
    places = [((), name) for name in fields_read(config) - {"architectures", "text_config"}]
    places += [((outer,), name) for outer in WITHIN for name in config.get(outer) or ()]
    for path, name in places:
        for value in VALUES:
            inner = {**(config[path[0]] if path else config), name: value}
            trial = {**config, path[0]: inner} if path else inner
            try:
                family_of(trial).model_config(trial)
            except ConfigError as error:
                assert "\n" not in str(error)


def test_an_architecture_with_any_other_model_type_of_transformers_is_refused_with_own_code_too():
    known = {family.model_type for family in FAMILIES.values()}
    for family in FAMILIES.values():
        assert family.model_type in CONFIG_MAPPING_NAMES
        for model_type in CONFIG_MAPPING_NAMES.keys() - {family.model_type}:
            own_code = {"auto_map": {"AutoConfig": "configuration_own.Own"}} if model_type in known else {}
            with pytest.raises(ConfigError, match="model_type"):
                family_of({"architectures": [family.architecture], "model_type": model_type, **own_code})


def test_more_layers_or_experts_than_tensors_are_refused_before_they_are_enumerated():
    counts = {"llama2": "num_hidden_layers", "mixtral": "num_local_experts", "deepseek_v3": "num_nextn_predict_layers"}
    for kind, name in counts.items():
        config = {field: value for field, value in config_json(kind).items() if field != "num_mtp_layers"}
        config |= {name: 9000}
        with pytest.raises(ConfigError, match=f"{name}=9000, but only 50 tensors"):
            check_counts(family_of(config), config, [f"tensor {i}" for i in range(50)])
