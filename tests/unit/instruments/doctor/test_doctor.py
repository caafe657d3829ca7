# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The doctor reports what a node has and lacks, and needs no package for its report."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_selfdistill.instruments.doctor import doctor_command as doctor
from megatron_selfdistill.instruments.doctor import findings, versions

DOCTOR = Path(__file__).resolve().parents[4] / "tools" / "doctor.py"
ABI = "undefined symbol: _ZN3c105ErrorC2E"


def test_a_bare_python_gets_a_report_and_every_fix(tmp_path):
    """No package at all: -I -S leaves only the standard library."""
    report = subprocess.run([sys.executable, "-I", "-S", str(DOCTOR)], capture_output=True, text=True, cwd=tmp_path)
    assert report.returncode == 1 and "Traceback" not in report.stderr
    assert 'pip install "megatron-core>=0.16.1,<0.20"' in report.stdout
    assert "a run cannot start here: torch, megatron-core, psutil" in report.stdout


def test_what_is_needed_is_what_setup_installs():
    required, optional = versions.requirements()
    assert required["megatron-core"] == ">=0.16.1,<0.20" and "psutil" in required
    assert set(findings.OPTIONAL) == {*optional, "apex"}


LOCKED = """[project]
a==1.5
megatron-core==0.16.1; python_version < "3.12"
megatron-core==0.19.2; python_version >= "3.12"
torch==2.13.0+cpu
transformers==5.23.0
[vllm]
megatron-core==0.15.0; python_version < "3.12"
megatron-core==0.20.0; python_version >= "3.12"
"""


@pytest.mark.parametrize(
    ("python", "name", "version", "status", "words"),
    [
        ("3.11", "megatron-core", "0.16.1", "ok", "0.16.1; 0.19.2 is there for Python 3.12"),
        ("3.12", "megatron-core", "0.16.1", "ok", "0.16.1"),  # the lock has a higher one, but for this Python
        ("3.13", "megatron-core", "0.19.3", "warning", "0.19.3, newer than tested (0.19.2)"),
        ("3.12", "megatron-core", "0.20.0rc1", "FAILURE", "0.20.0rc1, expected >=0.16.1,<0.20"),
        ("3.12", "megatron-core", "", "FAILURE", "not installed"),
        ("3.12", "torch", "2.13.1+cu130", "ok", "2.13.1+cu130"),
        ("3.12", "torch", "2.15.0", "warning", "2.15.0, newer than tested (2.13)"),  # as in a lab's container
        ("3.12", "torch", "2.5.1", "FAILURE", "2.5.1, expected >=2.6,<2.15"),
        ("3.11", "transformer-engine", "2.12.0", "warning", "2.12.0, expected >=2.9.0a0,<2.12.0"),
        ("3.12", "transformer-engine", "", "absent", "not installed"),
        ("3.12", "transformer-engine", "2.12.0 fails", "FAILURE", f"2.12.0 cannot be imported: {ABI}"),
    ],
)
def test_a_package_is_judged_by_its_version_and_its_import(monkeypatch, tmp_path, python, name, version, status, words):
    (tmp_path / "lock.txt").write_text(LOCKED)
    monkeypatch.setattr(versions, "_LOCK", str(tmp_path / "lock.txt"))
    monkeypatch.setattr(versions.platform, "python_version", lambda: f"{python}.7")
    required, optional = versions.requirements()
    installed, _, fails = version.partition(" ")
    wanted = (required | optional)[name]
    found = findings.package(name, installed, wanted, ABI * bool(fails), required=name in required)
    assert (found.status, found.found) == (status, words) and bool(found.fix) is (status != "ok")


