# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""An annex is one folder: without it, everything else is imported and a default configuration loads."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from megatron_selfdistill.annexes import DOORS, door

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGE = REPOSITORY / "megatron_selfdistill"
ANNEXES = sorted({place.split(".")[0] for place in DOORS.values()})
MAY_NAME = {"instruments", "methods", "teachers"}
"""Annexes of other options, which know what they describe."""
USERS = {"adapters": {"interop", "teachers"}}
"""An annex -> the annexes that convert or load what it stores."""


@pytest.mark.parametrize("option", DOORS)
def test_every_door_opens(option):
    assert door(option).__name__.endswith(DOORS[option])


NAMED = {
    "adapters": ("(?i)adapter", 3),
    "architectures": (r"architectures\b", 3),
    "chat_logs": (r"chat_logs|Conversations|\bconversations\b(?!=)|\blogged|Logged(?!Run)", 3),
    "engines": ("(?i)vllm", 2),
    "environments": (r"\benvironments?\b(?! variable)", 3),
    "guidance": ("guidance|[Gg]uided|guide_", 2),
    "instruments": (r"instruments|door\(.(explorer|plan|report)", 1),
    "interop": (r"interop|door\(.hugging_face", 3),
    "kernels": ("(?i)triton", 2),
    "overlap": (r"\.ahead\b|\bahead:|at_update|door\(.overlap", 2),
    "teachers": (r"named_teachers|config\.teachers|taught_records", 2),
}
"""Annex -> what names its option in code, and the most files of the main house that do, but for the list of all options
(annexes.py): its part, and who opens its door.  A number may only fall, and none is above 3."""


@pytest.mark.parametrize("annex", NAMED)
def test_few_files_of_the_main_house_name_an_option(annex):
    named, most = NAMED[annex]
    others = (*ANNEXES, "methods", "annexes.py")
    files = [file for file in PACKAGE.rglob("*.py") if file.relative_to(PACKAGE).parts[0] not in others]
    naming = [file for file in files if re.search(named, re.sub(r'(?s:""".*?""")|#.*', "", file.read_text()))]
    assert len(naming) <= most


IMPORTS = """
import importlib, pkgutil, sys
import megatron_selfdistill
from megatron_selfdistill.config import load
load([])
for module in pkgutil.walk_packages(megatron_selfdistill.__path__, "megatron_selfdistill."):
    if module.name.split(".")[1] in {may_name!r} or module.name.endswith("__main__") or ".vllm" in module.name:
        continue
    importlib.import_module(module.name)
assert not [name for name in sys.modules if name.startswith("megatron_selfdistill.{annex}")]
"""


@pytest.mark.full
@pytest.mark.parametrize("annex", ANNEXES)
def test_the_package_works_without_the_folder_of_an_annex(tmp_path, annex):
    shutil.copytree(PACKAGE, tmp_path / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(REPOSITORY / "configs", tmp_path / "configs")
    shutil.rmtree(tmp_path / PACKAGE.name / annex)
    source = IMPORTS.format(may_name=MAY_NAME | USERS.get(annex, set()), annex=annex)
    found = subprocess.run([sys.executable, "-c", source], cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)}, text=True)
    assert found.returncode == 0


NOT_INSTALLED = """
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in str(finder).lower()]
"""
"""sitecustomize.py of a copy: the installed package must not supply what the copy has lost."""
ASKING = 41
"""The tests of the main house that use an option, which their message names; the number may only fall."""


@pytest.mark.full
def test_the_tests_of_the_main_house_pass_without_any_annex(tmp_path):
    for name in (PACKAGE.name, *"configs docs examples experiments tests tools".split()):
        shutil.copytree(REPOSITORY / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for annex in ANNEXES:
        shutil.rmtree(tmp_path / PACKAGE.name / annex)
        shutil.rmtree(tmp_path / "tests" / "unit" / annex, ignore_errors=True)
    gone = rf"{PACKAGE.name}\.({'|'.join(ANNEXES)})\b"
    for method in (tmp_path / PACKAGE.name / "methods").rglob("*.py"):  # made of an option
        if re.search(f"^from {gone}", method.read_text(), re.MULTILINE):
            method.unlink()
    (tmp_path / "sitecustomize.py").write_text(NOT_INSTALLED)
    shutil.copy(REPOSITORY / "pyproject.toml", tmp_path)
    rooms = [path for path in (tmp_path / "tests" / "unit").iterdir() if path.name not in ("commands", "methods")]
    options = ["-q", "-n2", "--dist=loadfile", "-m", "not full and not timing", f"--junitxml={tmp_path}/found.xml"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    subprocess.run([sys.executable, "-m", "pytest", *options, *rooms], cwd=tmp_path, env=environment)
    cases = list(ElementTree.parse(tmp_path / "found.xml").iter("testcase"))
    failed = [found for case in cases for found in case if found.tag in ("failure", "error")]
    others = [found.get("message") for found in failed if not re.search(f"No module named '{gone}", found.text)]
    assert not others and len(failed) <= ASKING and len(cases) > 2_700
