# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Whether packages with compiled parts load here: each is imported by a process of its own, all of them at once.

    with importing(["megatron-core", "vllm"], limit_s=300) as outcomes:
        ...                                    # whatever else there is to do meanwhile
        outcomes()["vllm"].error               # "ImportError: ... undefined symbol ..."

What a package breaks while it is imported, it breaks there; like a run, these processes have the working folder first
on their path.  Needs nothing but Python.
"""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

IMPORT_LIMIT_S = 300.0
"""Of all imports together: many nodes may read the same files of a shared file system."""
_LONGEST = 400
"""Characters of an error."""


@dataclass(frozen=True)
class ImportResult:
    """What an import came to."""

    version: str = ""
    """The module's own, whatever pip says."""
    place: str = ""
    error: str = ""
    """Why it failed, with the exception's type; empty where it did not."""
    absent: bool = False
    """There is no such module."""


@dataclass(frozen=True)
class _Import:
    modules: tuple[str, ...]
    """In this sequence; the first one has version and place."""
    operator: str = ""
    """Of torch.ops._C, which its library registers."""


# Of each the least that loads its compiled parts, as a run does; apex's and vLLM's need torch's libraries before.
_IMPORTS = {
    "megatron-core": _Import(("megatron.core", "megatron.core.package_info")),
    "transformer-engine": _Import(("transformer_engine", "transformer_engine.pytorch")),
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
os._exit(0)  # how a library takes its leave is not the question
"""


@contextlib.contextmanager
def importing(names: Sequence[str], limit_s: float = IMPORT_LIMIT_S) -> Iterator[Callable[[], dict[str, ImportResult]]]:
    """The imports start at once; what is yielded waits for them, until ``limit_s`` after that start, and none goes on
    afterwards.  ``names``: of `_IMPORTS`.
    """
    deadline = time.monotonic() + limit_s
    with tempfile.TemporaryDirectory(prefix="selfdistill_doctor_", ignore_cleanup_errors=True) as folder:
        children = {name: _started(_IMPORTS[name], Path(folder) / name) for name in names}
        try:
            yield lambda: {
                name: _result(_IMPORTS[name], child, Path(folder) / name, deadline, limit_s)
                for name, child in children.items()
            }
        finally:
            for child in children.values():
                child.kill()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(1.0)  # one that waits for a dead file system does not even die


def _started(what: _Import, files: Path) -> subprocess.Popen:
    arguments = json.dumps([what.modules, what.operator, f"{files}.json"])
    alike = [flag for flag, is_set in (("-I", sys.flags.isolated), ("-S", sys.flags.no_site)) if is_set]
    with open(f"{files}.log", "w") as log:
        command = [sys.executable, *alike, "-c", _CHILD, arguments]
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)


def _result(what: _Import, child: subprocess.Popen, files: Path, deadline: float, limit_s: float) -> ImportResult:
    try:
        status = child.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        return ImportResult(error=f"its import did not return within {limit_s:.0f} s")
    said = Path(f"{files}.log").read_text(errors="replace").splitlines()
    try:
        found = json.loads(Path(f"{files}.json").read_text())
    except (OSError, ValueError):
        return ImportResult(error=_short(f"its import ended the process {_how(status)}: {' '.join(said[-1:])}"))
    if "error" not in found:
        return ImportResult(version=found["version"], place=found["place"])
    if found["not_found"] and what.modules[0] in (found["lacking"], *_inside(found["lacking"], what.modules[0])):
        return ImportResult(absent=True)
    logged = [line for line in said if "Failed to import" in line]
    return ImportResult(error=_short("; ".join([found["error"], *logged[-1:]])))


def _inside(package: str, module: str) -> list[str]:
    """``module`` where it lies in ``package``, which is then absent itself."""
    return [module] if package and module.startswith(f"{package}.") else []


def _how(status: int) -> str:
    if status >= 0:
        return f"with status {status}"
    with contextlib.suppress(ValueError):
        return f"by {signal.Signals(-status).name}"
    return f"by signal {-status}"


def _short(error: str) -> str:
    line = " ".join(error.split())
    return line if len(line) <= _LONGEST else f"{line[:_LONGEST]} ..."
