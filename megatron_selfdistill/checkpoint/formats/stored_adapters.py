# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The ``adapters.json`` of a checkpoint that holds low-rank adapters alone, and the digest of the weights below them.

    {"version": 1, "rank": 32, "alpha": 32.0, ..., "base": {"digest": "5c7a..", "checkpoint": "/checkpoints/qwen3-8b"}}

Nothing here imports torch or communicates.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_selfdistill.checkpoint.formats import directory, manifest
from megatron_selfdistill.checkpoint.formats.manifest import Entry
from megatron_selfdistill.config import AdapterConfig
from megatron_selfdistill.data.records import from_json
from megatron_selfdistill.errors import CheckpointError, ConfigError

NAME = "adapters.json"
"""The name of the description in a checkpoint of adapters."""
KEPT_BASE = "base"
"""The name, in the run directory, of the base of a run that began at random weights."""
KEPT_DIGEST = "base.json"
"""The name of the file with the digest of a kept base: a random number, which all copies of these weights share."""
PEFT_CONFIG = "adapter_config.json"
"""The name of the settings in a directory of the library PEFT."""
_VALUES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "rank": (lambda value: type(value) is int and value > 0, "a whole number above 0"),
    "alpha": (lambda value: type(value) in (int, float) and 0 < value < 1e30, "a number above 0 and below 1e30"),
    "rank_stabilised": (lambda value: type(value) is bool, "true or false"),
    "layers": (lambda value: isinstance(value, list) and all(isinstance(it, str) for it in value), "a list of names"),
    "seed": (lambda value: type(value) is int, "a whole number"),
}
"""A setting of stored adapters -> whether a value has its type, and the words for that type."""
SETTINGS = list(_VALUES)
"""The keys of the section ``adapter`` that belong to stored adapters."""
_WEIGHT_FILES = ("common.pt", "metadata.json", ".metadata")


@dataclass(frozen=True)
class StoredAdapters:
    """The description of the adapters in a checkpoint."""

    path: Path
    """The directory of the checkpoint."""
    settings: AdapterConfig
    base_digest: str
    """The `base_digest` of the frozen weights to which the adapters belong."""
    base: Path | None
    """The checkpoint of these weights at the time of the save; None if the run directory keeps them."""

    def text(self) -> str:
        """Return the contents of ``adapters.json``."""
        values = {name: value for name, value in asdict(self.settings).items() if name in SETTINGS}
        base = {"digest": self.base_digest, "checkpoint": None if self.base is None else str(self.base)}
        return json.dumps({"version": 1, **values, "base": base}, indent=1) + "\n"

    def overrides(self) -> str:
        """Return the settings as keys for a run that begins at these adapters."""
        settings = self.settings
        layers = f"'adapter.layers=[{','.join(settings.layers)}]'"
        scale = f"adapter.alpha={settings.alpha} adapter.rank_stabilised={str(settings.rank_stabilised).lower()}"
        return f"adapter.rank={settings.rank} {scale} {layers}"

    def base_place(self, given: str | None = None, key: str = "adapter.base") -> Path:
        """Return the directory of the base: ``given`` by ``key``, else the stored place, else the run directory.

        Raises: CheckpointError where the base is at none of these places.
        """
        kept = self.path.absolute().parent.parent / KEPT_BASE
        place = Path(given) if given is not None else self.base or kept
        if given is None and not place.exists():
            raise CheckpointError(
                f"{self.path} holds adapters alone, and their base, with the digest {self.base_digest}, is not at "
                f"{place} any more: set {key} to its present place"
            )
        return place

    def require_base(self, digest: str, place: Path, key: str) -> None:
        """Raise CheckpointError with both digests unless ``digest``, of the checkpoint ``place``, is the base's.

        ``key``: the key or option that names the base.
        """
        if digest != self.base_digest:
            raise CheckpointError(
                f"{place} is not the base of the adapters in {self.path}: it has the digest {digest}, expected "
                f"{self.base_digest}: set {key} to the present place of the checkpoint that the run began at"
                f"{f', which was {self.base}' if self.base is not None else ''}"
            )


def read_stored_adapters(path: Path) -> StoredAdapters | None:
    """Return the description of the adapters in a checkpoint; None for a checkpoint of weights, or for none.

    ``path``: the checkpoint, or the directory with the tracker file.
    Raises: CheckpointError where the description is corrupt.
    """
    chosen = directory.tracked(Path(path)) or Path(path)
    file = chosen / NAME
    if not file.is_file():
        return None
    try:
        content: Any = from_json(file.read_bytes())
        for name, (holds, words) in _VALUES.items():
            if not holds(content[name]):
                raise TypeError(f"{name} is {content[name]!r}, expected {words}")
        settings = AdapterConfig(**{name: content[name] for name in SETTINGS})
        base: dict[str, Any] = content["base"]
        place = None if base["checkpoint"] is None else Path(base["checkpoint"])
        return StoredAdapters(chosen, settings, str(base["digest"]), place)
    except (ValueError, KeyError, TypeError, ConfigError) as error:
        raise CheckpointError(f"{chosen} has a corrupt {NAME} ({type(error).__name__}: {error})") from None


def refuse_adapters(path: Path) -> None:
    """Raise CheckpointError where ``path``, at which a run shall begin, holds adapters alone."""
    stored = read_stored_adapters(path)
    if stored is not None:
        raise CheckpointError(
            f"{path} holds adapters alone, but a run begins at full weights: set checkpoint.load to their base"
            f"{f' ({stored.base})' if stored.base is not None else ''} and adapter.load={path}, or merge them with "
            "`selfdistill convert merge-adapters`"
        )


def require_adapters(path: Path) -> StoredAdapters:
    """Return the description of the adapters at ``path``.

    Raises: CheckpointError for a checkpoint of full weights, and for a directory of PEFT.
    """
    if (path / PEFT_CONFIG).is_file():
        raise CheckpointError(
            f"{path} is a directory of PEFT, expected a checkpoint of adapters: convert it with "
            f"`selfdistill convert peft-to-megatron --peft {path} --base DIR --out DIR`"
        )
    stored = read_stored_adapters(path)
    if stored is None:
        raise CheckpointError(f"{path} holds full weights, expected a checkpoint of adapters")
    return stored


def require_model(settings: AdapterConfig, path: Path, iteration: int | None = None) -> None:
    """Raise `CheckpointError` if there is no model at ``path``: weights, or adapters whose base is there, too."""
    directory.require_checkpoint(path, iteration)
    adapters = read_stored_adapters(directory.of_iteration(Path(path), iteration))
    if adapters is not None:
        directory.require_checkpoint(adapters.base_place(settings.base))


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
