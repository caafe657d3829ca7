# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""An annex is one folder: without it, everything else is imported and a default configuration loads."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_selfdistill.annexes import DOORS

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGE = REPOSITORY / "megatron_selfdistill"
ANNEXES = sorted({place.split(".")[0] for place in DOORS.values()})
MAY_NAME = {"instruments", "methods", "teachers"}
"""Annexes of other options, which know what they describe."""
USERS = {"adapters": {"interop", "teachers"}}
"""An annex -> the annexes that convert or load what it stores."""


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


def test_few_files_of_the_main_house_name_an_option():
    others = (*ANNEXES, "methods", "annexes.py")
    files = [file for file in PACKAGE.rglob("*.py") if file.relative_to(PACKAGE).parts[0] not in others]
    codes = {file: re.sub(r'(?s:""".*?""")|#.*', "", file.read_text()) for file in files}
    for annex, (named, most) in NAMED.items():
        naming = [file for file, code in codes.items() if re.search(named, code)]
        assert len(naming) <= most, f"{annex}: {naming}"


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
