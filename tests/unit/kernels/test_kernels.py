# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The Triton kernels of the loss: right in the interpreter and on a GPU, well compiled for three architectures.

The claims are the tests of kernel_claims.py, and the laws of tests/unit/loss for every backend.  They run in a process
of their own, because triton decides at its import how it runs a kernel; each is reported under its own name.
"""

from __future__ import annotations

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
from claims import claims

from megatron_selfdistill.kernels import triton_backend
from megatron_selfdistill.loss import Divergence, Target, VocabShard, distillation_loss
from megatron_selfdistill.loss.sharded.vocab_parallel import in_use

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[2]
CLAIMS = claims()
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
HAS_TRITON = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="needs the package triton")

Outcomes = dict[str, list[tuple[str, str]]]


def outcomes(directory: Path, *, interpreted: bool, seconds: float = 3600) -> Outcomes:
    """Return, for every claim, (passed, failed or skipped, message) of each of its cases.

    Raises: subprocess.TimeoutExpired after so many seconds, far more than the tests take: some wait for other
    processes.
    """
    report = directory / "claims.xml"
    paths = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests" / "support"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "TRITON_INTERPRET": "1" if interpreted else "0"}
    files = sorted({str(file) for file in CLAIMS.values()})
    command = [sys.executable, "-m", "pytest", "-q", *files, "-m", "", f"--junitxml={report}"]
    process = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=seconds)
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


@pytest.mark.full
@needs_triton
@pytest.mark.parametrize("claim", CLAIMS)
def test_in_the_interpreter(claim: str, in_the_interpreter: Outcomes) -> None:
    report(in_the_interpreter, claim)


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("claim", CLAIMS)
def test_on_the_gpu(claim: str, on_the_gpu: Outcomes) -> None:
    report(on_the_gpu, claim)


CONTRAST = ("row log sums", "contrast")
"""The beginnings of the names of the kernels that read logits by masks, a block of a row at a time."""


@needs_triton
@pytest.mark.full
def test_kernels_compiled_for_three_architectures_spill_nothing_read_widely_and_ahead_and_wait_for_nobody(tmp_path):
    """Only the parts of 8 ranks, between the passes, and the kernels of the contrast may need several warps.

    A pass reads the first block and the next one of both rows, the gradient a whole block.  At least 98 instructions
    lie between a load and its use, in a loop that waits for its loads 0 to 9.
    """
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "TRITON_INTERPRET": "0"}
    command = [sys.executable, str(REPOSITORY / "tools" / "benchmarks" / "kernel_report.py")]
    command += ["--json", str(tmp_path / "report.json")]
    process = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout + process.stderr
    entries = json.loads((tmp_path / "report.json").read_text())
    assert process.stdout.count("\n") == 2 + len(entries)
    assert {entry["arch"] for entry in entries} == {80, 90, 100}
    for entry in entries:
        name = entry["name"]
        assert entry["spills"] == 0 < entry["registers"] <= 255, entry
        if not name.endswith("128 parts") and not name.startswith(CONTRAST):
            assert entry["shared"] == entry["barriers"] == 0, entry
        wide, of_gradient = 0, "gradient" in name
        if not name.startswith(("solve", "finish", *CONTRAST)):
            wide = 8 if of_gradient and "bf16" not in name else 4
        assert (entry["wide_loads"], entry["wide_stores"]) == (wide, wide // 2 if of_gradient else 0), entry
        reads_logits = " pass" in name and not name.startswith("finish")
        assert entry["ahead"] >= 90 if reads_logits else entry["ahead"] is None, entry


def test_without_a_choice_a_gpu_takes_triton_and_what_triton_cannot_do_takes_torch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert in_use("torch", CUDA, torch.bfloat16) == ("torch", "as configured")
    if HAS_TRITON:
        assert in_use(None, CUDA, torch.bfloat16) == ("triton", "logits on cuda")
        assert in_use("triton", CUDA, torch.float32) == ("triton", "as configured")
        assert in_use(None, CPU, torch.float32) == ("torch", "the logits lie on cpu")
        assert in_use(None, CUDA, torch.float64)[0] == "torch"
    without_cache = triton_backend._has_triton.__wrapped__
    monkeypatch.setattr(triton_backend, "_has_triton", without_cache)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert in_use(None, CUDA, torch.bfloat16) == ("torch", "the package triton is not installed")


@needs_triton
def test_a_triton_that_is_too_old_is_not_chosen_and_refused_if_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    too_old = "triton 3.2.0 is installed, and 3.3 or later is needed"
    monkeypatch.setattr(triton_backend, "_triton_version", lambda: "3.2.0")
    assert in_use(None, CUDA, torch.bfloat16) == ("torch", too_old)
    with pytest.raises(ValueError, match=rf"loss\.backend=triton cannot be used: {too_old}"):
        in_use("triton", CUDA, torch.bfloat16)
    for version in ("3.3.1", "3.10.0+git8b3c7d2", "4.0"):
        monkeypatch.setattr(triton_backend, "_triton_version", lambda version=version: version)
        assert in_use(None, CUDA, torch.bfloat16) == ("triton", "logits on cuda")


def test_a_backend_that_cannot_run_is_refused_with_a_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    logits, tokens = torch.randn(2, 8), torch.zeros(2, dtype=torch.int64)
    arguments = {"target": Target(anchor="student"), "divergence": Divergence(), "vocab": VocabShard(0, 8, 8)}
    with pytest.raises(ValueError, match=r"loss\.backend=triton cannot be used: .*Set loss\.backend to torch or null"):
        distillation_loss(logits, logits, tokens, **arguments, backend="triton")
    with pytest.raises(ValueError, match=r"loss\.backend must be null, torch or triton; got 'cuda'"):
        distillation_loss(logits, logits, tokens, **arguments, backend="cuda")
