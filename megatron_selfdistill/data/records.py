# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The records of a data set with their places, from JSONL, JSON, CSV, Parquet, or a hub data set."""

from __future__ import annotations

import csv
import glob
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from megatron_selfdistill.data.data_files import data_files, format_of, is_hub_name, opened
from megatron_selfdistill.errors import BadRecordError

MAX_DEPTH = 100
"""Largest number of nested objects and lists in one record; chat logs with tool calls have about ten."""


@dataclass(frozen=True)
class RecordSource:
    """The place of the records of a data set, their columns, and the reaction to bad records."""

    path: str | Path | Sequence[str | Path]
    """A file with an ending of `data_files.FORMATS`, a directory of such files, a glob, a list of files, directories
    and globs, or the name of a data set on the Hugging Face hub."""
    split: str
    """Split of a hub data set."""
    subset: str | None
    """Subset of a hub data set; None is the default subset."""
    fields: Mapping[str, str | None]
    """Name of a field -> name of its column, where the names differ.  A field with the column None is not read."""
    on_bad_record: str
    """The reaction to a bad record: "error" (an exception) or "skip" (the record is counted and skipped)."""
    limit: int | None
    """Number of good records after which reading ends; None reads all records."""
    section: str
    """The section of the configuration whose keys the messages name."""


def records(source: RecordSource) -> Iterator[tuple[str, object]]:
    """Yield (location, record) of all records of ``source`` in the order of the files.

    A location is ``file:line`` (JSONL, CSV) or ``file:row`` (JSON arrays, Parquet), counted from 1, or
    ``name[split]:row`` of a hub data set.  In place of a record that cannot be read, the `BadRecordError` with the
    reason is yielded.

    Raises: FileNotFoundError or ValueError, which names the file, for a source that cannot be opened.
    """
    paths = source.path
    if isinstance(paths, (str, Path)):
        if is_hub_name(paths):
            yield from _hub_records(str(paths), source.split, source.subset)
            return
        paths = [paths]
    for file in data_files(paths):
        if source.subset is not None:
            raise ValueError(
                f"{file}: expected the name of a hub data set with the subset {source.subset!r}, got a file."
            )
        kind = (format_of(file) or "").removesuffix(".gz")
        readers = {".csv": _csv_records, ".parquet": _parquet_records}
        yield from readers.get(kind, _json_records)(file)


def from_json(text: str | bytes) -> object:
    """Return the value of the JSON ``text``; bytes are UTF-8, with or without a byte order mark.

    Raises: ValueError for text that is not valid JSON, for NaN and infinite numbers, which JSON does not have, and for
    more than `MAX_DEPTH` levels.
    """
    value = _decoded(text)
    fault = _fault_in(value)
    if fault is not None:
        raise ValueError(fault)
    return value


def is_text(value: object) -> bool:
    """Return whether every string within ``value`` can be written as UTF-8.

    JSON can spell a string that cannot: half of a surrogate pair, the rest of a cut emoji.  Tokenizers refuse it.
    """
    if isinstance(value, str):
        return value.isascii() or not _SURROGATE.search(value)
    if isinstance(value, dict):
        return all(is_text(key) and is_text(item) for key, item in value.items())
    return all(map(is_text, value)) if isinstance(value, (list, tuple)) else True


NO_TEXT = "expected text that can be written as UTF-8, got half of a surrogate pair (a cut emoji?)"

_SURROGATE = re.compile("[\ud800-\udfff]")
_TOO_DEEP = f"objects and lists nested more than {MAX_DEPTH} levels deep"
_NOT_FINITE = "NaN or an infinite number, which JSON does not have; write null where there is no value"
_LONGEST_CELL = 2**30  # characters; the csv module refuses cells above 131072 otherwise


def _decoded(text: str | bytes) -> object:
    try:
        return json.loads(text.decode("utf-8-sig") if isinstance(text, bytes) else text)
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None


def _fault_in(value: object) -> str | None:
    """Return the reason to refuse a value that json.loads accepts, or None."""
    level, depth = [value], 0
    while level:
        inner: list[object] = []
        for item in level:
            if isinstance(item, (dict, list)):
                if depth == MAX_DEPTH:
                    return _TOO_DEEP
                inner += item.values() if isinstance(item, dict) else item
            elif isinstance(item, float) and not math.isfinite(item):
                return _NOT_FINITE
        level, depth = inner, depth + 1
    return None


