# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The records of a data set with their places, from JSONL, JSON, Parquet, or a hub data set.

The files of a data set are single files, globs, directories of shards, and lists of these.  The module also reads the
values that code of users returns: numbers and truths, also as NumPy and torch have them, and texts.
"""

from __future__ import annotations

import contextlib
import glob
import json
import math
import operator
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, SupportsFloat, TypeVar

from megatron_selfdistill.errors import BadRecordError

# Descriptions that the library datasets writes next to the files of a data set.
_DESCRIPTIONS = ("dataset_info.json", "dataset_infos.json", "state.json")

FORMATS = (".jsonl", ".json", ".parquet")
NO_TEXT = "expected text that can be written as UTF-8, got half of a surrogate pair (a cut emoji?)"
_SURROGATE = re.compile("[\ud800-\udfff]")

T = TypeVar("T")


def is_hub_name(path_or_name: str | Path) -> bool:
    """Return whether ``path_or_name`` can only be the name of a data set on the Hugging Face hub.

    It is no path that exists, and looks neither like a file nor like a path.
    """
    if isinstance(path_or_name, Path) or Path(path_or_name).exists():
        return False
    looks_like_a_file = path_or_name.lower().endswith((*FORMATS, ".gz", ".csv", ".tsv", ".txt"))
    return not looks_like_a_file and re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", path_or_name) is not None


def data_files(paths: Sequence[str | Path]) -> list[Path]:
    """Return the data files of ``paths``, in order, each once.

    Each path is a file, a directory, or a glob of files and directories.  A directory stands for its data files, sorted
    by name: not for its subdirectories, for files whose name begins with "." or "_", or for the descriptions that the
    library datasets writes.

    Raises: FileNotFoundError for a path that matches nothing; ValueError for a file that is no regular file or has
    another ending, and for a directory without data files or with data files of several formats.
    """
    return list(dict.fromkeys(file for path in paths for match in _matches(path) for file in _files_of(match)))


def _matches(path: str | Path) -> list[Path]:
    # The path itself comes first: the name of an existing file may hold the characters of a glob.
    matches = [Path(path)] if Path(path).exists() else sorted(map(Path, glob.glob(str(path), recursive=True)))
    if not matches:
        raise FileNotFoundError(
            f"Data: expected a file, a directory or a glob of files, got {path}, which matches none; check the path."
        )
    return matches


def _files_of(path: Path) -> list[Path]:
    if path.is_dir():
        return _shards(path)
    if not path.is_file():
        raise ValueError(
            f"Data: expected regular files, got {path}, which is {kind_of(path)}: every rank reads the data, and a "
            "resumed run reads them again; write them into a file."
        )
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"Data: expected files ending in {', '.join(FORMATS)}, got {path}.")
    return [path]


def _shards(directory: Path) -> list[Path]:
    files = [
        file
        for file in sorted(directory.iterdir())
        if file.is_file()
        and file.suffix.lower() in FORMATS
        and not file.name.startswith((".", "_"))
        and file.name not in _DESCRIPTIONS
    ]
    formats = sorted({file.suffix.lower() for file in files})
    if len(formats) != 1:
        raise ValueError(
            f"Data: expected a directory with data files of one format ({', '.join(FORMATS)}), got {directory} with "
            f"{' and '.join(formats) or 'none'}; name other files with a glob, such as '{directory}/**/*.parquet'."
        )
    return files


def kind_of(path: Path) -> str:
    """Return what ``path``, which is no regular file, is, for a message: "a named pipe", "a symbolic link to .."."""
    if path.is_symlink() and not path.exists():
        target = os.path.realpath(path)
        is_loop = os.path.islink(target)
        return "a symbolic link " + ("that leads back to itself" if is_loop else f"to {target}, which does not exist")
    if path.is_dir():
        return "a directory"
    if path.is_fifo():
        return "a named pipe"
    return "a socket" if path.is_socket() else "a device"


@dataclass(frozen=True)
class RecordSource:
    """The place of the records of a data set, their columns, and the reaction to bad records."""

    path: str | Path | Sequence[str | Path]
    """A file with an ending of `FORMATS`, a directory of such files, a glob, a list of files, directories
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
    teachers: RecordTeachers | None = None
    """Who teaches each record; None if all records have the one teacher of the run."""


class RecordTeachers(Protocol):
    """Who teaches each record of a run with named teachers."""

    def shares(self, record: Mapping[str, Any], location: str) -> Mapping[str, float]:
        """Return the share of each teacher of a record by name, in the order of the names; the sum is 1.

        Raises: `BadRecordError` if the record names no teacher; `ConfigError` if a function of the user does not.
        """

    def read_solution(self, names: Iterable[str]) -> bool:
        """Return whether a teacher among ``names`` reads the solution."""


def read_records(
    source: RecordSource, read: Callable[[dict[str, Any], str], T], *, quotes: bool
) -> tuple[list[T], dict[str, BadRecordError]]:
    """Return ``read(record, location)`` of the good records, and the error of each skipped record by its message.

    ``read`` raises `BadRecordError` for a bad record.  A message names file and line; with ``quotes`` it shows the bad
    part of the record, too.

    Raises: ValueError with the message of a bad record where ``source.on_bad_record`` is "error"; FileNotFoundError or
    ValueError, which names the file, for a source that cannot be opened.
    """
    advice = "set data.on_bad_record=skip" if source.section == "data" else "remove it"
    found: list[T] = []
    skipped: dict[str, BadRecordError] = {}
    for location, record in records(source):
        try:
            if isinstance(record, BadRecordError):
                raise record
            if not isinstance(record, dict):
                raise BadRecordError(f"expected a JSON object per record, got {kind(record)}", record)
            found.append(read(record, location))
        except BadRecordError as error:
            shown = f" ({quoted(error.content)})" if quotes and error.content is not None else ""
            message = f"{location}: {error}{shown}"
            if source.on_bad_record == "error":
                raise ValueError(f"{message}; correct the record, or {advice}") from None
            skipped[message] = error
        if len(found) == source.limit:
            break
    return found, skipped


