# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The ``adapters.json`` of a checkpoint that holds low-rank adapters alone.

    {"version": 1, "rank": 32, "alpha": 32.0, ..., "base": {"digest": "5c7a..", "checkpoint": "/checkpoints/qwen3-8b"}}

Nothing here imports torch or communicates.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_selfdistill.checkpoint.formats import directory
from megatron_selfdistill.checkpoint.formats.weights_digest import KEPT_BASE
from megatron_selfdistill.config.schema.adapter_config import AdapterConfig
from megatron_selfdistill.data.records import from_json
from megatron_selfdistill.errors import CheckpointError, ConfigError

NAME = "adapters.json"
"""The name of the description in a checkpoint of adapters."""
PEFT_CONFIG = "adapter_config.json"
"""The name of the settings in a directory of the library PEFT."""
SETTINGS = ["rank", "alpha", "rank_stabilised", "layers", "seed"]
"""The keys of the section ``adapter`` that belong to stored adapters."""


@dataclass(frozen=True)
class StoredAdapters:
    """The description of the adapters in a checkpoint."""

    path: Path
    """The directory of the checkpoint."""
    settings: AdapterConfig
    base_digest: str
    """The `weights_digest.base_digest` of the frozen weights to which the adapters belong."""
    base: Path | None
    """The checkpoint of these weights at the time of the save; None if the run directory keeps them."""

    def text(self) -> str:
        """Return the contents of ``adapters.json``."""
        values = {name: value for name, value in asdict(self.settings).items() if name in SETTINGS}
        base = {"digest": self.base_digest, "checkpoint": None if self.base is None else str(self.base)}
        return json.dumps({"version": 1, **values, "base": base}, indent=1) + "\n"

    def properties(self) -> dict[str, str]:
        """Return what a description of the checkpoint says about adapters and base, by name."""
        settings = self.settings
        scale = "alpha / sqrt(rank)" if settings.rank_stabilised else "alpha / rank"
        return {
            "adapters": f"rank {settings.rank}, alpha {settings.alpha}, scale {scale}, on {', '.join(settings.layers)}",
            "base": f"the checkpoint with the digest {self.base_digest}",
            "place of the base": str(self.base or f"{KEPT_BASE} in the run directory"),
        }

    def overrides(self) -> str:
        """Return the settings as keys for a run that begins at these adapters."""
        settings = self.settings
        layers = f"'adapter.layers=[{','.join(settings.layers)}]'"
        scale = f"adapter.alpha={settings.alpha} adapter.rank_stabilised={str(settings.rank_stabilised).lower()}"
        return f"adapter.rank={settings.rank} {scale} {layers}"

    def base_place(self, given: str | None = None) -> Path:
        """Return the directory of the base: ``given`` (adapter.base), else the stored place, else the run directory.

        Raises: CheckpointError where the base is at none of these places.
        """
        kept = self.path.absolute().parent.parent / KEPT_BASE
        place = Path(given) if given is not None else self.base or kept
        if given is None and not place.exists():
            raise CheckpointError(
                f"{self.path} holds adapters alone, whose base {self.base_digest} is not at {place}: set adapter.base"
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
        settings = AdapterConfig(**{name: content[name] for name in SETTINGS})
        base: dict[str, Any] = content["base"]
        place = None if base["checkpoint"] is None else Path(base["checkpoint"])
        return StoredAdapters(chosen, settings, str(base["digest"]), place)
    except (ValueError, KeyError, TypeError, ConfigError) as error:
        raise CheckpointError(f"{chosen} has a corrupt {NAME} ({type(error).__name__}: {error})") from None


def refuse_adapters(path: Path) -> None:
    """Raise CheckpointError where ``path``, from which a run is to begin, holds adapters alone."""
    stored = read_stored_adapters(path)
    if stored is not None:
        raise CheckpointError(
            f"{path} holds adapters alone, but a run begins at full weights: set checkpoint.load to their base"
            f"{f' ({stored.base})' if stored.base is not None else ''} and adapter.load={path}"
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
