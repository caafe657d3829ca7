# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The choice between PyTorch, which defines the sharded loss, and the Triton kernels, which are faster."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from megatron_selfdistill.choices import LOSS_BACKENDS
from megatron_selfdistill.loss.sharded import shard_sums, token_statistics
from megatron_selfdistill.loss.sharded.shard_sums import TokenConstants
from megatron_selfdistill.loss.sharded.token_statistics import TokenResults

OLDEST_TRITON = (3, 3)
"""The first version of triton whose kernels can pass tuples to functions."""


@dataclass(frozen=True)
class Backend:
    """The passes over the logits, and the solving between them.

    `shard_sums` and `token_statistics` have the contracts.
    num_parts: takes (T, columns per rank) and returns into how many parts each row is cut, the same number on all
    ranks.
    solve_tokens: returns a state, whose ``constants`` are for second_pass.
    finish_tokens: takes this state and returns the results with a new state, whose ``constants`` are for another
    second_pass.
    """

    name: str
    num_parts: Callable[[int, int], int]
    first_pass: Callable[..., tuple[Tensor, Tensor]]
    solve_tokens: Callable[..., Any]
    second_pass: Callable[..., Tensor]
    finish_tokens: Callable[..., tuple[TokenResults, Any]]
    jsd_pass: Callable[[shard_sums.Shard, TokenConstants, float], Tensor]
    write_gradient: Callable[..., None]


def chosen(name: str | None, student_logits: Tensor, teacher_logits: Tensor) -> Backend:
    """Return the backend for these logits.

    name: "torch" or "triton"; None is triton where nothing prevents it, see `in_use`, else torch.
    Raises: ValueError for another name, and for "triton" where it cannot run.
    """
    dtype = torch.promote_types(student_logits.dtype, teacher_logits.dtype)
    return _TORCH if in_use(name, student_logits.device, dtype)[0] == "torch" else _triton()


def in_use(name: str | None, device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    """Return (name, why): the backend that `chosen` takes for logits of this dtype on this device, and the reason.

    Raises: ValueError as `chosen`.
    """
    if name is not None and name not in LOSS_BACKENDS:
        raise ValueError(f"loss.backend must be null, {' or '.join(LOSS_BACKENDS)}; got {name!r}.")
    if name == "torch":
        return "torch", "as configured"
    against = _against_triton(device, dtype)
    if name == "triton" and against:
        raise ValueError(f"loss.backend=triton cannot be used: {against}. Set loss.backend to torch or null.")
    if against:
        return "torch", against
    return "triton", "as configured" if name == "triton" else f"logits on {device.type}"


def _against_triton(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return the reason why the Triton kernels cannot run on such logits; None if they can."""
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
def _triton() -> Backend:
    # Imported here because the import takes a second, and because torch for CPUs comes without triton.
    from megatron_selfdistill.loss.triton import pass_launches, solver_launches

    return Backend(
        name="triton",
        num_parts=pass_launches.num_parts,
        first_pass=pass_launches.first_pass,
        solve_tokens=solver_launches.solve_tokens,
        second_pass=pass_launches.second_pass,
        finish_tokens=solver_launches.finish_tokens,
        jsd_pass=pass_launches.jsd_pass,
        write_gradient=pass_launches.write_gradient,
    )


def _one_part(num_rows: int, num_columns: int) -> int:
    return 1


_TORCH = Backend(
    name="torch",
    num_parts=_one_part,
    first_pass=shard_sums.first_pass,
    solve_tokens=token_statistics.solve_tokens,
    second_pass=shard_sums.second_pass,
    finish_tokens=token_statistics.finish_tokens,
    jsd_pass=shard_sums.jsd_pass,
    write_gradient=shard_sums.write_gradient,
)
