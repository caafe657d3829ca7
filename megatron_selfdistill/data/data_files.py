# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The files of a data set: single files, globs, directories of shards, and lists of files, globs and directories."""

from __future__ import annotations

import glob
import gzip
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

# Descriptions that the library datasets writes next to the files of a data set.
_DESCRIPTIONS = ("dataset_info.json", "dataset_infos.json", "state.json")

FORMATS = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".csv", ".csv.gz", ".parquet")


def is_hub_name(path_or_name: str | Path) -> bool:
    """Return whether ``path_or_name`` can only be the name of a data set on the Hugging Face hub.

    It is no path that exists, and looks neither like a file nor like a path.
    """
    if isinstance(path_or_name, Path) or Path(path_or_name).exists():
        return False
    looks_like_a_file = format_of(Path(path_or_name)) is not None or path_or_name.endswith((".gz", ".txt", ".tsv"))
    return not looks_like_a_file and re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", path_or_name) is not None


def format_of(file: Path) -> str | None:
    """Return the ending of the file's name among `FORMATS`, in any letter case; None for every other name."""
    name = file.name.lower()
    return next((ending for ending in FORMATS if name.endswith(ending)), None)


def data_files(paths: Sequence[str | Path]) -> list[Path]:
    """Return the data files of ``paths``, in order, each once.

    Each path is a file, a directory, or a glob of files and directories.  A directory stands for its data files, sorted
    by name: not for its subdirectories, for files whose name begins with "." or "_", or for the descriptions that the
    library datasets writes.

    Raises: FileNotFoundError for a path that matches nothing; ValueError for a file that is no regular file or has
    another ending, and for a directory without data files or with data files of several formats.
    """
    return list(dict.fromkeys(file for path in paths for match in _matches(path) for file in _files_of(match)))


@contextmanager
def opened(file: Path) -> Iterator[BinaryIO]:
    """Open ``file`` for reading bytes, decompressed where its name ends in .gz.

    Raises: ValueError, which names the file, where the compressed data are corrupt or end too early.
    """
    compressed = file.name.lower().endswith(".gz")
    with gzip.open(file) if compressed else file.open("rb") as stream:
        try:
            yield cast(BinaryIO, stream)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise ValueError(
                f"{file}: expected complete gzip data, got other or corrupt bytes ({error}); copy the file again"
            ) from error


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
    if path.is_symlink() and not path.exists():
        raise ValueError(f"Data: expected regular files, got {path}, which is {kind_of(path)}; correct the link.")
    if not path.is_file():
        raise ValueError(
            f"Data: expected regular files, got {path}, which is {kind_of(path)}: every rank reads the data, and a "
            "resumed run reads them again; write them into a file."
        )
    if format_of(path) is None:
        raise ValueError(f"Data: expected files ending in {', '.join(FORMATS)}, got {path}.")
    return [path]


def _shards(directory: Path) -> list[Path]:
    files = [file for file in sorted(directory.iterdir()) if file.is_file() and not file.name.startswith((".", "_"))]
    by_format = {
        file: found for file in files if file.name not in _DESCRIPTIONS and (found := format_of(file)) is not None
    }
    formats = sorted(set(by_format.values()))
    if not formats:
        raise ValueError(
            f"Data: expected a directory with files ending in {', '.join(FORMATS)}, got {directory}, which has none; "
            f"name the files of subdirectories with a glob, such as '{directory}/**/*.parquet'."
        )
    if len(formats) > 1:
        raise ValueError(
            f"Data: expected a directory with data files of one format, got {directory} with {' and '.join(formats)}; "
            f"choose one format with a glob, such as '{directory}/*{formats[0]}'."
        )
    return list(by_format)


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
