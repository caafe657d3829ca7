# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""What a run's checkpoint says of the run, as plain data: which checkpoints this program wrote, and their own state."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_selfdistill.checkpoint.formats.unpickler import load_pickled, loads_pickled
from megatron_selfdistill.errors import CheckpointError

SECTION = "selfdistill"
"""The key in common.pt under which this program keeps what Megatron-LM does not know."""

_TEACHER_ID = "teacher_id"  # of teachers that were written before they had a section of their own
_NEEDED = ("trainer_state", "layout", "optimizer_steps", "distributed_optimizer", "teacher")


@dataclass(frozen=True)
class SavedRun:
    """A checkpoint of a run: what it holds besides tensors."""

    path: Path
    common: dict[str, Any]
    """All of common.pt."""
    own: dict[str, Any]
    """This program's section of it."""
    trainer_state: dict[str, Any]
    """What the run was doing, with ``step``: plain values, as `encode` takes them."""


def encode(trainer_state: dict[str, Any]) -> str:
    """Return the state of a trainer as a checkpoint keeps it: JSON, which no reader can run.

    Numbers come back exactly; tuples come back as lists.  Raises: TypeError for what is no plain value.
    """
    return json.dumps(trainer_state)


def read_saved_run(path: Path) -> SavedRun:
    """Read what the checkpoint directory ``path`` says of its run.  Nothing is executed.

    Raises: CheckpointError where the checkpoint is not one of a run, or is damaged.
    """
    common = load_pickled(path / "common.pt")
    own = common.get(SECTION) if isinstance(common, dict) else None
    if own is None:
        raise CheckpointError(
            f"{path} was not written by a run of this program: to start from its weights, set checkpoint.load"
        )
    missing = [name for name in _NEEDED if name not in own] if isinstance(own, dict) else [SECTION]
    if missing:
        raise CheckpointError(f"{path} has no {missing[0]} in its common.pt: it is no checkpoint of a run")
    return SavedRun(path, common, own, _decode(own["trainer_state"], path))


def is_selfdistill_checkpoint(path: Path) -> bool:
    """Return whether this program saved the checkpoint in ``path``: of a run, a frozen teacher or a conversion.

    What this program writes can be read: a common.pt that cannot is another program's, or is damaged.
    """
    try:
        common = load_pickled(path / "common.pt")
    except CheckpointError:
        return False
    return isinstance(common, dict) and (SECTION in common or _TEACHER_ID in common)


def _decode(stored: Any, path: Path) -> dict[str, Any]:
    """Return the state that `encode` wrote, or an earlier version of this program as a pickle of plain values."""
    if isinstance(stored, bytes):
        state = loads_pickled(stored, f"the trainer_state in {path / 'common.pt'}")
    else:
        try:
            state = json.loads(stored)
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"{path} has a damaged trainer_state in its common.pt: {error}") from None
    if not isinstance(state, dict) or not isinstance(state.get("step"), int):
        raise CheckpointError(f"{path} has a damaged trainer_state in its common.pt: expected an object with a step")
    return state
