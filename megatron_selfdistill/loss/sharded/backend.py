# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Which code reads the logits and solves the rows: PyTorch, the definition, or Triton kernels, for speed."""

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
from megatron_selfdistill.loss.sharded import row_statistics, row_sums
from megatron_selfdistill.loss.sharded.row_statistics import RowResults
from megatron_selfdistill.loss.sharded.row_sums import RowConstants

OLDEST_TRITON = (3, 3)
"""Before, kernels could not hand tuples around."""


@dataclass(frozen=True)
class Backend:
    """The passes over the logits (contracts: ``row_sums``) and the solving between them (``row_statistics``).

    num_parts: of [T, columns per rank], into how many parts each row is cut: the same on all ranks.
    solve_rows returns what finish_rows takes and, for another pass, returns anew; its ``constants`` go to second_pass.
    """

    name: str
    num_parts: Callable[[int, int], int]
    first_pass: Callable[..., tuple[Tensor, Tensor]]
    solve_rows: Callable[..., Any]
    second_pass: Callable[..., Tensor]
    finish_rows: Callable[..., tuple[RowResults, Any]]
    jsd_pass: Callable[[row_sums.Shard, RowConstants, float], Tensor]
    write_gradient: Callable[..., None]


def chosen(name: str | None, student_logits: Tensor, teacher_logits: Tensor) -> Backend:
    """The backend for these logits.

    name: "torch" or "triton"; None is triton where `reason` finds nothing against it, else torch.
    Raises: ValueError for another name, and for "triton" where it cannot run.
    """
    dtype = torch.promote_types(student_logits.dtype, teacher_logits.dtype)
    return _TORCH if in_use(name, student_logits.device, dtype)[0] == "torch" else _triton()


def in_use(name: str | None, device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    """(name, why): what `chosen` takes for logits of this dtype on this device, and a few words for the log."""
    if name is not None and name not in LOSS_BACKENDS:
        raise ValueError(f"loss.backend must be null, {' or '.join(LOSS_BACKENDS)}; got {name!r}.")
    if name == "torch":
        return "torch", "as configured"
    against = _against_triton(device, dtype)
    if name == "triton" and against:
        raise ValueError(f"loss.backend=triton cannot be used: {against}. Use torch, or null to let it be chosen.")
    if against:
        return "torch", against
    return "triton", "as configured" if name == "triton" else f"logits on {device.type}"


def _against_triton(device: torch.device, dtype: torch.dtype) -> str | None:
    if not _triton_is_there():
        return "the package triton is not installed"
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"its kernels take bfloat16, float16 and float32, the logits are {str(dtype).removeprefix('torch.')}"
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"the logits lie on {device.type}, not on cuda"
    version = _triton_version()
    if tuple(map(int, re.findall(r"\d+", version)[:2])) < OLDEST_TRITON:
        return f"triton {version} is too old, {'.'.join(map(str, OLDEST_TRITON))} or later is needed"
    return None


@cache
def _triton_is_there() -> bool:
    """Looked for once: every call of the loss asks, a guided rollout's at every token."""
    return importlib.util.find_spec("triton") is not None


@cache
def _triton_version() -> str:
    # Asked of the package itself, where it would be used: it is installed under several names.
    import triton

    return triton.__version__


@cache
def _triton() -> Backend:
    # Imported where it is used: it takes a second, and torch for CPUs comes without it.
    from megatron_selfdistill.loss.triton import kernels, solve_kernels

    return Backend(
        name="triton",
        num_parts=kernels.num_parts,
        first_pass=kernels.first_pass,
        solve_rows=solve_kernels.solve_rows,
        second_pass=kernels.second_pass,
        finish_rows=solve_kernels.finish_rows,
        jsd_pass=kernels.jsd_pass,
        write_gradient=kernels.write_gradient,
    )


def _whole_rows(num_rows: int, num_columns: int) -> int:
    return 1


_TORCH = Backend(
    name="torch",
    num_parts=_whole_rows,
    first_pass=row_sums.first_pass,
    solve_rows=row_statistics.solve_rows,
    second_pass=row_sums.second_pass,
    finish_rows=row_statistics.finish_rows,
    jsd_pass=row_sums.jsd_pass,
    write_gradient=row_sums.write_gradient,
)
