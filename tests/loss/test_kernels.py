# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The Triton kernels of the loss: right in the interpreter and on a GPU, well compiled for three architectures.

The claims are the tests of kernel_claims.py.  A process of its own runs them, since how triton runs a kernel is settled
when it is imported; each is reported here under its own name.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import subprocess
import sys
import xml.etree.ElementTree
from collections import defaultdict
from pathlib import Path

import pytest
import torch

from megatron_selfdistill.loss import Divergence, Target, VocabShard, backend, distillation_loss
from megatron_selfdistill.loss.backend import in_use

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
CLAIMS = [
    node.name
    for node in ast.parse((HERE / "kernel_claims.py").read_text()).body
    if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
]
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
HAS_TRITON = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="needs the package triton")

Outcomes = dict[str, list[tuple[str, str]]]


def outcomes(folder: Path, *, interpreted: bool) -> Outcomes:
    """For every test of kernel_claims.py, (passed, failed or skipped, with what message) of each of its cases."""
    report = folder / "claims.xml"
    paths = os.pathsep.join([str(REPOSITORY), str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "TRITON_INTERPRET": "1" if interpreted else "0"}
    command = [sys.executable, "-m", "pytest", "-q", str(HERE / "kernel_claims.py"), f"--junitxml={report}"]
    process = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert report.exists(), process.stdout + process.stderr
    found: Outcomes = defaultdict(list)
    for case in xml.etree.ElementTree.parse(report).iter("testcase"):
        problem = next((child for child in case if child.tag in ("failure", "error", "skipped")), None)
        message = "" if problem is None else f"{case.get('name')}: {problem.get('message')}\n{problem.text}"
        found[str(case.get("name")).split("[")[0]].append(("passed" if problem is None else problem.tag, message))
    return found


def report(found: Outcomes, claim: str) -> None:
    assert found[claim], f"{claim} was not run"
    failures = [message for outcome, message in found[claim] if outcome in ("failure", "error")]
    assert not failures, "\n".join(failures)
    skipped = [message for outcome, message in found[claim] if outcome == "skipped"]
    if len(skipped) == len(found[claim]):
        pytest.skip(skipped[0])


@pytest.fixture(scope="module")
def in_the_interpreter(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    return outcomes(tmp_path_factory.mktemp("interpreted"), interpreted=True)


@pytest.fixture(scope="module")
def on_the_gpu(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    return outcomes(tmp_path_factory.mktemp("gpu"), interpreted=False)


@needs_triton
@pytest.mark.parametrize("claim", CLAIMS)
def test_in_the_interpreter(claim: str, in_the_interpreter: Outcomes) -> None:
    report(in_the_interpreter, claim)


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("claim", CLAIMS)
def test_on_the_gpu(claim: str, on_the_gpu: Outcomes) -> None:
    report(on_the_gpu, claim)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What tools/kernel_report.py says of the kernels of a default run on bfloat16 logits."""
    path = tmp_path_factory.mktemp("compiled") / "report.json"
    kernels = ["first pass, 5 betas, bf16", "second pass, bf16", "gradient, reverse_kl, bf16"]
    kernels += ["solve, 5 betas, 8 parts", "finish, 8 parts"]
    process = kernel_report("--json", str(path), "--kernel", *kernels)
    assert process.returncode == 0, process.stdout + process.stderr
    assert process.stdout.count("\n") == 2 + 3 * len(kernels)
    return json.loads(path.read_text())


def kernel_report(*arguments: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "TRITON_INTERPRET": "0"}
    command = [sys.executable, str(REPOSITORY / "tools" / "kernel_report.py"), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@needs_triton
def test_no_kernel_spills_registers_or_waits_at_a_barrier(compiled: list[dict]) -> None:
    assert {entry["arch"] for entry in compiled} == {80, 90, 100}
    for entry in compiled:
        assert entry["spills"] == entry["shared"] == entry["barriers"] == 0 < entry["registers"] < 255, entry


@needs_triton
def test_logits_are_read_and_written_16_bytes_at_a_time(compiled: list[dict]) -> None:
    """Both rows: the first block and the next one in a pass, two blocks side by side in the gradient."""
    for entry in compiled:
        reads = "pass" in entry["name"] or "gradient" in entry["name"]
        assert entry["wide_loads"] == (4 if reads else 0), entry
        assert entry["wide_stores"] == (2 if "gradient" in entry["name"] else 0), entry


@needs_triton
@pytest.mark.slow
def test_every_kernel_compiles_without_spills() -> None:
    process = kernel_report()
    assert process.returncode == 0, process.stdout + process.stderr


def test_without_a_choice_a_gpu_takes_triton_and_what_triton_cannot_do_takes_torch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert in_use("torch", CUDA, torch.bfloat16) == ("torch", "as configured")
    if HAS_TRITON:
        assert in_use(None, CUDA, torch.bfloat16) == ("triton", "logits on cuda")
        assert in_use("triton", CUDA, torch.float32) == ("triton", "as configured")
        assert in_use(None, CPU, torch.float32) == ("torch", "the logits lie on cpu, not on cuda")
        assert in_use(None, CUDA, torch.float64)[0] == "torch"
    monkeypatch.setattr(backend, "_triton_is_there", backend._triton_is_there.__wrapped__)  # not as it was found before
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert in_use(None, CUDA, torch.bfloat16) == ("torch", "the package triton is not installed")


def test_a_backend_that_cannot_run_is_refused_with_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    logits, tokens = torch.randn(2, 8), torch.zeros(2, dtype=torch.int64)
    arguments = {"target": Target(), "divergence": Divergence(), "vocab": VocabShard(0, 8, 8)}
    with pytest.raises(ValueError, match=r"loss\.backend=triton cannot be used: .*Use torch, or null"):
        distillation_loss(logits, logits, tokens, **arguments, backend="triton")
    with pytest.raises(ValueError, match=r"loss\.backend must be null, torch or triton; got 'cuda'"):
        distillation_loss(logits, logits, tokens, **arguments, backend="cuda")
