# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Save and load weights that never change and are therefore stored once, beside the checkpoints."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist

from megatron_selfdistill.checkpoint import sharded_io
from megatron_selfdistill.checkpoint.formats import directory, manifest
from megatron_selfdistill.checkpoint.formats.manifest import Entry
from megatron_selfdistill.checkpoint.formats.saved_run import SECTION
from megatron_selfdistill.checkpoint.formats.torch_dist import read_common
from megatron_selfdistill.checkpoint.formats.weights_digest import checksums, digest_of, known_digest, weight_files
from megatron_selfdistill.distributed.collectives import gather_objects, run_on_each_rank, run_on_rank_0
from megatron_selfdistill.errors import CheckpointError

logger = logging.getLogger(__name__)

TEACHER = "teacher"
"""The name of the directory of the frozen teacher, or reference, in the run directory."""
StateDict = Callable[[], dict[str, Any]]
"""Returns the sharded tensors of weights for a checkpoint."""


class TeacherState(Protocol):
    """The parts of a `Teacher` that a checkpoint needs; ``weights`` is frozen, ema or current."""

    weights: str
    is_copy: bool
    """Whether the teacher has weights of its own."""
    sharded_state_dict: StateDict

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Copy loaded tensors of `sharded_state_dict` into the teacher."""


def has_frozen_weights(target: Path) -> bool:
    """Return whether the directory ``target`` has all its files, compared by size; called on one rank."""
    entries = manifest.read(target)
    return entries is not None and manifest.wrong_size(target, entries) is None


def save_frozen_weights(
    target: Path,
    weights: StateDict,
    weights_id: str | None = None,
    *,
    common: Mapping[str, Any] | None = None,
    texts: Callable[[str], Mapping[str, str]] = lambda _: {},
    replicas: dist.ProcessGroup | None = None,
    prove_ownership: Callable[[], None] = lambda: None,
) -> str:
    """Save ``weights`` as the directory ``target``, atomically, and return the id by which checkpoints refer to them.

    Collective.  The function writes nothing if exactly these weights are there already; it replaces the weights of an
    earlier start in the same run directory.  ``weights_id``: the id of the same weights in older checkpoints; null
    makes a new id.  ``common``: further entries of common.pt.  ``texts``: returns further files for an id.
    ``replicas`` and ``prove_ownership``: see `sharded_io.begin_write`.
    """
    if run_on_rank_0(lambda: has_frozen_weights(target) and directory.incomplete(target) is None):
        if _holds_same_weights(target, weights):
            return _stored_id(target)
        if dist.get_rank() == 0:
            logger.warning("%s holds other weights, of an earlier start of this run: it is replaced", target)
    found_id: str = weights_id or run_on_rank_0(lambda: uuid.uuid4().hex)
    contents = {**(common or {}), SECTION: {"kind": target.name}, _id_key(target): found_id, **weights()}
    request, _ = sharded_io.begin_write(
        contents, target, replicas=replicas, prove_ownership=prove_ownership, texts=texts(found_id)
    )
    sharded_io.write_now(request, target)
    return found_id


def load_frozen_teacher(
    run_dir: Path, teacher: TeacherState, teacher_id: str | None = None, verify: str = "checksums"
) -> str:
    """Load ``run_dir/teacher`` into ``teacher``, in any layout, and return its id; collective.

    ``verify``: the part of the manifest to compare: ``checksums``, ``sizes`` or ``none``.

    Raises: CheckpointError where the stored teacher is missing, corrupt, or has another id than ``teacher_id``.
    """
    path = run_on_rank_0(lambda: directory.resolve(Path(run_dir) / TEACHER))
    sharded_io.verify_integrity(path, verify)
    found = _stored_id(path)
    if teacher_id not in (None, found):
        raise CheckpointError(f"{path} is not the teacher of this checkpoint: a later start in run_dir replaced it")
    wanted = teacher.sharded_state_dict()
    sharded_io.check_shapes(wanted, path)
    teacher.load_state_dict(sharded_io.read(wanted, path))
    return found


def _id_key(path: Path) -> str:
    return f"{path.name}_id"


def _stored_id(path: Path) -> str:
    found: str = run_on_each_rank(lambda: read_common(path)[_id_key(path)])
    return found


def _holds_same_weights(path: Path, weights: StateDict) -> bool:
    """Return whether the stored tensors equal the tensors of ``weights`` bit for bit; read each tensor once."""
    wanted = {str(i): tensor for i, tensor in enumerate(sharded_io.tensors(weights()))}
    own = {name: tensor.data for name, tensor in wanted.items()}
    try:
        sharded_io.check_shapes(wanted, path)
    except CheckpointError:  # raised on all ranks: another model is stored
        return False
    for tensor in wanted.values():
        tensor.data = torch.empty_like(tensor.data)
    loaded = sharded_io.read(wanted, path)
    return all(gather_objects(all(torch.equal(loaded[name], own[name]) for name in own)))


def shared_base_digest(path: Path) -> str:
    """Return `base_digest` of the checkpoint at ``path`` on all ranks, which share the reading.  Collective."""
    found, _ = run_on_rank_0(lambda: directory.find(path))
    known: str | None = run_on_rank_0(lambda: known_digest(found))
    return known or digest_of(shared_checksums(found, run_on_rank_0(lambda: weight_files(found))))


def shared_checksums(path: Path, files: Sequence[Path]) -> dict[str, Entry]:
    """Return `checksums` of ``files`` on all ranks, each of which reads its share, the largest files first.

    Collective.  Raises: CheckpointError on all ranks for a file that cannot be read.
    """

    def own_share() -> dict[str, Entry]:
        largest_first = sorted(files, key=lambda file: (-file.stat().st_size, str(file)))
        return checksums(path, largest_first[dist.get_rank() :: dist.get_world_size()])

    return {name: entry for share in gather_objects(run_on_each_rank(own_share)) for name, entry in share.items()}