def records(source: RecordSource) -> Iterator[tuple[str, object]]:
    """Yield (location, record) of all records of ``source`` in the order of the files.

    A location is ``file:line`` (JSONL) or ``file:row`` (JSON arrays, Parquet), counted from 1, or ``name[split]:row``
    of a hub data set.  In place of a line that cannot be read, the `BadRecordError` with the reason is yielded.

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
        yield from (_parquet_records if file.suffix.lower() == ".parquet" else _json_records)(file)


def from_json(text: str | bytes) -> object:
    """Return the value of the JSON ``text``; bytes are UTF-8, with or without a byte order mark.

    Raises: ValueError for text that is not valid JSON, for NaN and Infinity, which JSON does not have, for strings that
    are no text (`is_text`), and for more levels than Python reads.
    """
    try:
        value: object = json.loads(text, parse_constant=_refuse_constant)
        if not is_text(value):
            raise ValueError(NO_TEXT)
    except RecursionError:
        raise ValueError("objects and lists are nested too deep") from None
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


def kind(value: object) -> str:
    """Return the kind of a value, without its contents."""
    kinds = {dict: "an object", list: "a list", tuple: "a list", str: "a text", bool: "a truth value"}
    return "nothing" if value is None else kinds.get(type(value), "a number")


def quoted(value: object) -> str:
    """Return at most 80 characters of a value, for those who may see it."""
    text = json.dumps(value, default=str, ensure_ascii=False).encode(errors="backslashreplace").decode()
    return text if len(text) <= 80 else text[:77] + "..."


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name}, which JSON does not have; write null where there is no value")


def _json_records(file: Path) -> Iterator[tuple[str, object]]:
    with file.open("rb") as stream:
        is_array = stream.read(256).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")
        stream.seek(0)
        if not is_array:
            for number, line in enumerate(stream, 1):
                if line.strip():
                    yield f"{file}:{number}", _parsed(line)
            return
        try:
            found: Any = from_json(stream.read())
        except ValueError as error:
            raise ValueError(f"{file}: expected a JSON array of records ({error}).") from None
    for row, record in enumerate(found, 1):
        yield f"{file}:{row}", record


def _parsed(line: bytes) -> object:
    try:
        return from_json(line)
    except ValueError as error:
        start = line[:60].decode(errors="replace").rstrip()
        return BadRecordError(f"expected one JSON object per line, got other text ({error})", start)


def _parquet_records(file: Path) -> Iterator[tuple[str, object]]:
    # Streaming: no Arrow copy of the file in the user's cache, and nothing to lock between ranks.
    # glob.escape, since data_files are patterns and an existing file's name need not be one.
    options = {"data_files": glob.escape(str(file)), "split": "train", "streaming": True}
    failed = f"{file}: expected a Parquet file, got a file that cannot be read; copy or write the file again"
    yield from _rows(str(file), failed, "parquet", **options)


def _hub_records(name: str, split: str, subset: str | None) -> Iterator[tuple[str, object]]:
    failed = (
        f"Data: {name!r} is no file or directory here and could not be loaded as a hub data set (split {split!r}, "
        f"subset {subset!r})"
    )
    yield from _rows(f"{name}[{split}]", failed, name, subset, split=split)


def _rows(place: str, failed: str, *arguments: Any, **options: Any) -> Iterator[tuple[str, object]]:
    """Yield (location, record) of a data set that the library datasets reads; it runs no scripts since version 4."""
    import datasets  # takes a second to import, and JSONL does not need it

    row = 0
    try:
        for row, record in enumerate(datasets.load_dataset(*arguments, **options), 1):
            yield f"{place}:{row}", record
    except Exception as error:  # pyarrow and datasets raise many kinds, most without the file's name
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{failed} (after row {row}: {reason})") from error


def finite_number(value: object, name: str) -> float:
    """Return ``value`` as a float: a number of Python or NumPy, or a tensor or an array of one number.

    ``name``: what the message calls the value.  Raises: ValueError for another type, NaN and infinity.
    """
    number = math.nan
    if isinstance(value, SupportsFloat):
        with contextlib.suppress(TypeError, ValueError, RuntimeError, OverflowError):  # such as a tensor of two numbers
            number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"expected a finite number as {name}, got {value!r:.80}")
    return number


def whole_number(value: object) -> int | None:
    """Return ``value`` as an int, also from NumPy or torch; None for a boolean and for all that is no whole number."""
    try:
        return None if isinstance(value, bool) else operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return None


def plain(value: Any) -> Any:
    """Return the Python value of a scalar of NumPy, or of a tensor or an array without dimensions; else ``value``."""
    return value.item() if getattr(value, "shape", None) == () else value


def text_or_none(value: object) -> str | None:
    """Return ``value``, a text or None.  Raises: ValueError for another type, and for half of a surrogate pair."""
    if value is not None and not isinstance(value, str):
        raise ValueError(f"expected a text or None, got a value of type {type(value).__name__}")
    if not is_text(value):
        raise ValueError(NO_TEXT)
    return value
