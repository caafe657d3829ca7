# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The page of the target explorer: one explored response, whose target the page computes again for other settings."""

from __future__ import annotations

import gzip
import json
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_selfdistill.instruments.html_page import asset, html_page
from megatron_selfdistill.metrics.run_log import json_object, replace_file

logger = logging.getLogger(__name__)

EXPLORED_DIRECTORY = "explored"
"""The directory of a run with one file per explored response."""

MAX_BYTES = 2**28
"""The greatest length of a record; one of 8192 tokens has a tenth of it."""

_FILE = re.compile(r"step_(\d{7,})_(\d+)(?:_turn_(\d+))?\.json\.gz")


def target_page(record: Mapping[str, Any]) -> str:
    """Return the page of an explored response: one HTML file that needs nothing else.

    ``record``: as `ExploredResponse.record` returns it.  The page decodes the logits of 64 tokens at a time, when it
    needs them.
    """
    overview = {name: value for name, value in record.items() if name not in ("blocks", "texts")}
    blocks = {f"block-{number}": block for number, block in enumerate(record["blocks"])}
    scripts = [asset(name) for name in ("target.js", "explorer.js", "explorer_page.js")]
    data = {"overview": overview, "texts": record["texts"], **blocks}
    return html_page("Target explorer", asset("explorer.html"), [asset("explorer.css")], scripts, data)


def write_target_pages(run_dir: Path) -> dict[Path, tuple[int, int, int]]:
    """Write the missing pages of a run's explored responses beside their files; return path -> `place_of` of all pages.

    A page is written again where its file is newer.  A file that is no record gets no page, and a warning.
    Raises: OSError if a page cannot be written.
    """
    pages = {}
    for source in explored_files(run_dir):
        page = page_of(source)
        if not page.exists() or page.stat().st_mtime_ns < source.stat().st_mtime_ns:
            try:
                text = target_page(read_explored(source))
            except Exception as error:  # a damaged file costs its own page, and not the report
                reason = getattr(error, "strerror", None) or error  # str(OSError) repeats the path
                logger.warning("%s has no page: %s: %s", source, type(error).__name__, reason)
                continue
            replace_file(page, text)
        pages[page] = place_of(source)
    return pages


def write_explored(run_dir: Path, step: int, records: Sequence[Mapping[str, Any]]) -> list[Path]:
    """Write one compressed file per record into the run directory, each in one move, and return the paths."""
    directory = run_dir / EXPLORED_DIRECTORY
    directory.mkdir(parents=True, exist_ok=True)
    paths = []
    samples: dict[Any, int] = {}
    for index, record in enumerate(records):
        is_turn = "turn" in record
        number = samples.setdefault((record["problem_id"], record["episode"]) if is_turn else index, len(samples) + 1)
        turn = f"_turn_{record['turn'] + 1}" if is_turn else ""
        path = directory / f"step_{step:07d}_{number}{turn}.json.gz"
        text = json.dumps(record, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        replace_file(path, gzip.compress(text.encode(), compresslevel=6, mtime=0))
        paths.append(path)
    return paths


def forget_explored_after(run_dir: Path, step: int) -> None:
    """Remove the explored responses of steps after ``step``, with the pages that were made of them; for 0, all."""
    for path in explored_files(run_dir):
        if place_of(path)[0] > step:
            page_of(path).unlink(missing_ok=True)
            path.unlink(missing_ok=True)


def explored_files(run_dir: Path) -> list[Path]:
    """Return the files of the explored responses of a run, in the order of steps, samples and turns."""
    found = (run_dir / EXPLORED_DIRECTORY).glob("step_*.json.gz")
    return sorted((path for path in found if _FILE.fullmatch(path.name) and not path.is_fifo()), key=place_of)


def place_of(path: Path) -> tuple[int, int, int]:
    """Return step, sample and turn of a file of `explored_files`, counted from 1; the turn is 0 outside of episodes."""
    match = _FILE.fullmatch(path.name)
    if match is None:
        raise ValueError(f"expected a file step_STEP_SAMPLE.json.gz, got {path}")
    return int(match[1]), int(match[2]), int(match[3] or 0)


def page_of(path: Path) -> Path:
    """Return the place of the page of a file of `explored_files`: beside the file."""
    return path.with_name(path.name.removesuffix(".json.gz") + ".html")


def read_explored(path: Path) -> dict[str, Any]:
    """Return the record of a file.  Raises: the errors of gzip and JSON for a file that is no record."""
    with gzip.open(path) as file:
        return json_object(file.read(MAX_BYTES))
