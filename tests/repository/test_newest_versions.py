# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""NEWEST=1 reports the versions beyond the bounds of setup.py that nobody has tried, and uses the newest Python."""

from __future__ import annotations

import datetime
import http.server
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version
from tiny_run import REPOSITORY

sys.path.append(str(REPOSITORY / "tools"))
import newest_versions
from newest_versions import Release

TODAY = datetime.datetime(2026, 11, 27, tzinfo=datetime.UTC)
SETUP = 'REQUIREMENTS = ["torch>=2,<2.14"]\nEXTRAS = {"train": ["psutil", "hydra_core>=1.3,<1.4"]}\n'


def release(version: str, days: int, pythons: str = "") -> Release:
    return Release(Version(version), TODAY - datetime.timedelta(days), pythons)


def sentence(bound: str, served: list[Release], *tried: str) -> str | None:
    return newest_versions.untried("megatron-core", Version(bound), served, map(Version, tried), TODAY)


# -- what is reported ------------------------------------------------------------------------------------------------


def test_a_newer_minor_version_that_no_commit_has_tried_is_reported_with_its_age_and_its_pythons():
    served = [release("0.16.1", 200), release("0.19.0", 100), release("0.19.2", 2, ">=3.12")]
    assert sentence("0.17", served) == (
        "megatron-core 0.19 has been there since 2026-08-19 (Python >= 3.12), setup.py allows <0.17, no commit has "
        "tried it: raise the bound, or record in tools/tried_versions.toml why not"
    )


@pytest.mark.parametrize(
    ("bound", "served", "tried"),
    [
        ("0.17", [release("0.16.9", 100)], []),  # within the bound
        ("0.20", [release("0.19.2", 100)], []),
        ("0.17", [release("0.17.0", 30)], []),  # not more than 30 days
        ("0.17", [release("0.17.0", 31)], ["0.17"]),
        ("0.17", [release("0.17.0", 200), release("0.19.0", 31)], ["0.19"]),  # a record stands for all before it
        ("6", [release("5.24.0", 100)], []),
        ("6", [release("6.1.0", 31)], ["6"]),
    ],
)
def test_what_is_allowed_or_tried_or_new_is_not_reported(bound, served, tried):
    assert sentence(bound, served, *tried) is None


@pytest.mark.parametrize(
    ("bound", "served", "tried", "expected"),
    [
        ("0.17", [release("0.18.0", 31), release("0.19.0", 3)], [], "megatron-core 0.18 "),  # a newer one hides none
        ("0.17", [release("0.19.0", 31)], ["0.18"], "megatron-core 0.19 "),
        ("6", [release("6.0.0", 99), release("6.1.0", 3)], [], "megatron-core 6 has been there since 2026-08-20,"),
        ("2.12.0", [release("2.20.2", 31)], [], "megatron-core 2.20 "),  # the bound fixes two components
        ("0.17", [release("1", 31)], [], "megatron-core 1.0 "),
    ],
)
def test_the_components_that_the_bound_fixes_are_compared(bound, served, tried, expected):
    found = sentence(bound, served, *tried)
    assert found is not None and found.startswith(expected)


def test_the_bounds_are_those_of_all_extras_once_each():
    required = newest_versions.requirements(SETUP.replace('"psutil"', '"psutil", "torch<2.14"'))
    assert newest_versions.upper_bounds(required) == [("hydra_core", Version("1.4")), ("torch", Version("2.14"))]


def test_of_requirements_for_different_pythons_the_highest_bound_counts():
    lines = ['a<1; python_version < "3.12"', 'a<3; python_version >= "3.12"', 'b<1; python_version < "3.12"']
    everything = [*lines, 'b; python_version >= "3.12"', 'c<2; platform_system == "Linux"', "d<1", "d<2"]
    found = newest_versions.upper_bounds(map(Requirement, everything))
    assert [(name, str(bound)) for name, bound in found] == [("a", "3"), ("c", "2"), ("d", "1"), ("d", "2")]


def test_the_record_names_packages_with_bounds_and_says_what_was_found():
    text = newest_versions.TRIED.read_text(encoding="utf-8")
    names = {one.name for one in newest_versions.requirements(newest_versions.SETUP.read_text(encoding="utf-8"))}
    assert newest_versions.tried(text).keys() <= names
    with pytest.raises(ValueError, match="expected package, version, date and found"):
        newest_versions.tried('[[tried]]\npackage = "torch"\nversion = "2.15"\nfound = "no date"\n')


