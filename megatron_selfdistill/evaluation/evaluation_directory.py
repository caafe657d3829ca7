# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The names of the files of an evaluation, and checks of its directory; imports nothing heavy."""

from __future__ import annotations

from pathlib import Path

from megatron_selfdistill.errors import ConfigError

SUMMARY, PROBLEMS, RESPONSES = "summary.json", "problems.jsonl", "responses.jsonl"


def require_free(folder: Path, overwrite: bool) -> None:
    """Raise `ConfigError` unless ``folder`` is new or empty, or holds an evaluation that may be overwritten."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not overwrite:
        raise ConfigError(f"expected a new folder for the results, got {folder}, which exists; add --overwrite")
    if not (folder / SUMMARY).is_file():
        raise ConfigError(f"expected an evaluation to overwrite, got {folder}, which has no {SUMMARY}")


def require_evaluation(folder: Path) -> None:
    """Raise `ConfigError` unless ``folder`` has the files of an evaluation."""
    for name in (SUMMARY, PROBLEMS):
        if not (folder / name).is_file():
            raise ConfigError(f"expected an evaluation in {folder}, got no {name}; make one with selfdistill evaluate")
