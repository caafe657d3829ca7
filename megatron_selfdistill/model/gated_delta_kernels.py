# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The kernels of flash-linear-attention for gated delta nets: which models compute with them, and which are refused.

On a CPU, and with ``model.transformer.deterministic_mode=true`` also on a GPU, a gated delta net computes with PyTorch.
That formula is float32 throughout, is several times slower, and holds hundreds of kilobytes per token and layer for the
backward pass.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_selfdistill.compat import cpu
from megatron_selfdistill.errors import ConfigError

PYTORCH_INSTEAD = "set model.transformer.deterministic_mode=true, which computes gated delta nets with PyTorch, slowly"


@dataclass(frozen=True)
class GatedDeltaKernels:
    """The functions of flash-linear-attention that a gated delta net calls, with the signatures of version 0.5.2.

    A packed sequence is one row, for which both functions take ``cu_seqlens [segments + 1]`` int64 on the device, and
    ``cu_seqlens_cpu``, which spares a wait for the device.
    """

    causal_conv1d: Callable[..., Any]
    """The convolution of ``[b, s, channels]`` with a weight ``[channels, taps]``, and the state behind it."""
    chunk_gated_delta_rule: Callable[..., Any]
    """The recurrence of ``[b, s, heads, d]``, and its state ``[b or segments, heads, d_k, d_v]`` float32."""


def kernels_for(config: TransformerConfig) -> GatedDeltaKernels | None:
    """Return the kernels with which a model computes on this device; None for PyTorch's formula.

    Raises: `ConfigError` on a GPU, without ``deterministic_mode``, if flash-linear-attention is not installed or the
    parameters are float32.  Its matrix products round float32 to TF32, which keeps 10 bits.
    """
    if cpu.ON_CPU or config.deterministic_mode:
        return None
    if config.params_dtype == torch.float32:
        raise ConfigError(
            "optimizer.precision=fp32: the kernels of flash-linear-attention do not compute gated delta nets in "
            f"float32 (they round it to TF32): set optimizer.precision=bf16, or {PYTORCH_INSTEAD}"
        )
    return _imported()


@functools.cache
def _imported() -> GatedDeltaKernels:
    try:
        convolution = importlib.import_module("fla.modules.conv")
        rule = importlib.import_module("fla.ops.gated_delta_rule")
    except ImportError as error:
        raise ConfigError(
            f"gated delta nets on a GPU need flash-linear-attention, which cannot be imported ({error}): run pip "
            f"install -e '.[gdn]' in a clone of this project, or {PYTORCH_INSTEAD}"
        ) from error
    return GatedDeltaKernels(convolution.causal_conv1d, rule.chunk_gated_delta_rule)