# -- what the index answers ------------------------------------------------------------------------------------------


def file(name: str, uploaded: str, **more: object) -> dict[str, object]:
    return {"filename": name, "upload-time": uploaded, **more}


INDEX = {
    "/simple/torch/": [
        file("torch-2.14.0-cp311-cp311-linux_x86_64.whl", "2026-09-01T10:00:00.5Z", **{"requires-python": ">=3.11"}),
        file("torch-2.14.0-cp312-cp312-linux_x86_64.whl", "2026-08-31T10:00:00Z", **{"requires-python": ">=3.11"}),
        file("torch-2.15.0rc1-cp312-cp312-linux_x86_64.whl", "2026-08-01T10:00:00Z"),
        file("torch-2.16.0-cp312-cp312-linux_x86_64.whl", "2026-08-01T10:00:00Z", yanked="broken"),
        file("torch-2.17.0-py3.11.egg", "2026-08-01T10:00:00Z"),
    ],
    "/simple/hydra-core/": [file("hydra-core-1.3.8.tar.gz", "2026-08-01T10:00:00Z", yanked=False)],
    "/simple/html/hydra-core/": None,
    "/simple/html/torch/": None,
    "/simple/old/hydra-core/": [{"filename": "hydra-core-1.3.8.tar.gz"}],  # as before PEP 700
    "/simple/old/torch/": [],
}


class Index(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path not in INDEX:
            return self.send_error(404)
        self.send_response(200)
        self.end_headers()
        files = INDEX[self.path] if self.headers["Accept"] == "application/vnd.pypi.simple.v1+json" else None
        self.wfile.write(b"<html></html>" if files is None else json.dumps({"files": files}).encode())

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def index(monkeypatch, tmp_path) -> Iterator[str]:
    """Serve `INDEX`, and let the script read a setup.py with two bounds."""
    (tmp_path / "setup.py").write_text(SETUP)
    (tmp_path / "tried_versions.toml").write_text("# none\n")
    monkeypatch.setattr(newest_versions, "SETUP", tmp_path / "setup.py")
    monkeypatch.setattr(newest_versions, "TRIED", tmp_path / "tried_versions.toml")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Index) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/simple"
        monkeypatch.setenv("PIP_INDEX_URL", address)
        yield address
        server.shutdown()


def test_final_releases_count_and_those_before_them_and_yanked_ones_do_not(index):
    [found] = newest_versions.releases("torch")
    assert found == Release(Version("2.14.0"), datetime.datetime(2026, 8, 31, 10, tzinfo=datetime.UTC), ">=3.11")


def test_the_script_fails_until_the_bound_or_the_record_has_the_version(index, capsys):
    assert newest_versions.main() == 1
    assert capsys.readouterr().out.startswith("[newest versions] torch 2.14 has been there since 2026-08-31 (Python >")
    newest_versions.TRIED.write_text(
        '[[tried]]\npackage = "torch"\nversion = "2.14"\ndate = 2026-11-27\nfound = "the loss differs"\n'
    )
    assert newest_versions.main() == 0
    newest_versions.TRIED.write_text("")
    newest_versions.SETUP.write_text(SETUP.replace("2.14", "2.15"))
    assert newest_versions.main() == 0
    assert "every newer version of 2 packages" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("http://user:secret@127.0.0.1:9/simple", "does not answer: http://127.0.0.1:9/simple/hydra-core/: "),
        ("{index}/none", "does not answer: {index}/none/hydra-core/: "),
        (
            "{index}/html",
            "{index}/html/hydra-core/ does not answer in JSON: choose PIP_INDEX_URL=https://pypi.org/simple",
        ),
        ("{index}/old", "{index}/old/hydra-core/ names no times of uploads: choose PIP_INDEX_URL="),
    ],
)
def test_without_an_answer_the_script_ends_with_2_and_one_sentence(index, monkeypatch, capsys, address, words):
    monkeypatch.setenv("PIP_INDEX_URL", address.format(index=index))
    assert newest_versions.main() == 2
    written = capsys.readouterr().err
    assert words.format(index=index) in written and written.count("\n") == 1
    assert "secret" not in written


