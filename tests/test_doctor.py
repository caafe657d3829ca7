# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The doctor says what a node has and lacks, and needs nothing of it to say so."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from scripts import load_script

DOCTOR = Path(__file__).resolve().parent.parent / "tools" / "doctor.py"


@pytest.fixture
def doctor() -> ModuleType:
    return load_script(DOCTOR)


def test_a_node_that_can_run_is_told_what_it_will_use():
    report = subprocess.run([sys.executable, str(DOCTOR)], capture_output=True, text=True)
    assert report.returncode == 0, report.stdout + report.stderr
    for words in ("python", "megatron-core", "psutil", "transformer-engine", "/dev/shm", "layers:", "device:"):
        assert words in report.stdout


def test_a_bare_python_gets_a_report_and_every_mend(tmp_path):
    """No package at all: -I -S leaves only the standard library."""
    report = subprocess.run([sys.executable, "-I", "-S", str(DOCTOR)], capture_output=True, text=True, cwd=tmp_path)
    assert report.returncode == 1 and "Traceback" not in report.stderr
    assert 'pip install "megatron-core>=0.16.1,<0.17"' in report.stdout
    assert "a run cannot start here: torch, megatron-core, psutil" in report.stdout


def test_what_is_needed_is_what_setup_installs(doctor):
    required, optional = doctor.requirements()
    assert required["megatron-core"] == ">=0.16.1,<0.17" and "psutil" in required
    assert set(doctor.OPTIONAL) == set(optional)


@pytest.mark.parametrize(
    ("version", "wanted", "fits"),
    [
        ("2.13.0+cpu", ">=2.6", True),
        ("2.5.1", ">=2.6", False),
        ("0.16.1", ">=0.16.1,<0.17", True),
        ("0.17.0rc1", ">=0.16.1,<0.17", False),
        ("0.9", ">=0.16.1,<0.17", False),
        ("5", ">=5,<6", True),
        ("1.3.0.dev2", ">=1.3,<1.4", True),
        ("7.0", "", True),
    ],
)
def test_versions_are_compared_as_numbers(doctor, version, wanted, fits):
    assert doctor.satisfies(version, wanted) is fits


def test_a_version_that_was_not_tested_is_a_failure_where_it_is_needed(doctor, monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.15.0")
    finding = doctor.distribution("megatron-core", ">=0.16.1,<0.17", required=True)
    assert finding.status == doctor.FAILURE and "0.15.0, tested with >=0.16.1,<0.17" in finding.found


@pytest.mark.parametrize(
    ("folders", "kernels", "status", "words"),
    [
        (["apex"], False, "FAILURE", "an unrelated package of that name"),
        (["apex/multi_tensor_apply"], False, "warning", "without its kernels"),
        (["apex/multi_tensor_apply"], True, "ok", "with its kernels"),
    ],
)
def test_nvidias_apex_is_told_from_the_package_of_that_name(
    doctor, monkeypatch, tmp_path, folders, kernels, status, words
):
    for folder in folders:
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / "apex" / "__init__.py").touch()
    if kernels:
        (tmp_path / "amp_C.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    finding = doctor.apex()
    assert finding.status == status and words in finding.found


def fake_torch(cuda: str | None, available: bool) -> SimpleNamespace:
    nccl = SimpleNamespace(version=lambda: (2, 27, 3))
    gpus = SimpleNamespace(is_available=lambda: available, device_count=lambda: 8, nccl=nccl)
    return SimpleNamespace(version=SimpleNamespace(cuda=cuda), cuda=gpus)


@pytest.mark.parametrize(
    ("cuda", "available", "driver", "status", "words"),
    [
        (None, False, False, "ok", "a build for the CPU"),
        (None, False, True, "FAILURE", "on a node with GPUs"),
        ("13.0", False, True, "FAILURE", "no GPU can be used"),
        ("13.0", True, True, "ok", "13.0, 8 GPUs"),
    ],
)
def test_torch_must_be_able_to_use_the_gpus_that_are_there(doctor, monkeypatch, cuda, available, driver, status, words):
    monkeypatch.setitem(sys.modules, "torch", fake_torch(cuda, available))
    monkeypatch.setattr(doctor.shutil, "which", lambda name: "/usr/bin/nvidia-smi" if driver else None)
    first = doctor.torch_and_gpus()[0]
    assert first.status == status and words in first.found


def test_a_driver_that_does_not_answer_is_a_failure(doctor, monkeypatch):
    monkeypatch.setattr(doctor.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    failed = SimpleNamespace(returncode=9, stdout="", stderr="NVIDIA-SMI has failed\n")
    monkeypatch.setattr(doctor.subprocess, "run", lambda *args, **options: failed)
    [finding] = doctor.gpus()
    assert finding.status == doctor.FAILURE and "NVIDIA-SMI has failed" in finding.found
