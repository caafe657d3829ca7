# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The places of shipped files that are not code, in a wheel, an editable install or a checkout."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]


def config_dir() -> Path:
    """Return the directory with the hydra configs that the project ships, as an absolute path.

    The directory is ``<package>/configs`` in a wheel (``setup.py`` copies the files) and ``<repository>/configs`` in a
    checkout or an editable install.  The configs of a lab are found by hydra's search path, not here.

    Raises: FileNotFoundError, which names both directories, if neither has a ``train.yaml``.
    """
    candidates = (_PACKAGE / "configs", _PACKAGE.parent / "configs")
    for candidate in candidates:
        if (candidate / "train.yaml").is_file():
            return candidate
    raise FileNotFoundError(
        f"expected the shipped configs (train.yaml) in {candidates[0]} or {candidates[1]}, found neither; "
        "reinstall megatron_selfdistill, or restore configs/ in the checkout"
    )
