# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Compare Megatron's grouped experts, over stand-ins for Transformer Engine's layers, with the experts of a CPU.

Names in checkpoints and exports, gradients and loaded weights are equal.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import layouts
import pytest
import torch
import torch.nn.functional as F
from layouts import Case, Outcomes, worst_difference
from models import parallel
from tiers import combinations
from torch import Tensor

from megatron_selfdistill.compat import repairs  # noqa: F401  isort: skip  (must come before megatron.core)
from megatron.core.dist_checkpointing.utils import replace_prefix_for_sharding
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import TEGroupedMLP
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

from megatron_selfdistill.compat.older_megatron import submodules_of
from megatron_selfdistill.model import architecture, build

LAYOUTS = {
    "one rank": (parallel(), 1),
    "EP2": (parallel(ep=2), 2),
    "EP2xTP2+SP": (parallel(ep=2, tp=2, etp=1, sp=True), 2),
    "ETP2": (parallel(tp=2, etp=2, sp=True), 2),
}
BIASED = {
    "add_bias_linear": True,
    "qk_layernorm": False,
    "activation": "quick_gelu",
    "transformer": {"softmax_type": "learnable", "activation_func_clamp_value": 1.0, "glu_linear_offset": 1.0},
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("Qwen3MoeForCausalLM", {}),
    "biased": ("GptOssForCausalLM", BIASED),
}
"""Kinds of experts -> the family whose names the export has, and the changes of the model."""


class GroupedLinear(torch.nn.Module):
    """One matrix per expert, named, cut and described for checkpoints as Megatron's ``TEGroupedLinear`` does.

    Like Transformer Engine's, its biases have no mark of tensor parallelism.
    """

    axis: int

    def __init__(self, num_gemms: int, inputs: int, outputs: int, *, config: Any, bias: bool, **options: Any) -> None:
        super().__init__()
        self.num_gemms, self.groups, self.has_bias = num_gemms, options["pg_collection"], bias
        self.skip_bias_add, cuts = options["skip_bias_add"], self.groups.expt_tp.size()
        shape = (outputs // cuts, inputs) if self.axis == 0 else (outputs, inputs // cuts)
        for index in range(num_gemms):
            weight = torch.nn.Parameter(torch.empty(shape, dtype=config.params_dtype))
            weight.allreduce = config.expert_model_parallel_size == 1
            set_tensor_model_parallel_attributes(weight, True, self.axis, 1)
            self.register_parameter(f"weight{index}", weight)
            if bias:
                zeros = torch.nn.Parameter(torch.zeros(outputs, dtype=config.params_dtype))
                zeros.allreduce = weight.allreduce
                self.register_parameter(f"bias{index}", zeros)

    def forward(self, x: Tensor, m_splits: list[int]) -> tuple[Tensor, list[Tensor] | None]:
        biases = [getattr(self, f"bias{i}") for i in range(self.num_gemms)] if self.has_bias else None
        added = [None] * self.num_gemms if biases is None or self.skip_bias_add else biases
        parts = x.split(m_splits)
        out = torch.cat([F.linear(part, getattr(self, f"weight{i}"), added[i]) for i, part in enumerate(parts)])
        return out, biases if self.skip_bias_add else None

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: Any = None) -> dict[str, Any]:
        found = {}
        first, count = self.groups.ep.rank() * self.num_gemms, self.groups.ep.size() * self.num_gemms
        for index in range(self.num_gemms):
            kinds = ("weight", "bias") if self.has_bias else ("weight",)
            shards = make_sharded_tensors_for_checkpoint(
                {f"{index}.{kind}": getattr(self, f"{kind}{index}") for kind in kinds},
                "",
                {f"{index}.weight": self.axis} | ({f"{index}.bias": 0} if self.axis == 0 else {}),
                (*sharded_offsets, (len(sharded_offsets), first + index, count)),
                tp_group=self.groups.expt_tp,
                dp_cp_group=metadata["dp_cp_group"],
            )
            replace_prefix_for_sharding(shards, f"{index}.", prefix)
            for kind in kinds:
                shard = shards[f"{index}.{kind}"]
                shard.replica_id = (*shard.replica_id[:2], self.groups.expt_dp.rank())
                found[f"{prefix}{kind}{index}"] = shard
        return found


class GroupedColumn(GroupedLinear):
    axis = 0


class GroupedRow(GroupedLinear):
    axis = 1


def grouped_spec(config: Any, vp_stage: int | None = None, *, transformer_engine: bool | None = None) -> Any:
    """Return the local layer spec with Megatron's own ``TEGroupedMLP`` as its experts, over the stand-ins."""
    block = architecture.layer_spec(config, vp_stage, transformer_engine=False)
    for spec in block.layer_specs:
        experts = {"submodules": MLPSubmodules(linear_fc1=GroupedColumn, linear_fc2=GroupedRow)}
        mlp = submodules_of(spec.submodules.mlp)
        is_partial = isinstance(mlp.experts, functools.partial)
        mlp.experts = functools.partial(TEGroupedMLP, **experts) if is_partial else ModuleSpec(TEGroupedMLP, **experts)
    return block


def run_each(jobs: list[tuple[Case, bool]]) -> list[layouts.Outcome]:
    outcomes = []
    for case, grouped in jobs:
        with pytest.MonkeyPatch.context() as patch:
            if grouped:
                patch.setattr(build, "layer_spec", grouped_spec)
            outcomes.append(layouts.run(case))
    return outcomes


@pytest.fixture(scope="module")
def outcomes(ranks) -> Outcomes:
    return Outcomes(ranks, run_each)


in_layouts = combinations(
    name=list(LAYOUTS),
    model=list(MODELS),
    valid=lambda name, model: (name, model) != ("ETP2", "biased"),  # experts with biases cannot be cut
    quick={"name": ["EP2xTP2+SP"]},
    strength=1,
)


@in_layouts
def test_gradients_of_grouped_experts_equal_those_of_experts_one_after_the_other(outcomes, name, model):
    cuts, world_size = LAYOUTS[name]
    case = Case(kind="moe", parallel=cuts, model_changes=MODELS[model][1])
    reference = dataclasses.replace(case, parallel=parallel(), extra_weightless=0)
    alone, expected, _ = outcomes((reference, False))
    outcome, got, _ = outcomes((case, True), world_size)
    assert outcome.loss == pytest.approx(alone.loss, rel=1e-5) and alone.loss > 0.05
    assert outcome.grad_norm == pytest.approx(alone.grad_norm, rel=1e-5)
    worst, where = worst_difference(got, expected)
    assert worst < 1e-5, f"{where} differs by {worst:.1e}"
