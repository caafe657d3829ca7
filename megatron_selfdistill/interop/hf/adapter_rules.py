# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The rules of low-rank adapters: from the factors of Megatron's linear layers to the factors of transformers' modules.

    rules = adapter_rules(family.rules(model), config.adapter)
    rule.to_hf(factor), rule.to_megatron(*hf_factors)

The names are PEFT's: ``base_model.model.<module>.lora_A.weight`` [r, in] and ``...lora_B.weight`` [out, r].
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megatron_selfdistill.adapters import ADAPTER_SUFFIX
from megatron_selfdistill.errors import ConfigError
from megatron_selfdistill.interop.hf.rules import Arrangement, Rule

if TYPE_CHECKING:  # an engine's processes need no configuration
    from megatron_selfdistill.config.schema.adapter_config import AdapterConfig

PEFT_PREFIX = "base_model.model."
"""What PEFT puts before the name of a module."""

_WEIGHT = ".weight"


@dataclass(frozen=True)
class Repeated:
    """An arrangement of equal tensors as one tensor, such as the factor A of q, k and v in ``linear_qkv``."""

    count: int

    def join(self, tensors: tuple[Tensor, ...]) -> Tensor:
        """Return the tensor that all ``tensors`` are.

        Raises: ConfigError where two of them differ.
        """
        for other in tensors[1:]:
            if not torch.equal(tensors[0], other):
                raise ConfigError("modules of one fused linear layer have different factors A, expected the same")
        return tensors[0]

    def split(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """Return ``tensor`` itself, once for each of the equal tensors."""
        return (tensor,) * self.count


def adapter_rules(rules: Iterable[Rule], adapter: AdapterConfig) -> list[Rule]:
    """Return two rules, of A and of B, for each adapter of a model whose weights have ``rules``.

    The adapters are those of `low_rank_adapters.add_adapters`: on the layers that ``adapter.layers`` names, but not on
    routed experts.  W [out, in] of ``<linear>.weight`` has A [r, in] in ``<linear>_adapter.a`` and B [out, r] in
    ``<linear>_adapter.b``.  Where the linear layer holds several Hugging Face modules, each of them has the same A and
    its own rows of B, cut as the weight's rule cuts W.

    Raises: ConfigError where no rule is that of an adapted layer.
    """
    made, rank = [], adapter.rank
    for rule in rules:
        key = rule.megatron.key
        *parents, linear = key.removesuffix(_WEIGHT).split(".")
        if rule.is_passthrough or not key.endswith(_WEIGHT) or linear not in adapter.layers or "experts" in parents:
            continue
        count, shape_of_a = len(rule.hf_names), (rank, rule.shape[1])
        made.append(_factor(rule, "a", shape_of_a, (shape_of_a,) * count, Repeated(count)))
        shapes_of_b = tuple((shape[0], rank) for shape in rule.hf_shapes)
        made.append(_factor(rule, "b", (rule.shape[0], rank), shapes_of_b, rule.arrangement))
    if not made:
        raise ConfigError(f"adapter.layers={list(adapter.layers)}: this model has no such layer with adapters")
    return made


def is_adapter_key(key: str) -> bool:
    """Return whether ``key`` of a Megatron checkpoint names a factor of an adapter."""
    return key.endswith((f"{ADAPTER_SUFFIX}.a", f"{ADAPTER_SUFFIX}.b"))


def _factor(
    rule: Rule, factor: str, shape: tuple[int, ...], hf_shapes: tuple[tuple[int, ...], ...], arrangement: Arrangement
) -> Rule:
    key = f"{rule.megatron.key.removesuffix(_WEIGHT)}{ADAPTER_SUFFIX}.{factor}"
    names = (f"{PEFT_PREFIX}{name.removesuffix(_WEIGHT)}.lora_{factor.upper()}.weight" for name in rule.hf_names)
    return Rule(replace(rule.megatron, key=key), shape, tuple(names), hf_shapes, arrangement)
