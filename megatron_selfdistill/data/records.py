# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Records of a data set one by one, each with its place: from JSONL, JSON, Parquet, or a hub data set."""

from __future__ import annotations

import glob
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path


def records(
    path_or_name: str | Path | Sequence[str | Path], split: str, subset: str | None
) -> Iterator[tuple[str, object]]:
    """Yields (location, record), ``file:line`` (JSONL) or ``file:row`` counted from 1, in the order of the files.

    A line that is no JSON is yielded as the `BadRecordError` that says so, with its beginning.  ``path_or_name``: as
    `load_problems` takes it.  Raises: FileNotFoundError or ValueError, in one sentence, for what cannot be opened.
    """
    if isinstance(path_or_name, (str, Path)):
        paths: list[str | Path] = [path_or_name]
        if _is_hub_name(path_or_name):
            yield from _hub_records(str(path_or_name), split, subset)
            return
    else:
        paths = list(path_or_name)
    for path in paths:
        for file in _existing_files(path):
            if file.suffix == ".parquet":
                yield from _parquet_records(file)
            else:
                yield from _json_records(file)


class BadRecordError(ValueError):
    """What is wrong with one record: field, expected, got. Its place is added by whoever reads the file."""


def is_text(value: object) -> bool:
    """Whether every string within ``value`` can be written as UTF-8.  JSON can spell one that cannot: half of a
    surrogate pair, as a cut emoji leaves it, which tokenizers refuse and files cannot hold."""
    if isinstance(value, str):
        return value.isascii() or not _SURROGATE.search(value)
    if isinstance(value, dict):
        return all(is_text(key) and is_text(item) for key, item in value.items())
    return all(map(is_text, value)) if isinstance(value, (list, tuple)) else True


NO_TEXT = "expected text that can be written as UTF-8, got half of a surrogate pair (a cut emoji?)"

_SURROGATE = re.compile("[\ud800-\udfff]")


def _is_hub_name(path_or_name: str | Path) -> bool:
    if isinstance(path_or_name, Path) or Path(path_or_name).exists():
        return False
    looks_like_a_file = Path(path_or_name).suffix in (".jsonl", ".json", ".parquet")
    return not looks_like_a_file and re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", path_or_name) is not None


def _existing_files(path: str | Path) -> list[Path]:
    # The file itself comes first: its name may hold the characters of a glob.
    files = [Path(path)] if Path(path).exists() else sorted(map(Path, glob.glob(str(path), recursive=True)))
    if not files:
        raise FileNotFoundError(f"Data: expected a file or a glob of files, got {path}, which matches none.")
    for file in files:
        if file.is_dir() or file.suffix not in (".jsonl", ".json", ".parquet"):
            raise ValueError(
                f"Data: expected files ending in .jsonl, .json or .parquet, got {file}"
                f"{' (a folder: name its files, for example with a glob)' if file.is_dir() else ''}."
            )
    return files


def _json_records(file: Path) -> Iterator[tuple[str, object]]:
    with file.open("rb") as stream:
        start = stream.read(256).lstrip(b"\xef\xbb\xbf \t\r\n")
    if start.startswith(b"["):
        yield from _json_array_records(file)
        return
    with file.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            if line.strip():
                yield f"{file}:{number}", _parsed(line)


def _json_array_records(file: Path) -> Iterator[tuple[str, object]]:
    try:
        records = json.loads(file.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{file}: expected a JSON array of records, got text that is no JSON ({error}).") from None
    for row, record in enumerate(records, 1):
        yield f"{file}:{row}", record


def _parsed(line: bytes) -> object:
    try:
        return json.loads(line.decode("utf-8-sig"))
    except ValueError as error:
        start = line[:60].decode(errors="replace").rstrip()
        return BadRecordError(f"expected one JSON object per line, got {start!r} ({error}).")


def _parquet_records(file: Path) -> Iterator[tuple[str, object]]:
    import datasets  # takes a second to import, and JSONL does not need it

    # Streaming: no Arrow copy of the file in the user's cache, and nothing to lock between ranks.
    # glob.escape, since data_files are patterns and an existing file's name need not be one.
    rows = datasets.load_dataset("parquet", data_files=glob.escape(str(file)), split="train", streaming=True)
    for row, record in enumerate(rows, 1):
        yield f"{file}:{row}", record


def _hub_records(name: str, split: str, subset: str | None) -> Iterator[tuple[str, object]]:
    import datasets

    try:
        rows = datasets.load_dataset(name, subset, split=split)
    except (OSError, ValueError) as error:  # not found, no network, unknown split or subset
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"Data: {name!r} is no file here and could not be had as a hub data set "
            f"(split {split!r}, subset {subset!r}): {reason}"
        ) from error
    for row, record in enumerate(rows, 1):
        yield f"{name}[{split}]:{row}", record
