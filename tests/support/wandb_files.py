# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The records in the files that wandb writes, decoded with wandb's own messages."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_HEADER, _BLOCK, _FRAME = 7, 32768, 7  # bytes: of the file, of a block, of the header of a frame (LevelDB's log format)
_FULL, _LAST = 1, 4


def launches(run_dir: Path) -> list[Path]:
    """Return the directories of a run's launches in wandb's directory, oldest first."""
    return sorted(path for path in (run_dir / "wandb").iterdir() if "-run-" in path.name and not path.is_symlink())


def records(launch: Path) -> list[Any]:
    """Return the messages of a launch, in order."""
    from wandb.proto.wandb_internal_pb2 import Record

    (file,) = launch.glob("*.wandb")
    return [Record.FromString(text) for text in _texts(file.read_bytes())]


def history(launch: Path) -> list[dict[str, Any]]:
    """Return the rows that a launch has logged, without wandb's own columns; a path of keys is joined by dots."""
    rows = []
    for record in records(launch):
        if record.HasField("history"):
            items = {".".join(item.nested_key) or item.key: item.value_json for item in record.history.item}
            rows.append({key: json.loads(value) for key, value in items.items() if not key.startswith("_")})
    return rows


def configuration(launch: Path) -> dict[str, Any]:
    """Return the configuration of the run that a launch has handed to wandb."""
    (run,) = (record.run for record in records(launch) if record.HasField("run"))
    return {update.key: json.loads(update.value_json) for update in run.config.update if update.key != "_wandb"}


def _texts(data: bytes) -> Iterator[bytes]:
    """Yield the text of each record; a record is one frame, or several that fill blocks."""
    at, text = _HEADER, b""
    while at + _FRAME <= len(data):
        left = _BLOCK - at % _BLOCK
        if left < _FRAME:
            at += left
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        text += data[at + _FRAME : at + _FRAME + length]
        at += _FRAME + length
        if kind in (_FULL, _LAST):
            yield text
            text = b""
