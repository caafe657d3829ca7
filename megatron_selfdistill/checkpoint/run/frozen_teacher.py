# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The frozen teacher is as large as the model and never changes: it is written once, beside the checkpoints."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist

from megatron_selfdistill.checkpoint import directory
from megatron_selfdistill.checkpoint.formats import manifest
from megatron_selfdistill.checkpoint.run import sharded_io
from megatron_selfdistill.checkpoint.run.saved_run import SECTION
from megatron_selfdistill.distributed.collectives import from_all_ranks, on_each_rank, on_rank_0
from megatron_selfdistill.errors import CheckpointError
from megatron_selfdistill.hidden_values import hidden

logger = logging.getLogger(__name__)

NAME = "teacher"
_MARK = "teacher_id"


class TeacherState(Protocol):
    """What is asked of a teacher: ``weights`` is frozen, ema or current."""

    weights: str

    def sharded_state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def is_there(run_dir: Path) -> bool:
    """Return whether ``run_dir/teacher`` has all its files, by their sizes.  For one rank."""
    target = Path(run_dir) / NAME
    entries = manifest.read(target)
    return entries is not None and manifest.wrong_size(target, entries) is None


def save_frozen_teacher(
    run_dir: Path,
    teacher: TeacherState,
    mark: str | None = None,
    *,
    replicas: dist.ProcessGroup | None = None,
    prove_ownership: Callable[[], None] = lambda: None,
) -> str:
    """Write ``run_dir/teacher``, atomically, unless exactly these weights lie there; returns their mark, by which
    checkpoints know them again.  Collective.

    ``mark``: that of the same teacher, which checkpoints refer to; null makes a new one.  Other weights there come from
    an earlier start in the same run directory, and are replaced.  ``replicas`` and
    ``prove_ownership``: as in `transfer.begin_write`.
    """
    target = Path(run_dir) / NAME
    if on_rank_0(lambda: is_there(run_dir) and directory.incomplete(target) is None):
        if _holds_same_weights(target, teacher):
            return _mark_of(target)
        if dist.get_rank() == 0:
            place = hidden(str(target))
            logger.warning("%s holds other weights, of an earlier start of this run: it is replaced", place)
    mark = mark or on_rank_0(lambda: uuid.uuid4().hex)
    contents = {SECTION: {"kind": "teacher"}, _MARK: mark, **teacher.sharded_state_dict()}
    request = sharded_io.begin_write(contents, target, replicas=replicas, prove_ownership=prove_ownership)
    sharded_io.write_now(*request, target)
    return mark


def load_frozen_teacher(
    run_dir: Path, teacher: TeacherState, mark: str | None = None, verify: str = "checksums"
) -> str:
    """The inverse of `save_frozen_teacher`, in any layout; returns the mark.  Collective.

    ``verify``: what of its manifest is compared: checksums, sizes or none.
    Raises: CheckpointError where there is none that is whole, or not the one with this ``mark``.
    """
    target = Path(run_dir) / NAME
    path = on_rank_0(lambda: directory.resolve(target))
    sharded_io.verify_integrity(path, verify)
    found = _mark_of(path)
    if mark not in (None, found):
        raise CheckpointError(
            f"{path} is not the teacher that this checkpoint was trained with: a later start in the same run "
            "directory replaced it"
        )
    wanted = teacher.sharded_state_dict()
    sharded_io.check_shapes(wanted, path)
    teacher.load_state_dict(sharded_io.read(wanted, path))
    return found


def _mark_of(path: Path) -> str:
    """Return the mark of the teacher at ``path``, which every rank reads."""
    return on_each_rank(lambda: sharded_io.read_common(path)[_MARK])


def _holds_same_weights(path: Path, teacher: TeacherState) -> bool:
    """Whether every tensor of ``teacher`` is on disk, bit for bit; reads all of it once."""
    wanted = {str(i): tensor for i, tensor in enumerate(sharded_io.tensors(teacher.sharded_state_dict()))}
    own = {name: tensor.data for name, tensor in wanted.items()}
    try:
        sharded_io.check_shapes(wanted, path)
    except CheckpointError:  # on all ranks: another model
        return False
    for tensor in wanted.values():
        tensor.data = torch.empty_like(tensor.data)
    loaded = sharded_io.read(wanted, path)
    return all(from_all_ranks(all(torch.equal(loaded[name], own[name]) for name in own)))
