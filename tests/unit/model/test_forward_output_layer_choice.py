# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""When the output layer is fused with the loss, and how large its logits are."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_selfdistill.choices import FUSED_MODES
from megatron_selfdistill.config.compose import from_mapping
from megatron_selfdistill.errors import ConfigError
from megatron_selfdistill.model.forward import Fusion
from megatron_selfdistill.model.output_layer import OutputLayer, choose_output_layer

GIB = 2**30
ROWS = 16384
COLUMNS = 32768  # in bf16 a row is 64 KiB, so 16384 of them are 1 GiB


def chosen(cannot: str | None = None, policy_term: bool = False, **loss: Any) -> OutputLayer:
    sections: dict[str, Any] = {"schedule": {"max_tokens": ROWS}, "loss": loss}
    if policy_term:
        sections["method"] = {"name": "opsd_rl", "weight": 0.0, "signal": "sampled"}
    return choose_output_layer(from_mapping(sections), COLUMNS, cannot)


CHOICES = [
    (2.0, 4096, "materialised", 2.0),
    (1.99, 4096, "keep_gradient", 1.25),
    (1.25, 4096, "keep_gradient", 1.25),
    (1.24, 4096, "low_memory", 0.5),
    (0.1, 1024, "low_memory", 0.125),
    (0.1, 16384, "materialised", 2.0),
]
"""loss.max_logits_gb, loss.fused_chunk_tokens -> the mode, and the largest logits in GiB."""


def test_the_choice_by_the_size_of_the_logits_and_with_a_policy_term_low_memory_for_keep_gradient():
    for limit, chunk, mode, size in CHOICES:
        layer = chosen(max_logits_gb=limit, fused_chunk_tokens=chunk)
        assert (layer.mode, layer.largest / GIB) == (mode, size)
        assert layer.fusion == (None if mode == "materialised" else Fusion(mode, chunk))
        beside = chosen(policy_term=True, max_logits_gb=limit, fused_chunk_tokens=chunk)
        assert beside.mode == ("low_memory" if mode == "keep_gradient" else mode)
        assert ("policy" in str(beside)) == (mode == "keep_gradient") and "policy" not in str(layer)


def test_keep_gradient_is_refused_beside_a_policy_term():
    with pytest.raises(ConfigError, match=r"loss\.fused=keep_gradient .*loss\.fused=low_memory"):
        chosen(policy_term=True, fused="keep_gradient")
    for mode in ("low_memory", "none"):
        assert chosen(policy_term=True, fused=mode).mode == chosen(fused=mode).mode


def test_the_default_limit_is_a_twentieth_of_the_memory_and_every_cut_of_rows_and_columns_counts():
    for memory, mode in [(40.0, "materialised"), (39.9, "keep_gradient")]:
        config = from_mapping({"schedule": {"max_tokens": ROWS}, "cluster": {"gpu_memory_gb": memory}})
        assert choose_output_layer(config, COLUMNS).mode == mode

    def size(**sections: Any) -> float:
        config = from_mapping({"schedule": {"max_tokens": ROWS}, "cluster": {"gpu_memory_gb": 80.0}, **sections})
        return choose_output_layer(config, COLUMNS).largest / GIB

    assert size() == 2
    assert size(parallel={"tensor_model_parallel_size": 2}) == 1
    assert size(parallel={"context_parallel_size": 2}) == 1
    assert size(optimizer={"precision": "fp32"}) == 4
    assert size(method={"name": "rft"}) == 3, "there is no teacher, but a copy in float32"
    assert size(method={"name": "rft"}, optimizer={"precision": "fp32"}) == 2, "written over"


def test_what_is_asked_for_is_taken_whatever_its_size():
    for mode in FUSED_MODES:
        assert chosen(fused=mode).mode == mode
    assert chosen(fused="none", max_logits_gb=0).mode == "materialised"
    baseline = from_mapping({"method": {"name": "rft"}, "loss": {"max_logits_gb": 0}})
    assert choose_output_layer(baseline, COLUMNS).mode == "materialised"


def test_what_cannot_be_fused_is_refused_or_told():
    with pytest.raises(ConfigError, match=r"loss\.fused=low_memory .* it has a bias"):
        chosen("it has a bias", fused="low_memory")
    assert str(chosen("it has a bias", max_logits_gb=0)).endswith("because it has a bias")
    assert chosen("it has a bias").note == "" and chosen("it has a bias", fused="none").note == ""
