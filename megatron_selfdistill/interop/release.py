# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Write a new Megatron checkpoint that a conversion makes, and report the progress of the conversion.

A checkpoint consists of ``release``, the tracker file and the Hugging Face files.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_selfdistill.checkpoint.formats import directory, manifest
from megatron_selfdistill.checkpoint.formats.directory import HF_ASSETS
from megatron_selfdistill.checkpoint.formats.saved_run import SECTION
from megatron_selfdistill.checkpoint.formats.torch_dist import CONTENT
from megatron_selfdistill.interop import torch_dist_tensors
from megatron_selfdistill.interop.hf_files import copy_description, hf_assets
from megatron_selfdistill.interop.new_directory import created
from megatron_selfdistill.interop.torch_dist_tensors import Piece


@dataclass(frozen=True)
class Progress:
    """The functions that receive the progress of a conversion."""

    start: Callable[[int], None] = lambda _: None
    """Receives the total number of bytes, once."""
    advance: Callable[[int], None] = lambda _: None
    """Receives the number of bytes of each written tensor."""
    report: Callable[[str], None] = lambda _: None
    """Receives a message for each decision of the conversion."""


def write_release(
    out: Path,
    pieces: Sequence[Piece],
    args: argparse.Namespace | None,
    *,
    empty_objects: Sequence[str] = (),
    assets: Path | None = None,
    texts: Mapping[str, str] | None = None,
    progress: Progress,
) -> Path:
    """Write the torch_dist checkpoint ``out/release`` atomically, with the tracker file, and return its directory.

    ``pieces`` and ``empty_objects``: see `torch_dist_tensors.write`.  ``args``: the stored arguments.  ``assets``: a
    directory with config.json and tokenizer files, which are copied.  ``texts``: further files, by their names.
    Raises: CheckpointError where ``out`` exists or the disk is too small; the exceptions of ``Piece.make``; OSError.
    """
    common = {
        **({"args": args} if args is not None else {}),
        "checkpoint_version": 3.0,
        "iteration": 0,
        "num_floating_point_operations_so_far": 0,
        "content_metadata": dict(CONTENT),
        SECTION: {"kind": "conversion"},
    }
    num_bytes = sum(piece.num_bytes for piece in pieces)
    with created(out, num_bytes + (hf_assets_bytes(assets) if assets is not None else 0)) as temporary:
        progress.start(num_bytes)
        release = temporary / "release"
        torch_dist_tensors.write(release, pieces, common, empty_objects=empty_objects, progress=progress.advance)
        for name, text in (texts or {}).items():
            (release / name).write_text(text, encoding="utf-8")
            manifest.sync(release / name)
        if assets is not None:
            copy_description(assets, release / HF_ASSETS, progress.report)
        manifest.write(release)
        (temporary / directory.TRACKER).write_text("release")
        for path in (release, temporary / directory.TRACKER):
            manifest.sync(path)
    return out / "release"


def hf_assets_bytes(source: Path) -> int:
    """Return the size of the files that `copy_hf_assets` considers, in bytes."""
    return sum(file.stat().st_size for file in hf_assets(source))
