# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The files in which a run keeps responses for the target explorer.  Nothing here needs torch."""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_selfdistill.replaced_files import replace_file
from megatron_selfdistill.run_log import check_token_columns, json_object

EXPLORED_DIRECTORY = "explored"
"""The directory of a run with one file per explored response."""

_FIELDS: dict[str, type] = {
    **dict.fromkeys(("version", "vocab_size", "block_tokens"), int),
    **dict.fromkeys(("problem_id", "prompt", "solution"), str),
    **dict.fromkeys(("settings", "tokens", "texts"), dict),
    **dict.fromkeys(("models", "blocks"), list),
    "truncated": bool,
}
"""The fields of a record that the page of the explorer reads, with their types."""

_FILE = re.compile(r"step_(\d{7,})_(\d+)\.json\.gz")


def write_explored(run_dir: Path, step: int, records: Sequence[Mapping[str, Any]]) -> list[Path]:
    """Write one compressed file per record into the run directory, each in one move, and return the paths."""
    directory = run_dir / EXPLORED_DIRECTORY
    directory.mkdir(parents=True, exist_ok=True)
    paths = []
    for number, record in enumerate(records, 1):
        path = directory / f"step_{step:07d}_{number}.json.gz"
        text = json.dumps(record, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        replace_file(path, gzip.compress(text.encode(), compresslevel=6, mtime=0))
        paths.append(path)
    return paths


def forget_explored_after(run_dir: Path, step: int) -> None:
    """Remove the explored responses of steps after ``step``, with the pages that were made of them; for 0, all."""
    for path in explored_files(run_dir):
        if step_and_sample(path)[0] > step:
            page_of(path).unlink(missing_ok=True)
            path.unlink(missing_ok=True)


def explored_files(run_dir: Path) -> list[Path]:
    """Return the files of the explored responses of a run, in the order of steps and samples."""
    found = [path for path in (run_dir / EXPLORED_DIRECTORY).glob("step_*.json.gz") if _FILE.fullmatch(path.name)]
    return sorted(found, key=step_and_sample)


def step_and_sample(path: Path) -> tuple[int, int]:
    """Return the step and the number of the sample, counted from 1, of a file of `explored_files`."""
    match = _FILE.fullmatch(path.name)
    if match is None:
        raise ValueError(f"expected a file step_STEP_SAMPLE.json.gz, got {path}")
    return int(match[1]), int(match[2])


def page_of(path: Path) -> Path:
    """Return the place of the page of a file of `explored_files`: beside the file."""
    return path.with_name(path.name.removesuffix(".json.gz") + ".html")


def read_explored(path: Path) -> dict[str, Any]:
    """Return the record of a file.  Raises: OSError; ValueError, without the path, for a file that is no record."""
    packed = path.read_bytes()
    try:
        record = json_object(_unpacked(packed))
        for name, kind in _FIELDS.items():
            if not isinstance(record.get(name), kind):
                raise ValueError(f"has no {name} of the right type")
        check_token_columns(record["tokens"], "id", "text", "status", "loss")
        if not all(isinstance(block, dict) for block in record["blocks"]):
            raise ValueError("has a block that is not an object")
    except ValueError as error:
        raise ValueError(f"expected an explored response, got a file that {error}") from error
    return record


def _unpacked(packed: bytes) -> bytes:
    """Return what gzip has packed.  Raises: ValueError with the end of a sentence about the file."""
    try:
        return gzip.decompress(packed)
    except gzip.BadGzipFile:
        raise ValueError("is not compressed") from None
    except (EOFError, zlib.error):
        raise ValueError("is cut or damaged") from None
