# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Parameters counted on the meta device: the same model in every layout, the same shards as on real ranks."""

from __future__ import annotations

import pytest
import torch
from models import build, model_config, parallel, planned
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_selfdistill.config import OptimizerConfig
from megatron_selfdistill.errors import ConfigError
from megatron_selfdistill.model.forward import unwrapped

LAYOUTS = [
    ("gqa", {"tp": 2}, 2),
    ("gqa", {"pp": 2, "tp": 2, "sp": True}, 8),
    ("gqa", {"pp": 2, "vpp": 2}, 2),
    ("gqa", {"cp": 2, "pp": 4}, 16),
    ("yarn", {"cp": 2}, 2),
    ("tied", {"pp": 2}, 2),
    ("tied", {"pp": 4, "tp": 2}, 64),
    ("gated_delta", {"tp": 2, "sp": True}, 4),
    ("gated_delta", {"pp": 2, "vpp": 2}, 2),
    ("moe", {"ep": 2}, 2),
    ("moe", {"ep": 4, "pp": 2}, 16),
    ("moe", {"ep": 2, "tp": 2, "etp": 1, "sp": True}, 4),
    ("moe", {"ep": 2, "tp": 2, "etp": 2, "sp": True}, 8),
    ("moe", {"tp": 2, "etp": 1, "sp": True}, 8),
]


@pytest.mark.parametrize(("kind", "cuts", "world_size"), LAYOUTS)
def test_the_stages_of_every_layout_are_the_same_model(kind, cuts, world_size):
    model = model_config(kind)
    (whole,) = planned(model, parallel(), 1)
    assert sum(s.model_parameters for s in planned(model, parallel(**cuts), world_size)) == whole.model_parameters
    padding = 3 * model.hidden_size * (1 if model.share_embeddings_and_output_weights else 2)  # 61 rows to 64
    assert whole.parameters == whole.model_parameters + padding


def test_optimizer_state_is_shared_by_the_ranks_that_hold_the_same_parameters():
    first, second = planned(model_config("moe"), parallel(tp=2, pp=2, ep=2, etp=1, sp=True), 16)
    assert (first.dp_cp_size, first.expert_dp_size) == (4, 4)
    (stage,) = planned(model_config("gqa"), parallel(cp=2, tp=2), 16)
    assert (stage.dp_cp_size, stage.expert_parameters) == (8, 0)
    assert (first.embeds, first.projects, second.embeds, second.projects) == (True, False, False, True)


def real_counts(kind, cuts):
    chunks, grid = build(model_config(kind), parallel(**cuts), optimizer=OptimizerConfig(precision="bf16"))
    params = [p for chunk in chunks for p in unwrapped(chunk).parameters()]
    experts = sum(p.numel() for p in params if not getattr(p, "allreduce", True))
    return grid.pp_rank, sum(p.numel() for p in params) - experts, experts


@pytest.mark.parametrize(
    ("kind", "cuts"), [("tied", {"tp": 2, "pp": 2}), ("gated_delta", {"tp": 2, "pp": 2}), ("moe", {"ep": 2, "pp": 2})]
)
def test_a_stage_holds_what_each_of_its_real_ranks_holds(ranks, kind, cuts):
    expected = {
        (stage.pp_rank, stage.dense_parameters, stage.expert_parameters)
        for stage in planned(model_config(kind), parallel(**cuts), 4)
    }
    assert set(ranks.run(real_counts, kind, cuts, world_size=4)) == expected


class _Allocations(TorchDispatchMode):
    """Bytes of every tensor off the meta device that an operator makes."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor) and not tensor.is_meta:
                self.bytes += tensor.nbytes
        return out


def test_nothing_is_allocated_but_tables_of_rotary_frequencies():
    model = model_config("moe", hidden_size=8192, ffn_hidden_size=16384, moe_ffn_hidden_size=16384, num_layers=8)
    with _Allocations() as allocations:
        stages_of_it = planned(model, parallel(pp=2, ep=2), 64)
    assert sum(stage.parameters for stage in stages_of_it) > 5e9
    assert allocations.bytes < 2**20


def test_an_allocation_is_seen():
    with _Allocations() as allocations:
        torch.empty(1000)
        torch.empty(10**12, device="meta")
    assert allocations.bytes == 4000


def test_what_megatron_refuses_to_build_is_a_message_of_one_line_with_the_stage():
    model = model_config("moe", transformer={"moe_layer_freq": [0, 1, 1]})  # of 2 layers
    with pytest.raises(
        ConfigError, match=r"^Megatron Core cannot build pipeline stage 0: .*moe_layer_pattern"
    ) as caught:
        planned(model, parallel(pp=2), 2)
    assert "\n" not in str(caught.value)


def test_an_imagined_world_leaves_no_process_group_behind():
    planned(model_config("gqa"), parallel(pp=2), 2)
    assert not torch.distributed.is_initialized()