# -- what runs the script --------------------------------------------------------------------------------------------


SETTINGS = ("MAKEFLAGS", "MAKEOVERRIDES", "MFLAGS", "NEWEST", "PAST_BOUNDS", "PYTHON", "VENV", "TORCH_VERSION")
"""What this process has from `make test`, and a command here shall not have."""


def environment(**variables: str) -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in SETTINGS} | variables


def planned(*arguments: str) -> str:
    command = ["make", "-n", "-C", str(REPOSITORY), *arguments]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("target", ["venv", "test"])
def test_make_asks_with_newest_alone(target):
    asked = ".venv-newest/bin/python tools/newest_versions.py"
    assert asked in planned(target, "NEWEST=1")
    assert "newest_versions" not in planned(target) + planned(target, "NEWEST=1", "PAST_BOUNDS=")


def test_the_weekly_run_asks_once_and_tests_with_every_python_whatever_the_answer(tmp_path):
    for name in (".ci/weekly", "tools/find_python.sh", ".venv/bin/python"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / ".ci/weekly").write_text((REPOSITORY / ".ci/weekly").read_text())
    (tmp_path / "tools/find_python.sh").write_text("exit 0\n")
    write_program(tmp_path / "bin/make", 'echo "make $*"')
    for name in (".venv", *(f".venv-{version}-newest" for version in ("3.11", "3.12", "3.13"))):
        write_program(tmp_path / name / "bin/python", f'case "$*" in tools/*) echo "{name} $*"; exit 1 ;; esac')
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    command = ["bash", ".ci/weekly"]
    done = subprocess.run(command, cwd=tmp_path, env=environment(PATH=path), capture_output=True, text=True)
    calls = [line for line in done.stdout.splitlines() if not line.startswith("[weekly]")]
    tests = [f"make test PYTHON={version} NEWEST=1 PAST_BOUNDS=" for version in ("3.11", "3.12", "3.13")]
    assert calls == ["make venv", ".venv tools/newest_versions.py", *tests]
    assert done.returncode == 1 and "failed: tools/newest_versions.py" in done.stderr


# -- which Python ----------------------------------------------------------------------------------------------------

PYTHON = """
case "$*" in
    *"!= '{version}'"*) exit {runs} ;;
    *"!= '"*) exit 1 ;;
    *_base_executable*) echo "$0" ;;
    *"-m venv"*) exit 1 ;;
    --version) echo "Python {version}.99" ;;
esac
exit {runs}
"""


def write_program(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


@pytest.mark.parametrize(
    ("installed", "existing", "variables", "words"),
    [
        (["3.11", "3.12", "3.13"], None, {}, r"making \S+ with Python 3.13.99"),
        (["3.11", "3.12"], None, {}, r"making \S+ with Python 3.12.99"),
        (["3.11", "3.13"], "3.11", {}, r"making \S+ with Python 3.13.99"),
        (["3.11", "3.13"], "3.13", {}, r"refreshing "),
        (["3.11", "3.13"], None, {"PYTHON": "3.11"}, r"making \S+ with Python 3.11.99"),
    ],
)
def test_newest_takes_the_newest_python_that_runs(tmp_path, installed, existing, variables, words):
    """The Pythons here run nothing, so the script ends when it makes or refreshes the environment."""
    for version in ("3.11", "3.12", "3.13"):
        runs = 0 if version in installed else 1
        write_program(tmp_path / "bin" / f"python{version}", PYTHON.format(version=version, runs=runs))
    write_program(tmp_path / "bin/uv", "exit 1")
    write_program(tmp_path / "bin/nvidia-smi", "exit 1")
    if existing:
        python = PYTHON.replace("--version)", '*"pip install"*) exit 1 ;;\n    --version)')
        write_program(tmp_path / "venv/bin/python", python.format(version=existing, runs=0))
        (tmp_path / "venv/pyvenv.cfg").touch()
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    variables = environment(PATH=path, PYENV_ROOT=str(tmp_path), NEWEST="1", **variables)
    command = ["bash", str(REPOSITORY / "tools/venv.sh"), str(tmp_path / "venv")]
    done = subprocess.run(command, env=variables, capture_output=True, text=True)
    assert done.returncode == 1 and re.match(rf"\[venv\] {words}", done.stdout), done.stdout + done.stderr