@pytest.mark.parametrize(
    ("answer", "usable", "ranks", "expected"),
    [
        ("H100, 80 GiB, 580\n" * 2, 2, 8, {"GPUs": "ok", "ranks": "FAILURE"}),
        ("H100, 80 GiB, 580\n", 0, 1, {"GPUs": "ok", "torch's CUDA": "FAILURE"}),
        ("", 0, 1, {"GPUs": "FAILURE"}),
    ],
)
def test_a_node_whose_gpus_cannot_be_used_cannot_run(monkeypatch, answer, usable, ranks, expected):
    monkeypatch.setattr(findings.shutil, "which", lambda name: f"/usr/bin/{name}")
    done = SimpleNamespace(stdout=answer, stderr="", returncode=0)
    monkeypatch.setattr(findings.subprocess, "run", lambda *_, **__: done)
    monkeypatch.setattr(findings, "num_gpus", lambda: usable)
    assert {found.name: found.status for found in findings.gpus(ranks)} == expected


BROKEN = {
    "transformer_engine/__init__.py": f"raise ImportError('transformer_engine_torch.so: {ABI}')",
    "fla/modules/__init__.py": f"raise ValueError('key contains names that are not kernel arguments: BT, not {ABI}')",
    "vllm/__init__.py": "__version__ = '0.32.1'",
    "vllm/_custom_ops.py": f"import torch; print('WARNING Failed to import from vllm._C: {ABI}')",  # and nothing else
    "amp_C.py": f"raise ImportError('amp_C.so: {ABI}')",
    "megatron/core/__init__.py": "import os; os.abort()",
}
EMPTY = ["transformer_engine/pytorch", "fla", "fla/modules", "fla/ops", "apex"]
SOUND = {
    "transformer_engine/__init__.py": "__version__ = '2.9.1'",
    "fla/__init__.py": "__version__ = '0.6.0'",
    "fla/modules/conv.py": "",
    "fla/ops/gated_delta_rule.py": "",
    "vllm/__init__.py": "__version__ = '0.32.1'",
    "vllm/_custom_ops.py": "import torch\ntorch.ops._C.rms_norm = print",
    "torch/__init__.py": "from types import SimpleNamespace\nops = SimpleNamespace(_C=SimpleNamespace())",
    "amp_C.py": "",
    "apex/optimizers/__init__.py": "import sys; assert 'torch' in sys.modules",
    "megatron/core/__init__.py": "__version__ = '0.12.0'",
}


@pytest.mark.parametrize("files", [pytest.param(BROKEN, marks=pytest.mark.full), SOUND], ids=["broken", "sound"])
def test_packages_that_load_are_distinguished_from_those_that_do_not(monkeypatch, tmp_path, files):
    for name, text in ({f"{package}/__init__.py": "" for package in EMPTY} | files).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    names = ["transformer-engine", "flash-linear-attention", "vllm", "apex", "megatron-core"]
    children = {name: findings._started(name) for name in names}
    found = {name: findings._result(child, time.monotonic() + 600) for name, child in children.items()}
    if files is SOUND:
        assert list(found.values()) == [("", version) for version in ("2.9.1", "0.6.0", "0.32.1", "", "0.12.0")]
        return
    assert all(ABI in found[name][0] for name in names[:-1]), found
    assert found["megatron-core"][0] == "its import ended the process by SIGABRT"


def test_an_import_that_never_returns_is_a_failure_and_ends():
    command = [sys.executable, "-c", "import signal; signal.pause()"]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert findings._result(child, time.monotonic()) == ("its import did not return in time", "")
    assert child.wait() != 0


@pytest.mark.parametrize(("local_rank", "asked"), [("0", [8]), ("5", [])])
def test_of_a_launch_one_rank_per_node_looks_at_it(monkeypatch, local_rank, asked):
    seen: list[int] = []
    failure = doctor.Finding("a", "b", doctor.FAILURE)
    monkeypatch.setattr(doctor, "examine", lambda ranks: seen.append(ranks) or [failure])
    monkeypatch.setitem(sys.modules, "megatron_selfdistill.instruments.selftest.node_test", None)  # an error to import
    monkeypatch.setattr(os, "environ", {**os.environ, "LOCAL_RANK": local_rank, "LOCAL_WORLD_SIZE": "8"})
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(ImportError):
        assert doctor.main(["--selftest"]) == 1
    assert seen == asked
