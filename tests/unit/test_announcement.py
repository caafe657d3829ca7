# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""What a run says before its first step."""

from __future__ import annotations

import pytest

from megatron_selfdistill.announcement import about_adapters
from megatron_selfdistill.config import AdapterConfig


@pytest.mark.parametrize(
    ("num_moe_experts", "end"), [(None, "all else is frozen"), (8, "frozen; the routed experts have no adapters")]
)
def test_a_run_says_what_its_adapters_are_on_and_that_routed_experts_have_none(num_moe_experts, end):
    adapter = AdapterConfig(rank=4, alpha=8, layers=["linear_qkv", "linear_fc1"])
    line = about_adapters(adapter, num_moe_experts)
    assert line.startswith("adapters of rank 4, scale 2, on linear_qkv, linear_fc1: ") and line.endswith(end)
