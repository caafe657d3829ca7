# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The door of the loss's Triton kernels: whether they can run here, and the `Backend` that launches them."""

from __future__ import annotations

import importlib.util
import os
import re
from functools import cache

import torch

from megatron_selfdistill.loss.sharded.vocab_parallel import Backend

OLDEST_TRITON = (3, 3)
"""The first version of triton whose kernels can pass tuples to functions."""


def reason_against(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return the reason why the kernels cannot run on logits of this dtype on this device; None if they can."""
    if not _has_triton():
        return "the package triton is not installed"
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"its kernels take bfloat16, float16 and float32, and the logits are {str(dtype).removeprefix('torch.')}"
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"the logits lie on {device.type}, not on cuda"
    version = _triton_version()
    if tuple(map(int, re.findall(r"\d+", version)[:2])) < OLDEST_TRITON:
        return f"triton {version} is installed, and {'.'.join(map(str, OLDEST_TRITON))} or later is needed"
    return None


@cache
def _has_triton() -> bool:
    """Look once for triton: every call of the loss asks, in guided rollouts at every token."""
    return importlib.util.find_spec("triton") is not None


@cache
def _triton_version() -> str:
    # The module knows its version; the distribution has several names.
    import triton

    return str(triton.__version__)


@cache
def backend() -> Backend:
    """Return the kernels, whose import takes a second, as a backend of the loss."""
    from megatron_selfdistill.kernels import contrast_kernels, pass_launches, solver_launches

    return Backend(
        name="triton",
        num_parts=pass_launches.num_parts,
        first_pass=pass_launches.first_pass,
        solve_tokens=solver_launches.solve_tokens,
        second_pass=pass_launches.second_pass,
        finish_tokens=solver_launches.finish_tokens,
        jsd_pass=pass_launches.jsd_pass,
        renyi_pass=pass_launches.renyi_pass,
        write_gradient=pass_launches.write_gradient,
        row_log_sums=contrast_kernels.row_log_sums,
        contrast=contrast_kernels.contrast,
    )
