# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The digest that identifies the weights of a checkpoint at any place.

Nothing here imports torch or communicates.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_selfdistill.checkpoint.formats import directory, manifest
from megatron_selfdistill.checkpoint.formats.manifest import Entry
from megatron_selfdistill.data.records import from_json
from megatron_selfdistill.errors import CheckpointError

KEPT_BASE = "base"
"""The name, in the run directory, of random weights at which a run began and which it does not train."""
KEPT_DIGEST = "base.json"
"""The name of the file with the digest of these weights: a random number, which all copies of them share."""
_WEIGHT_FILES = ("common.pt", "metadata.json", ".metadata")


def weight_files(path: Path) -> list[Path]:
    """Return the files of a checkpoint directory that `base_digest` reads where there is no manifest."""
    if directory.is_legacy(path):
        return sorted(path.glob(f"mp_rank_*/{directory.LEGACY_FILE}"))
    return [file for file in sorted(path.iterdir()) if _is_weight_file(file.name)]


def known_digest(path: Path) -> str | None:
    """Return the `base_digest` of a checkpoint directory if no file of weights must be read for it, else None."""
    kept = path / KEPT_DIGEST
    if kept.is_file():
        try:
            described: Any = from_json(kept.read_bytes())
            return str(described["digest"])
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path} has a corrupt {KEPT_DIGEST} ({type(error).__name__}: {error})") from None
    entries = manifest.read(path)
    return None if entries is None else digest_of(entries)


def base_digest(path: Path) -> str:
    """Return the digest of the checkpoint at ``path``, 32 hexadecimal digits, which identifies it at any place.

    It covers the names, sizes and checksums of the files of weights: those of the manifest, else, for checkpoints of
    other programs, those that are computed now, which reads every file once.
    Raises: CheckpointError where there is no checkpoint.
    """
    found, _ = directory.find(path)
    return known_digest(found) or digest_of(checksums(found, weight_files(found)))


def checksums(path: Path, files: Sequence[Path]) -> dict[str, Entry]:
    """Return the present size and checksum of ``files`` by their names in the directory ``path``."""
    return {str(file.relative_to(path)): manifest.checksum(file) for file in files}


def digest_of(entries: Mapping[str, Entry]) -> str:
    """Return the digest of the files of weights among ``entries``."""
    return digest_of_files({name: entry for name, entry in entries.items() if _is_weight_file(Path(name).name)})


def digest_of_files(entries: Mapping[str, Entry]) -> str:
    """Return the digest of files by their names, sizes and checksums."""
    lines = [f"{name} {entry.size} {entry.checksum}\n" for name, entry in sorted(entries.items())]
    return hashlib.sha256("".join(lines).encode()).hexdigest()[:32]


def _is_weight_file(name: str) -> bool:
    return name in (*_WEIGHT_FILES, directory.LEGACY_FILE) or name.endswith(".distcp")
