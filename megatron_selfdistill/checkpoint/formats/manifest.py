# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The ``manifest.json`` of a checkpoint: the size and checksum of each of its files, checked before a load.

    {"version": 1, "algorithm": "xxh3_128", "files": {"common.pt": {"size": 1234, "checksum": "9f..."}, ...}}

The manifest is written last.  Megatron-LM ignores the file.  Checkpoints of other programs have no manifest, and only
the sizes that Megatron itself stores can be checked (`directory.incomplete`).  No function communicates: ranks compute
or check the checksums of different files at the same time.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import xxhash

from megatron_selfdistill.data.records import from_json
from megatron_selfdistill.errors import CheckpointError

NAME = "manifest.json"
"""The name of the manifest in a checkpoint."""
_PART = "manifest.part."
_ALGORITHM = "xxh3_128"  # at least 10 GB/s per core, so that the disk is the limit


@dataclass(frozen=True)
class Entry:
    """The size and checksum of a file at the time of its save."""

    size: int
    """The size in bytes."""
    checksum: str
    """The checksum in hexadecimal digits, which finds corruption but not an attack."""


def checksum(file: Path) -> Entry:
    """Return the present size and checksum of ``file``."""
    with Path(file).open("rb", buffering=0) as stream:
        total = hashlib.file_digest(stream, xxhash.xxh3_128)
        return Entry(stream.tell(), total.hexdigest())


def write_part(directory: Path, owner: str, files: Iterable[Path], known: Mapping[str, Entry] | None = None) -> None:
    """Compute the entries of ``files`` for a later `write`, and store them in a part of the manifest.

    Each writer does so for its own files, on its own machine, while the files are in the file cache.  ``known``:
    entries that the writer computed while it wrote the files.  The function skips missing files, whose writer reports
    the error.
    """
    entries = {str(file.relative_to(directory)): asdict(checksum(file)) for file in files if file.is_file()}
    entries |= {name: asdict(entry) for name, entry in (known or {}).items()}
    part = directory / f"{_PART}{owner}.json"
    part.write_text(json.dumps(entries))
    sync(part)


def write(directory: Path) -> None:
    """Write the manifest of a complete directory from its parts, and delete the parts.

    This function computes the checksums of the files that no part names.
    """
    entries: dict[str, dict[str, int | str]] = {}
    for part in sorted(directory.glob(f"{_PART}*")):
        entries |= json.loads(part.read_text())
        part.unlink()
    for file in sorted(directory.iterdir()):
        name = str(file.relative_to(directory))
        if file.is_file() and name != NAME and name not in entries:
            entries[name] = asdict(checksum(file))
    text = json.dumps({"version": 1, "algorithm": _ALGORITHM, "files": dict(sorted(entries.items()))}, indent=1)
    temporary = directory / f"{NAME}.new"
    temporary.write_text(text)
    sync(temporary)
    os.replace(temporary, directory / NAME)


def read(directory: Path) -> dict[str, Entry] | None:
    """Return the entry of each file by its name; None if there is no manifest.

    Raises: CheckpointError where the manifest itself is corrupt.
    """
    file = directory / NAME
    if not file.is_file():
        return None
    try:
        content: Any = from_json(file.read_bytes())
        entries = {name: Entry(**entry) for name, entry in content["files"].items()}
        algorithm = content["algorithm"]
        if outside := next((name for name in entries if name != Path(name).name or name in ("", "..")), None):
            raise ValueError(f"it names the file {outside!r}, expected one in its directory")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{directory} has a corrupt {NAME} ({type(error).__name__}: {error})") from None
    if algorithm != _ALGORITHM:
        raise CheckpointError(f"{directory} has checksums of {algorithm} in its {NAME}, expected {_ALGORITHM}")
    return entries


def wrong_size(directory: Path, entries: Mapping[str, Entry]) -> str | None:
    """Return the fault of the first file that is missing or of another size, or None; read no contents.

    Example: "has 12 bytes of common.pt, expected 34".
    """
    for name, entry in entries.items():
        file = directory / name
        if not file.is_file():
            return f"has no {name}"
        if file.stat().st_size != entry.size:
            return f"has {file.stat().st_size} bytes of {name}, expected {entry.size}"
    return None


def wrong_contents(directory: Path, entries: Mapping[str, Entry], part: int = 0, num_parts: int = 1) -> str | None:
    """Return the fault of the first file with another checksum, or None; read all files.

    With ``num_parts`` > 1 the function reads only the ``part``-th share of the files, so that ranks share the work.
    """
    largest_first = sorted(entries, key=lambda name: (-entries[name].size, name))
    for name in largest_first[part::num_parts]:
        if checksum(directory / name) != entries[name]:
            return f"has a corrupt {name}: its checksum is not the one in {NAME}"
    return None


def sync(path: Path) -> None:
    """Wait until a file, or the entries of a directory, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
