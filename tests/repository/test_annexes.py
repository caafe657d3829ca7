# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""An annex is one folder: without it, everything else is imported and a default configuration loads."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

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
    "adapters": ("(?i)adapter", 4),
    "architectures": (r"architectures\b", 4),
    "chat_logs": (r"chat_logs|Conversations|\bconversations\b(?!=)|\blogged|Logged(?!Run)", 4),
    "engines": ("(?i)vllm", 3),
    "environments": (r"\benvironments?\b(?! variable)", 4),
    "guidance": ("guidance|[Gg]uided|guide_", 3),
    "instruments": (r"instruments|door\(.(explorer|plan|report)", 2),
    "interop": (r"interop|door\(.hugging_face", 4),
    "kernels": ("(?i)triton", 3),
    "overlap": (r"\.ahead\b|\bahead:|at_update|door\(.overlap", 3),
    "teachers": (r"named_teachers|config\.teachers|taught_records", 3),
}
"""Annex -> what names its option in code, and the most files of the main house that do; a number may only fall."""


@pytest.mark.parametrize("annex", NAMED)
def test_few_files_of_the_main_house_name_an_option(annex):
    named, most = NAMED[annex]
    files = [file for file in PACKAGE.rglob("*.py") if file.relative_to(PACKAGE).parts[0] not in (*ANNEXES, "methods")]
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
