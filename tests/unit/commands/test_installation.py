# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""A missing package is one sentence that names the extra which installs it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from megatron_selfdistill.cli import COMMANDS
from megatron_selfdistill.commands import installation
from megatron_selfdistill.commands.installation import about_missing, require_extra

REPOSITORY = Path(__file__).resolve().parents[3]
SETUP = (REPOSITORY / "setup.py").read_text(encoding="utf-8")


def test_what_is_missing_is_named_alone_and_a_directory_of_data_is_no_package(tmp_path, monkeypatch):
    assert about_missing("a run", installation.RUN) is None
    require_extra("a report", "report")
    modules = {"torch": "torch", "no-core": "nowhere.core", "no-torch": "torch.nowhere", "data": "datapackage"}
    (tmp_path / "datapackage").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert "needs no-core and no-torch and data, which" in about_missing("selfdistill train", modules)
    (tmp_path / "datapackage" / "__init__.py").touch()
    assert "needs no-core and no-torch, which" in about_missing("selfdistill train", modules)


def test_every_extra_and_package_that_is_looked_for_is_one_of_setup():
    assert {command.extra for command in COMMANDS.values()} - {None} == installation.NEEDED.keys()
    for extra, modules in installation.NEEDED.items():
        (own,) = re.findall(rf'^    "{extra}": \[(.*?)\]', SETUP, re.MULTILINE | re.DOTALL)
        assert all(re.search(rf'"{name}[<>=]', own) for name in modules)
    assert all(re.search(rf'"{name}[<>=]', SETUP) for name in installation.RUN)


LIGHT = """
import importlib.abc, sys
class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("hydra", "omegaconf", "megatron", "transformers", "yaml", "torch", "numpy"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocker())
from megatron_selfdistill.cli import main
print(main(["--version"]), main(["--help"]), main(["train", "seed=1"]))
"""


def test_an_install_without_extras_shows_its_version_and_its_help_and_names_the_extra_of_a_run():
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run([sys.executable, "-c", LIGHT], env=environment, capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith("megatron_selfdistill ") and "usage: selfdistill COMMAND" in done.stdout
    assert done.stdout.splitlines()[-1] == "0 0 2", done.stderr
    assert "pip install -e '.[train]'" in done.stderr
