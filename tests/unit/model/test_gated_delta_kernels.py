# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The kernels of gated delta nets: none on a CPU; on a GPU those of flash-linear-attention, or a sentence."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import fla_stand_in
import pytest
import torch
from models import build, model_config, parallel

from megatron_selfdistill.errors import ConfigError
from megatron_selfdistill.model import gated_delta_kernels
from megatron_selfdistill.model.gated_delta_kernels import kernels_for

BF16 = SimpleNamespace(params_dtype=torch.bfloat16, deterministic_mode=False)
FP32 = SimpleNamespace(params_dtype=torch.float32, deterministic_mode=False)
INSTEAD = r"or set model\.transformer\.deterministic_mode=true .*NVTE_ALLOW_NONDETERMINISTIC_ALGO=0"


@pytest.fixture
def on_gpu(monkeypatch):
    """Let this module believe that it computes on a GPU, where no flash-linear-attention is installed."""
    monkeypatch.setattr(gated_delta_kernels, "cpu", SimpleNamespace(ON_CPU=False))
    for name in ("fla", "fla.modules", "fla.modules.conv", "fla.ops", "fla.ops.gated_delta_rule"):
        monkeypatch.setitem(sys.modules, name, None)
    gated_delta_kernels._imported.cache_clear()
    yield monkeypatch
    gated_delta_kernels._imported.cache_clear()


def install(patch: pytest.MonkeyPatch, version: str) -> None:
    for name in ("fla", "fla.modules", "fla.modules.conv", "fla.ops", "fla.ops.gated_delta_rule"):
        module = ModuleType(name)
        module.__dict__.update(__version__=version, __path__=[], **vars(fla_stand_in))
        patch.setitem(sys.modules, name, module)


def test_a_cpu_computes_without_kernels():
    assert kernels_for(BF16) is None and kernels_for(FP32) is None


def test_a_gpu_computes_with_the_installed_kernels(on_gpu):
    install(on_gpu, "0.6.0")
    kernels = kernels_for(BF16)
    assert kernels.causal_conv1d is fla_stand_in.causal_conv1d
    assert kernels.chunk_gated_delta_rule is fla_stand_in.chunk_gated_delta_rule


def test_a_gpu_without_the_package_is_refused_with_both_ways_out(on_gpu):
    with pytest.raises(
        ConfigError, match=rf"need flash-linear-attention, .*: run pip install -e '\.\[gdn\]' .*{INSTEAD}"
    ):
        kernels_for(BF16)


def test_a_version_with_wrong_gradients_is_refused(on_gpu):
    """Megatron Core's own extra installs 0.4."""
    install(on_gpu, "0.4.2")
    with pytest.raises(ConfigError, match=rf"expected 0\.6 or later, .* got 0\.4\.2: .*{INSTEAD}"):
        kernels_for(BF16)


def test_float32_on_a_gpu_is_refused(on_gpu):
    install(on_gpu, "0.6.0")
    with pytest.raises(ConfigError, match=rf"optimizer\.precision=fp32: .* set optimizer\.precision=bf16, {INSTEAD}"):
        kernels_for(FP32)


@pytest.mark.parametrize("config", [BF16, FP32])
def test_the_deterministic_mode_computes_with_pytorch(on_gpu, config):
    assert kernels_for(SimpleNamespace(**{**vars(config), "deterministic_mode": True})) is None


def built_on_gpu() -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gated_delta_kernels, "cpu", SimpleNamespace(ON_CPU=False))
        with pytest.raises(ConfigError) as refused:
            build(model_config("gated_delta"), parallel())
    return str(refused.value)


def test_a_model_is_refused_when_it_is_built(ranks):
    (message,) = ranks.run(built_on_gpu, world_size=1)
    assert message.startswith("optimizer.precision=fp32")
