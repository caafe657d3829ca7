# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Every Python process with this directory on its path writes down which lines of the repository it executes.

Python imports ``sitecustomize`` before the first line of a program.  The process and its forks append each line of code
once, as "file:line", to a file in the directory that SELFDISTILL_REACHED names.  A killed process has written the lines
that it had reached.
"""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any

_DIRECTORY = os.environ.get("SELFDISTILL_REACHED")
_REPOSITORY = f"{Path(__file__).resolve().parents[2]}{os.sep}"
_WATCHED = tuple(_REPOSITORY + name for name in (f"megatron_selfdistill{os.sep}", os.path.join("tests", "gpu", "")))
_seen: set[tuple[str, int]] = set()


def _line(frame: FrameType, event: str, argument: Any) -> Any:
    place = (frame.f_code.co_filename, frame.f_lineno)
    if place not in _seen:
        _seen.add(place)
        os.write(_file, f"{place[0].removeprefix(_REPOSITORY)}:{place[1]}\n".encode())
    return _line


def _call(frame: FrameType, event: str, argument: Any) -> Any:
    return _line(frame, event, argument) if frame.f_code.co_filename.startswith(_WATCHED) else None


if _DIRECTORY:
    _file = os.open(os.path.join(_DIRECTORY, f"{os.getpid()}.lines"), os.O_CREAT | os.O_APPEND | os.O_WRONLY)
    threading.settrace(_call)
    sys.settrace(_call)
