# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The state of a checkpoint that is no tensor, in either of the two formats in which Megatron Core stores it."""

from __future__ import annotations

import dataclasses
import io
import json
import pickle
from pathlib import Path
from typing import Any

import torch
from damage import flip_bit
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex

KEY = "common_state/shard_0_1"
"""The key of the object that holds the state in the files of the tensors."""


def stored_in_a_file(path: Path) -> bool:
    """Return whether the state is in common.pt, as Megatron Core before 0.19 stores it."""
    return (path / "common.pt").exists()


def read(path: Path) -> Any:
    """Return the state, from an unpickler without restrictions."""
    if stored_in_a_file(path):
        return torch.load(path / "common.pt", weights_only=False)
    place = place_of(path)
    with (path / place.relative_path).open("rb") as file:
        file.seek(place.offset)
        return torch.load(io.BytesIO(file.read(place.length)), weights_only=False)[0]


def write(path: Path, common: Any) -> None:
    """Replace the state in the format that the checkpoint has; the manifest stays as it is."""
    if stored_in_a_file(path):
        torch.save(common, path / "common.pt")
    else:
        write_object(path, KEY, common)


def flip_bit_in(path: Path) -> str:
    """Change a bit of the state; return the name of the file that holds it."""
    name, start = "common.pt", 0
    if not stored_in_a_file(path):
        place = place_of(path)
        name, start = place.relative_path, place.offset
    flip_bit(path / name, start + 200, 1)
    return name


def reformat(path: Path, *, in_a_file: bool) -> None:
    """Store the state as Megatron Core before 0.19 does, in common.pt, or as 0.19 does; the manifest stays."""
    common, metadata = read(path), metadata_of(path)
    description = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    if in_a_file:
        description |= {"common_backend": "torch", "common_backend_version": 1}
        torch.save(common, path / "common.pt")
        metadata.storage_data.pop(MetadataIndex(KEY), None)
        metadata.state_dict_metadata.pop(KEY, None)
        write_metadata(path, metadata)
    else:
        (path / "common.pt").unlink(missing_ok=True)
        write_object(path, KEY, common)
    (path / "metadata.json").write_text(json.dumps(description))


def place_of(path: Path) -> Any:
    return metadata_of(path).storage_data[MetadataIndex(KEY)]


def metadata_of(path: Path) -> Metadata:
    found: Metadata = pickle.loads((path / ".metadata").read_bytes())
    return found


def write_object(path: Path, key: str, value: Any) -> None:
    """Append the object ``key`` to a .distcp file, in the place of the object of this key if there is one."""
    metadata, data = metadata_of(path), io.BytesIO()
    torch.save([value], data)
    places = metadata.storage_data
    index = next((index for index in places if index.fqn == key), MetadataIndex(key))
    place = places.get(index) or next(iter(places.values()))
    file = path / place.relative_path
    places[index] = dataclasses.replace(place, offset=file.stat().st_size, length=len(data.getvalue()))
    metadata.state_dict_metadata.setdefault(key, BytesStorageMetadata())
    file.write_bytes(file.read_bytes() + data.getvalue())
    write_metadata(path, metadata)


def write_metadata(path: Path, metadata: Metadata) -> None:
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
