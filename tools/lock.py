# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Write the versions of an environment into the section [project] of the lock: what `make lock` runs.

    .venv-newest/bin/python tools/lock.py

The environment is that of the Python that runs the script.  A line with a marker, such as ``python_version < "3.12"``,
keeps the marker and gets the version of the environment if the marker holds there; otherwise the line stays as it is.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

LOCK = Path(__file__).resolve().parent / "tested_versions.txt"


def main() -> int:
    """Write the lock, and print how many lines have changed."""
    command = [sys.executable, "-m", "pip", "freeze", "--exclude-editable"]
    frozen = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    LOCK.write_text(locked(LOCK.read_text(encoding="utf-8"), frozen), encoding="utf-8")
    return subprocess.run(["git", "diff", "--stat", "--", str(LOCK)]).returncode


def locked(lock: str, frozen: Iterable[str], environment: Mapping[str, str] | None = None) -> str:
    """Return the text of the lock with the versions of ``frozen``, the lines of pip freeze, in the section [project].

    ``environment``: the values of the markers, where they differ from those of this Python.
    """
    before, header, rest = lock.partition("[project]\n")
    section, other, after = rest.partition("[vllm]\n")
    fresh = {_name(line): line for line in map(_without_build, frozen) if not line.startswith(("nvidia-", "cuda-"))}
    marked = []
    for line in section.splitlines():
        one = Requirement(line) if ";" in line else None
        if one is None or one.marker is None:
            continue
        if not one.marker.evaluate(dict(environment or {})):
            marked.append(line)
        elif _name(line) in fresh:
            marked.append(f"{fresh.pop(_name(line))};{line.partition(';')[2]}")
    clashing = sorted({_name(line) for line in marked} & fresh.keys())
    if clashing:
        raise SystemExit(f"[lock] error: {LOCK.name} has {', '.join(clashing)} for other Pythons only: add its marker")
    lines = sorted([*fresh.values(), *marked], key=lambda line: line.partition("==")[0].lower())
    return "".join([before, header, *(f"{line}\n" for line in lines), other, after])


def _without_build(line: str) -> str:
    """Return a line of pip freeze without the build, as in +cpu: it is that of the machine, as are CUDA's libraries."""
    return re.sub(r"\+[a-z0-9.]*$", "", line)


def _name(line: str) -> str:
    return canonicalize_name(re.split(r"[=@ ]", line)[0])


if __name__ == "__main__":
    sys.exit(main())
