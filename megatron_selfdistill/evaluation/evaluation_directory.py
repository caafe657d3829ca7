# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The names of the files of an evaluation, and the check of its place.  This module imports no torch."""

from __future__ import annotations

from pathlib import Path

from megatron_selfdistill.errors import ConfigError

SUMMARY, PROBLEMS, RESPONSES = "summary.json", "problems.jsonl", "responses.jsonl"


def require_free(directory: Path, overwrite: bool) -> None:
    """Raise `ConfigError` unless ``directory`` is new or empty, or holds an evaluation that may be overwritten."""
    if not directory.exists() or (directory.is_dir() and not any(directory.iterdir())):
        return
    if not overwrite:
        raise ConfigError(f"expected a new directory for the results, got {directory}, which exists; add --overwrite")
    if not (directory / SUMMARY).is_file():
        raise ConfigError(f"expected an evaluation to overwrite, got {directory}, which has no {SUMMARY}")