def _json_records(file: Path) -> Iterator[tuple[str, object]]:
    with opened(file) as stream:
        start = stream.read(256).lstrip(b"\xef\xbb\xbf \t\r\n")
    if start.startswith(b"["):
        yield from _json_array_records(file)
        return
    with opened(file) as stream:
        for number, line in enumerate(stream, 1):
            if line.strip():
                yield f"{file}:{number}", _parsed(line)


def _json_array_records(file: Path) -> Iterator[tuple[str, object]]:
    try:
        with opened(file) as stream:
            found = _decoded(stream.read())
    except ValueError as error:
        if str(error).startswith(str(file)):
            raise
        raise ValueError(f"{file}: expected a JSON array of records ({error}).") from None
    assert isinstance(found, list), "the text begins with a bracket"
    for row, record in enumerate(found, 1):
        fault = _fault_in(record)
        bad = BadRecordError(f"expected a record that JSON can hold, got {fault}.")
        yield f"{file}:{row}", record if fault is None else bad


def _parsed(line: bytes) -> object:
    try:
        return from_json(line)
    except ValueError as error:
        start = line[:60].decode(errors="replace").rstrip()
        return BadRecordError(f"expected one JSON object per line, got {start!r} ({error}).")


def _csv_records(file: Path) -> Iterator[tuple[str, object]]:
    """Yield a record per row, with the texts of its cells under the names in the first row; an empty cell is null."""
    csv.field_size_limit(_LONGEST_CELL)
    with opened(file) as stream:
        rows = csv.reader(_lines(stream), strict=True)
        try:
            header = next(rows, [])
        except csv.Error as error:
            raise ValueError(f"{file}: expected a first row of comma-separated column names, got {error}.") from None
        if not header or len(set(header)) < len(header) or not is_text(header):
            raise ValueError(f"{file}: expected different UTF-8 column names in the first row, got {header}.")
        while True:
            location = f"{file}:{rows.line_num + 1}"
            try:
                cells = next(rows)
            except StopIteration:
                return
            except csv.Error as error:
                yield location, BadRecordError(f"expected a row of comma-separated cells, got {error}.")
                continue
            if cells:
                yield location, _row(header, cells)


def _lines(stream: BinaryIO) -> Iterator[str]:
    for number, line in enumerate(stream):
        yield line.decode("utf-8" if number else "utf-8-sig", errors="surrogateescape")


def _row(header: Sequence[str], cells: Sequence[str]) -> object:
    if len(cells) != len(header):
        return BadRecordError(f"expected {len(header)} cells, one per column of the first row, got {len(cells)}.")
    if not is_text(cells):
        return BadRecordError("expected text in UTF-8, got other bytes.")
    return {name: cell or None for name, cell in zip(header, cells, strict=True)}


def _parquet_records(file: Path) -> Iterator[tuple[str, object]]:
    import datasets  # takes a second to import, and JSONL does not need it

    _check_parquet(file)
    row = 0
    try:
        # Streaming: no Arrow copy of the file in the user's cache, and nothing to lock between ranks.
        # glob.escape, since data_files are patterns and an existing file's name need not be one.
        rows = datasets.load_dataset("parquet", data_files=glob.escape(str(file)), split="train", streaming=True)
        for row, record in enumerate(rows, 1):
            yield f"{file}:{row}", record
    except Exception as error:  # pyarrow and datasets raise many kinds, most without the file's name
        raise ValueError(
            f"{file}: expected a Parquet file, got a file that cannot be read after row {row} ({_first_line(error)}); "
            "copy or write the file again."
        ) from error


def _check_parquet(file: Path) -> None:
    # datasets would log an error for such a file before it raises one.
    with file.open("rb") as stream:
        start = stream.read(4)
        stream.seek(max(file.stat().st_size - 4, 0))
        end = stream.read(4)
    if not start == end == b"PAR1":
        raise ValueError(
            f"{file}: expected a Parquet file, which begins and ends with the bytes PAR1, got another or an incomplete "
            "file."
        )


def _hub_records(name: str, split: str, subset: str | None) -> Iterator[tuple[str, object]]:
    import datasets

    try:
        # Only data files are read: datasets runs no loading scripts since version 4.
        rows = datasets.load_dataset(name, subset, split=split)
    except (OSError, ValueError, RuntimeError) as error:  # no such set, network, split or subset; a loading script
        raise ValueError(
            f"Data: {name!r} is no file or directory here and could not be loaded as a hub data set "
            f"(split {split!r}, subset {subset!r}): {_first_line(error)}"
        ) from error
    for row, record in enumerate(rows, 1):
        yield f"{name}[{split}]:{row}", record


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
