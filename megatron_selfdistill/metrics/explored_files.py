# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The files in which a run keeps responses for the target explorer."""

from __future__ import annotations

import gzip
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

EXPLORED_DIRECTORY = "explored"
"""The directory of a run with one file per explored response."""

_FILE = re.compile(r"step_(\d{7})_(\d+)\.json\.gz")


def write_explored(run_dir: Path, step: int, records: Sequence[Mapping[str, Any]]) -> list[Path]:
    """Write one compressed file per record into the run directory, each in one move, and return the paths."""
    directory = run_dir / EXPLORED_DIRECTORY
    directory.mkdir(parents=True, exist_ok=True)
    paths = []
    for number, record in enumerate(records, 1):
        path = directory / f"step_{step:07d}_{number}.json.gz"
        temporary = path.with_name(f".{path.name}.writing")
        text = json.dumps(record, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        temporary.write_bytes(gzip.compress(text.encode(), compresslevel=6, mtime=0))
        os.replace(temporary, path)
        paths.append(path)
    return paths


def forget_explored_after(run_dir: Path, step: int) -> None:
    """Remove the explored responses of steps after ``step``, with the pages that were made of them; for 0, all."""
    for path in explored_files(run_dir):
        if int(path.name.split("_")[1]) > step:
            path.with_name(path.name.removesuffix(".json.gz") + ".html").unlink(missing_ok=True)
            path.unlink(missing_ok=True)


def explored_files(run_dir: Path) -> list[Path]:
    """Return the files of the explored responses of a run, in the order of steps and samples."""
    found = [(path, _FILE.fullmatch(path.name)) for path in (run_dir / EXPLORED_DIRECTORY).glob("step_*.json.gz")]
    named = [(int(match[1]), int(match[2]), path) for path, match in found if match is not None]
    return [path for _, _, path in sorted(named)]


def read_explored(path: Path) -> dict[str, Any]:
    """Return the record of a file.  Raises: OSError, ValueError for a file that is no record."""
    record = json.loads(gzip.decompress(path.read_bytes()))
    if not isinstance(record, dict) or "blocks" not in record:
        raise ValueError(f"{path}: expected an explored response, got another file")
    return record
