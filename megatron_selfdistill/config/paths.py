# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Where the files that are not code lie: in a wheel, an editable install or a checkout, from any folder."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]


def config_dir() -> Path:
    """The folder with the hydra configs that the project ships, as an absolute path.

    Equals ``<package>/configs`` in a wheel (``setup.py`` copies them there) and ``<repository>/configs`` in a
    checkout or an editable install.  A lab's own configs are added with hydra's search path, not here.

    Raises: FileNotFoundError if neither folder holds ``train.yaml``, naming both.
    """
    candidates = (_PACKAGE / "configs", _PACKAGE.parent / "configs")
    for candidate in candidates:
        if (candidate / "train.yaml").is_file():
            return candidate
    raise FileNotFoundError(
        f"expected the shipped configs (train.yaml) in {candidates[0]} or {candidates[1]}, found neither; "
        "reinstall megatron_selfdistill, or restore configs/ in the checkout"
    )
