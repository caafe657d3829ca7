# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Files of a run as a crash, a full disk or a careless hand leaves them: odd lines and bytes between good lines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

NO_OBJECTS = [
    b"[1, 2]",
    b'"text"',
    b"7",
    b"null",
    b"NaN",
    b"{",
    b"\xff\xfe",
    b"\x00\x00\x00",
    b"[" * 100_000,
    b'{"step": ' + b"[" * 500 + b"]" * 500 + b"}",
    b'{"step": ' + b"9" * 5000 + b"}",
]
"""Lines that are no objects with a step."""


def without(line: bytes, key: str) -> bytes:
    """Return a line of JSON without one of its keys."""
    return json.dumps({name: value for name, value in json.loads(line).items() if name != key}).encode()


def with_value(line: bytes, key: str, value: Any) -> bytes:
    """Return a line of JSON with another value of one key."""
    return json.dumps(json.loads(line) | {key: value}).encode()


def insert(path: Path, number: int, line: bytes) -> None:
    """Insert a line into a file, as its line ``number``, counted from 1."""
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[: number - 1], line + b"\n", *lines[number - 1 :]]))


@st.composite
def spoilt(draw: st.DrawFn, content: bytes) -> bytes:
    """Return the content of a file with one to three odd lines, lost keys or replaced bytes."""
    lines = content.splitlines()
    kinds = ["insert a line", "lose a key", "replace a byte"]
    places = draw(st.lists(st.integers(0, len(lines) - 1), min_size=1, max_size=3, unique=True))
    for place in sorted(places, reverse=True):
        line, kind = lines[place], draw(st.sampled_from(kinds))
        key = draw(st.sampled_from(sorted(json.loads(line))))
        if kind == "insert a line":
            lines.insert(place, draw(st.sampled_from(NO_OBJECTS)))
        elif kind == "lose a key":
            lines[place] = without(line, key)
        else:
            at, byte = draw(st.integers(0, len(line) - 1)), draw(st.integers(0, 255))
            lines[place] = line[:at] + bytes([byte]) + line[at + 1 :]
    return b"\n".join(lines) + b"\n"
