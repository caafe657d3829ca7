# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The state of a run in its checkpoint, as plain data, and the checkpoints that this program has saved."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_selfdistill.checkpoint.formats.torch_dist import read_common
from megatron_selfdistill.errors import CheckpointError

SECTION = "selfdistill"
"""The key under which a checkpoint keeps the state that Megatron-LM does not know."""

CONFIGURATION = "configuration"
"""The key of a trainer's state under which a checkpoint keeps the values of the configuration."""
RUN_TEMPLATE = "chat_template.jinja"
"""The file of a run directory, and of a Hugging Face directory, with the chat template behind which the run trains."""


@dataclass(frozen=True)
class SavedRun:
    """The contents of a run's checkpoint besides its tensors."""

    path: Path
    common: dict[str, Any]
    """The state that is no tensor (`torch_dist.read_common`)."""
    own: dict[str, Any]
    """This program's section of that state (`SECTION`)."""
    trainer_state: dict[str, Any]
    """The state of the trainer, with the key ``step``: plain values, stored as JSON."""


def read_saved_run(path: Path) -> SavedRun:
    """Return the state of the run in the checkpoint directory ``path``, without executing anything.

    Raises: CheckpointError where the checkpoint is corrupt, or is not the checkpoint of a run of this program.
    """
    common = read_common(path)
    own = common.get(SECTION) if isinstance(common, dict) else None
    if not isinstance(own, dict):
        raise CheckpointError(f"{path} was not saved by a run of this program: set checkpoint.load to its weights")
    try:
        state: dict[str, Any] = json.loads(own.get("trainer_state") or "")
        int(state["step"])
    except (TypeError, ValueError, KeyError, RecursionError) as error:
        raise CheckpointError(f"{path} has a corrupt trainer_state: {error}") from None
    return SavedRun(path, common, own, state)


def is_selfdistill_checkpoint(path: Path) -> bool:
    """Return whether this program saved the checkpoint in ``path``: of a run, a frozen teacher or a conversion.

    The answer is False for state that cannot be read: another program saved it, or it is corrupt.
    """
    try:
        common = read_common(path)
    except CheckpointError:
        return False
    return isinstance(common, dict) and SECTION in common
