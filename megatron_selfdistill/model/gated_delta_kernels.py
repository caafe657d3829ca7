# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The kernels of flash-linear-attention for gated delta nets: which models compute with them, and which are refused.

On a CPU a gated delta net computes with PyTorch, and on a GPU with ``model.transformer.deterministic_mode=true``.  That
formula is float32 throughout and slow, and holds about 9 kB for each token and head of 128 channels until the backward
pass.
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

OLDEST = (0, 6)
"""The oldest version that is taken: up to 0.4 the gradients are wrong on Hopper GPUs with Triton 3.4 to 3.7.0."""
_INSTEAD = (
    "set model.transformer.deterministic_mode=true (with Transformer Engine also the environment variable "
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO=0), which computes them with PyTorch: slowly, with much memory"
)
_INSTALL = "run pip install -e '.[gdn]' in a clone of this project"


@dataclass(frozen=True)
class GatedDeltaKernels:
    """The functions of flash-linear-attention that a gated delta net calls, with the signatures of version 0.6.

    A packed sequence is one row, for which both functions take ``cu_seqlens [segments + 1]`` int64 on the device, and
    ``cu_seqlens_cpu``, which spares a wait for the device.
    """

    causal_conv1d: Callable[..., Any]
    """The convolution of ``[b, s, channels]`` with a weight ``[channels, taps]``, and the state behind it."""
    chunk_gated_delta_rule: Callable[..., Any]
    """The recurrence of ``[b, s, heads, d]``, and its state ``[b or segments, heads, d_k, d_v]`` float32."""


def kernels_for(config: TransformerConfig) -> GatedDeltaKernels | None:
    """Return the kernels with which a model computes on this device; None for PyTorch's formula.

    Raises: `ConfigError` on a GPU, without ``deterministic_mode``, if flash-linear-attention is missing or too old, or
    if the parameters are float32, which the kernels would multiply as TF32, with 10 bits.
    """
    if cpu.ON_CPU or config.deterministic_mode:
        return None
    if config.params_dtype == torch.float32:
        raise ConfigError(
            "optimizer.precision=fp32: flash-linear-attention does not compute gated delta nets in float32 on a GPU: "
            f"set optimizer.precision=bf16, or {_INSTEAD}"
        )
    return _imported()


@functools.cache
def _imported() -> GatedDeltaKernels:
    try:
        version = importlib.import_module("fla").__version__
        convolution = importlib.import_module("fla.modules.conv")
        rule = importlib.import_module("fla.ops.gated_delta_rule")
    except ImportError as error:
        raise ConfigError(
            f"gated delta nets on GPUs need flash-linear-attention, which cannot be imported ({error}): {_INSTALL}, or "
            f"{_INSTEAD}"
        ) from error
    if tuple(map(int, version.split(".")[:2])) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise ConfigError(
            f"flash-linear-attention: expected {oldest} or later, since older versions have wrong gradients on some "
            f"GPUs, got {version}: {_INSTALL}, or {_INSTEAD}"
        )
    return GatedDeltaKernels(convolution.causal_conv1d, rule.chunk_gated_delta_rule)
