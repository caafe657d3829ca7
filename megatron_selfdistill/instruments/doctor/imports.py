# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Imports of packages with compiled parts, each in a process of its own, all at the same time.

    with importing(["megatron-core", "vllm"], limit_s=300) as outcomes:
        ...                                    # other work meanwhile
        outcomes()["vllm"].error               # "ImportError: ... undefined symbol ..."

A package that crashes during its import ends only its own process.  Like a run, these processes have the working
directory first on their path.  This file needs only Python.
"""

from __future__ import annotations

import contextlib
import json
import operator
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

_CLAUSE = re.compile(r"(>=|<|==)([0-9][0-9a-z.+]*)")
_COMPARISONS = {">=": operator.ge, "<": operator.lt, "==": operator.eq}

IMPORT_LIMIT_S = 300.0
"""The limit in seconds for all imports together; many nodes may read the same files of a shared file system."""
_LONGEST = 400
"""The largest length of a reported error in characters."""


@dataclass(frozen=True)
class ImportResult:
    """The result of one import."""

    version: str = ""
    """The version that the module itself states, which may differ from pip's records."""
    place: str = ""
    """The directory of the module."""
    error: str = ""
    """The reason of a failure, with the exception's type; empty after a successful import."""
    absent: bool = False
    """Whether the module does not exist."""


@dataclass(frozen=True)
class _Import:
    modules: tuple[str, ...]
    """The modules in the sequence of their imports; the first module has the version and the place."""
    operator: str = ""
    """The operator of torch.ops._C that the package's library registers."""


# The fewest modules that load the compiled parts, as a run does; apex and vLLM need torch's libraries before.
_IMPORTS = {
    "megatron-core": _Import(("megatron.core", "megatron.core.package_info")),
    "transformer-engine": _Import(("transformer_engine", "transformer_engine.pytorch")),
    "flash-linear-attention": _Import(("fla", "fla.modules.conv", "fla.ops.gated_delta_rule")),
    # On a CPU vLLM only logs that its library does not load.
    "vllm": _Import(("vllm", "vllm._custom_ops"), operator="rms_norm"),
    "apex": _Import(("apex", "torch", "amp_C", "apex.optimizers")),
}

_CHILD = """
import importlib, json, os, sys

modules, operator, answer = json.loads(sys.argv[1])
try:
    loaded = [importlib.import_module(name) for name in modules]
    if operator and not hasattr(importlib.import_module("torch").ops._C, operator):
        raise ImportError("its compiled operators do not load")
    version = getattr(loaded[0], "__version__", "") or getattr(loaded[-1], "__version__", "")
    found = {"version": str(version), "place": next(iter(getattr(loaded[0], "__path__", [])), "")}
except BaseException as error:
    found = {"error": f"{type(error).__name__}: {error}", "lacking": str(getattr(error, "name", ""))}
    found["not_found"] = isinstance(error, ModuleNotFoundError)
with open(answer, "w") as file:
    json.dump(found, file)
sys.stdout.flush()
sys.stderr.flush()
os._exit(0)  # skips the exit handlers of libraries, which are not checked
"""


@contextlib.contextmanager
def importing(names: Sequence[str], limit_s: float = IMPORT_LIMIT_S) -> Iterator[Callable[[], dict[str, ImportResult]]]:
    """Start the imports of ``names``, keys of `_IMPORTS`, at once, and end all of them with the context.

    The context's value is a function that waits for the imports until ``limit_s`` seconds after their start.
    """
    deadline = time.monotonic() + limit_s
    with tempfile.TemporaryDirectory(prefix="selfdistill_doctor_", ignore_cleanup_errors=True) as directory:
        children = {name: _started(_IMPORTS[name], Path(directory) / name) for name in names}
        try:
            yield lambda: {
                name: _result(_IMPORTS[name], child, Path(directory) / name, deadline, limit_s)
                for name, child in children.items()
            }
        finally:
            for child in children.values():
                child.kill()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(1.0)  # a process that waits for a dead file system cannot be killed


def _started(what: _Import, files: Path) -> subprocess.Popen[bytes]:
    arguments = json.dumps([what.modules, what.operator, f"{files}.json"])
    alike = [flag for flag, is_set in (("-I", sys.flags.isolated), ("-S", sys.flags.no_site)) if is_set]
    with open(f"{files}.log", "w") as log:
        command = [sys.executable, *alike, "-c", _CHILD, arguments]
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)


def _result(
    what: _Import, child: subprocess.Popen[bytes], files: Path, deadline: float, limit_s: float
) -> ImportResult:
    try:
        status = child.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        return ImportResult(error=f"its import did not return within {limit_s:.0f} s")
    output = Path(f"{files}.log").read_text(errors="replace").splitlines()
    try:
        found = json.loads(Path(f"{files}.json").read_text())
    except (OSError, ValueError):
        return ImportResult(error=_short(f"its import ended the process {_how(status)}: {' '.join(output[-1:])}"))
    if "error" not in found:
        return ImportResult(version=found["version"], place=found["place"])
    if found["not_found"] and f"{what.modules[0]}.".startswith(f"{found['lacking']}."):  # or a package around it
        return ImportResult(absent=True)
    logged = [line for line in output if "Failed to import" in line]
    return ImportResult(error=_short("; ".join([found["error"], *logged[-1:]])))


def _how(status: int) -> str:
    if status >= 0:
        return f"with status {status}"
    with contextlib.suppress(ValueError):
        return f"by {signal.Signals(-status).name}"
    return f"by signal {-status}"


def _short(error: str) -> str:
    line = " ".join(error.split())
    return line if len(line) <= _LONGEST else f"{line[:_LONGEST]} ..."


def is_readable(wanted: str) -> bool:
    """Return whether `satisfies` reads every clause of ``wanted``."""
    return all(map(_CLAUSE.fullmatch, wanted.split(",")))


def satisfies(version: str, wanted: str) -> bool:
    """Return whether ``version`` satisfies ``wanted``, a list of >=, < and ==.

    Only the leading numbers count: a local build or a release candidate equals its release.
    """
    for clause in filter(None, wanted.split(",")):
        match = _CLAUSE.fullmatch(clause.strip())
        assert match is not None, clause
        both = [numbers(text) for text in (version, match.group(2))]
        length = max(map(len, both))
        have, limit = (part + [0] * (length - len(part)) for part in both)
        if not _COMPARISONS[match.group(1)](have, limit):
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
