# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The format torch_dist of Megatron: how it names the state of a run, and how to read what is no tensor."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from megatron_selfdistill.checkpoint.formats.unpickler import load_metadata, load_pickled, loads_pickled
from megatron_selfdistill.compat import older_megatron
from megatron_selfdistill.errors import CheckpointError

CONTENT = {
    # Whole optimizer tensors under the names of the parameters: the only format that loads in every other layout.
    "distrib_optim_sharding_type": "fully_reshardable",
    # Without it the names of a mixture of experts would depend on the number of optimizers of a rank.
    "chained_optim_avoid_prefix": True,
    "singleton_local_shards": False,
}
"""Megatron's ``content_metadata``: the way in which Megatron cuts the state into named tensors."""

COMMON_STATE = "common_state/shard_0_1"
"""The key of Megatron's object with the state that is no tensor."""
WRITTEN_WITH = "megatron_core"
"""The key of that state under which this program names the Megatron Core that wrote the checkpoint, such as 0.19."""
_CHECKPOINT_VERSION = 3.0
"""The newest ``checkpoint_version`` of Megatron-LM that is known here."""


def stored_shapes(directory: Path) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor of a torch_dist checkpoint by key, the state of the optimizer included.

    Raises: CheckpointError where ``.metadata`` is missing or corrupt.
    """
    found = load_metadata(directory).state_dict_metadata
    return {key: tuple(t.size) for key, t in found.items() if isinstance(t, TensorStorageMetadata)}


def read_common(directory: Path, metadata: Metadata | None = None) -> dict[str, Any]:
    """Return the state of a torch_dist checkpoint that is no tensor, from the restricted unpickler.

    Megatron Core stores it in common.pt, and since 0.19 as an object in the files of the tensors.  ``metadata``: the
    contents of ``.metadata``; null reads the file where the state needs it.

    Raises: CheckpointError where the state is missing or corrupt, or where a newer Megatron has written it.
    """
    file = directory / "common.pt"
    common: dict[str, Any] = (
        load_pickled(file) if file.is_file() else _common_object(directory, metadata or load_metadata(directory))
    )
    if isinstance(common, dict):
        _refuse_newer(directory, common)
    return common


def _refuse_newer(directory: Path, common: dict[str, Any]) -> None:
    newest = ".".join(map(str, older_megatron.NEWEST))
    written = re.fullmatch(r"(\d+)\.(\d+)", str(common.get(WRITTEN_WITH)))
    if written is not None and (int(written[1]), int(written[2])) > older_megatron.NEWEST:
        raise CheckpointError(f"{directory} was written with Megatron Core {written[0]}, expected at most {newest}")
    if isinstance(version := common.get("checkpoint_version"), int | float) and version > _CHECKPOINT_VERSION:
        raise CheckpointError(
            f"{directory} was written with checkpoint_version {version}, expected at most {_CHECKPOINT_VERSION}"
        )


def _common_object(directory: Path, metadata: Metadata) -> dict[str, Any]:
    places = metadata.storage_data
    place = next((place for index, place in places.items() if getattr(index, "fqn", None) == COMMON_STATE), None)
    if place is None:
        raise CheckpointError(f"{directory} has neither a common.pt nor an object common_state")
    try:
        with (directory / place.relative_path).open("rb") as file:
            file.seek(place.offset)
            data = file.read(place.length)
    except OSError as error:
        raise CheckpointError(f"{directory} has no readable common_state: {error}") from error
    found = loads_pickled(data, f"{directory}: common_state")
    if not isinstance(found, list) or len(found) != 1 or not isinstance(found[0], dict):
        raise CheckpointError(f"{directory} has a corrupt common_state (it holds a {type(found).__name__})")
    return found[0]
